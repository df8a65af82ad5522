"""What the feedforward families share: models of one iteration, which loading may loop."""

from typing import Any

from tl_loops.families.base import Field, read
from tl_loops.families.shared import llama

FIELDS: dict[str, Field] = {**llama.FIELDS, "n_core": read("num_hidden_layers")}

FIXED: dict[str, Any] = {
    "block_norm": "pre",
    "initial_state": "embed",
    "rotary_layout": "half",
    "n_iterations": 1,
    "default_prepend_bos": True,
}

UNUSED_TABLES = ("*.rotary_emb.inv_freq", "*.attention.bias", "*.attention.masked_bias")
"""Buffers that older files hold: frequencies that the config gives, and causal masks."""

FULL_ATTENTION: dict[str, tuple[Any, ...]] = {"use_sliding_window": (False,), "sliding_window": ()}
"""Every layer sees every earlier position."""
