"""Ouro: one looped stack with sandwich norms and a halting gate (2510.25741)."""

from collections.abc import Iterator
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import CheckpointError
from tl_loops.families.base import (
    Family,
    KnownModel,
    Released,
    TensorSpec,
    checked,
    read,
    transposed,
    whole,
)
from tl_loops.families.shared import llama
from tl_loops.families.shared.rotary import rotary_fields

_NORMS = {
    "input_layernorm": "ln1",
    "input_layernorm_2": "ln1_post",
    "post_attention_layernorm": "ln2",
    "post_attention_layernorm_2": "ln2_post",
}


def _derive(released: Released) -> dict[str, Any]:
    llama.check_layer_types(released)
    scaling = released.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("type") not in (None, scaling.get("rope_type")):
        if "rope_type" in scaling:
            raise CheckpointError(
                f"'rope_scaling' has 'rope_type' {scaling['rope_type']!r} and 'type' "
                f"{scaling['type']!r}: the released class overwrites the first by the second, "
                "transformers does not; remove one of them"
            )
    # Released configs say 1.0, which means the last iteration; in bfloat16 the cumulative
    # probability can round to 1.0 earlier, which the reference then takes for an exit.
    threshold = released.get("early_exit_threshold")
    if threshold is not None and checked("early_exit_threshold", threshold, float) >= 1.0:
        threshold = None
    # The reference takes an iteration that does not exist for none.
    step = released.get("early_exit_step")
    if step is not None and (type(step) is not int):
        raise CheckpointError(f"'early_exit_step' must be an iteration or null, found {step!r}")
    exists = step is not None and 0 <= step < released["total_ut_steps"]
    return {
        "exit_step": step if exists else None,
        "d_head": llama.head_width(released),
        "exit_threshold": None if threshold is None else float(threshold),
        **rotary_fields(released),
    }


def _tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    yield from llama.looped_stack(cfg, _NORMS)
    yield whole("model.early_exit_gate.weight", (1, cfg.d_model), "exit_gate.W", transposed)
    yield whole("model.early_exit_gate.bias", (1,), "exit_gate.b")


def _released(n_layers: int) -> dict[str, Any]:
    return {
        "vocab_size": 49152,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": False,
        "total_ut_steps": 4,
        "early_exit_threshold": 1.0,
    }


_LENGTH = ("max_position_embeddings",)
_ALL = tuple(_released(24))

OURO = Family(
    name="ouro",
    paper="2510.25741",
    model_types=("ouro",),
    architectures=("OuroForCausalLM",),
    fields={
        **llama.LOOPED_FIELDS,
        "n_iterations": read("total_ut_steps"),
    },
    fixed={
        "block_norm": "sandwich",
        "initial_state": "embed",
        "norm_between_iterations": True,
        "exit_gate": True,
        "rotary_layout": "half",
        "default_prepend_bos": True,
    },
    flags=llama.FLAGS,
    derive=_derive,
    without_effect={
        "max_window_layers": "no layer has a window ('use_sliding_window')",
        "sliding_window": "no layer has a window ('use_sliding_window')",
        "chunk_size": "the reference stores it and does not use it",
    },
    tensors=_tensors,
    tied=llama.TIED,
    known=(
        KnownModel("ByteDance/Ouro-1.4B", ("ouro-1.4b",), _released(24)),
        KnownModel("ByteDance/Ouro-2.6B", ("ouro-2.6b",), _released(48)),
        KnownModel("ByteDance/Ouro-1.4B-Thinking", ("ouro-1.4b-thinking",), _released(24), _LENGTH),
        KnownModel("ByteDance/Ouro-2.6B-Thinking", ("ouro-2.6b-thinking",), _released(48), _LENGTH),
        KnownModel("KristianS7/Ouro-1.4B", (), _released(24), _ALL),
        KnownModel("scpalmetto/Ouro-2.6B-Thinking-Fixed", (), _released(48), _ALL),
    ),
)
