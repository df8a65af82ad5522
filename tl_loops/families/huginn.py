"""Huginn: prelude, core and coda with norms on the residual sums (2502.05171)."""

import math
from collections.abc import Iterator
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import CheckpointError
from tl_loops.families.base import Family, KnownModel, Released, TensorSpec, checked, read
from tl_loops.families.shared import raven
from tl_loops.families.shared.raven import truncated_normal_std

_NORMS = {"norm_1": "ln1", "norm_2": "ln1_post", "norm_3": "ln2", "norm_4": "ln2_post"}


def _derive(released: Released) -> dict[str, Any]:
    d_model = released.get("n_embd") or released["hidden_size"]
    heads = released.get("n_heads") or released["num_attention_heads"]
    if not heads or d_model % heads:
        raise CheckpointError(f"'n_embd' = {d_model} must be a multiple of 'n_heads' = {heads}")
    for key, value in (("head_dim", d_model // heads), ("num_key_value_heads", heads)):
        if released.get(key) is not None and released[key] != value:
            raise CheckpointError(
                f"{key!r} is {released[key]!r}, but blocks of this family have {value}"
            )
    base = checked("rope_base", released.get("rope_base") or 50_000.0, float)
    if released.get("rope_theta") not in (None, base):
        raise CheckpointError(
            f"'rope_theta' is {released['rope_theta']!r}, but blocks of this family rotate by "
            f"'rope_base' = {base:g}"
        )
    # The reference computes both from the width; init_values repeats them.
    scale, std = math.sqrt(d_model), truncated_normal_std(d_model)
    init_values = released.get("init_values") or {}
    if not isinstance(init_values, dict):
        raise CheckpointError(f"'init_values' must be a mapping, found {init_values!r}")
    for key, value in (("embed_scale", scale), ("std", std)):
        found = init_values.get(key, value)
        if not math.isclose(checked(f"init_values.{key}", found, float), value, rel_tol=1e-6):
            raise CheckpointError(
                f"'init_values.{key}' is {found!r}, but a width of {d_model} gives {value:.7g}"
            )
    return {
        "d_head": d_model // heads,
        "rotary_base": base,
        "embed_scale": scale,
        "initial_state_std": std * scale,
        **raven.padding(released),
    }


def _tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    return raven.tensors(cfg, _NORMS)


HUGINN = Family(
    name="huginn",
    paper="2502.05171",
    model_types=raven.MODEL_TYPES,
    architectures=raven.ARCHITECTURES,
    has_tensors=lambda keys: any(".norm_3." in key or ".norm_4." in key for key in keys),
    fields={
        **raven.FIELDS,
        "n_ctx": read("block_size"),
        "qk_bias": read("qk_bias", kind=bool, default=True),
        "tie_word_embeddings": read(
            "tie_embeddings", "tie_word_embeddings", kind=bool, default=True
        ),
    },
    fixed={
        **raven.FIXED,
        "block_norm": "post_residual",
        "norm_before_coda": True,
        "rotary_layout": "interleaved",
    },
    flags=raven.FLAGS,
    without_effect=raven.WITHOUT_EFFECT,
    derive=_derive,
    tensors=_tensors,
    tables={"freqs_cis": "cos and sin"},
    tied=raven.TIED,
    known=(
        KnownModel(
            "tomg-group-umd/huginn-0125",
            ("huginn-0125", "huginn"),
            {
                "n_embd": 5280,
                "n_heads": 55,
                "num_key_value_heads": 55,
                "intermediate_size": 17920,
                "vocab_size": 65536,
                "block_size": 4096,
                "norm_eps": 1e-6,
                "n_layers_in_prelude": 2,
                "n_layers_in_recurrent_block": 4,
                "n_layers_in_coda": 2,
                "mean_recurrence": 32,
                "qk_bias": True,
                "tie_embeddings": True,
            },
        ),
    ),
)
