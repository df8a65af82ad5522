"""HRM-Text: two stacks with a state each, called in nested cycles.

Native in Hugging Face transformers as ``hrm_text``; published as sapientinc/HRM-Text-1B. The
instruction of a prompt is a prefix, which sees itself in both directions: pass ``prefix_mask``
(``token_type_ids`` in transformers). Without it attention is causal, which the model was not
trained on for instructions.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import CheckpointError
from tl_loops.families.base import (
    Family,
    KnownModel,
    Released,
    TensorSpec,
    checked,
    heads_in,
    read,
    transposed,
    whole,
)
from tl_loops.families.shared import fused, llama
from tl_loops.families.shared.rotary import rotary_fields

_DEFAULT_RANGE = 0.02
_DEFAULT_BASE = 10_000.0
_MOST_CYCLES = 10_000


def _derive(released: Released) -> dict[str, Any]:
    H_cycles = checked("H_cycles", released.get("H_cycles", 2), int)
    L_cycles = checked("L_cycles", released.get("L_cycles", 3), int)
    if not (1 <= H_cycles <= _MOST_CYCLES and 1 <= L_cycles <= _MOST_CYCLES):
        raise CheckpointError(
            f"'H_cycles' = {H_cycles} and 'L_cycles' = {L_cycles} must be at least 1 and at most "
            f"{_MOST_CYCLES:,}"
        )
    heads = released["num_attention_heads"]
    if released.get("num_key_value_heads") not in (None, heads):
        raise CheckpointError(
            f"'num_key_value_heads' is {released['num_key_value_heads']!r}, but blocks of this "
            f"family have {heads}"
        )
    per_stack = released.get("num_layers_per_stack")
    if per_stack is None:
        # Without it 'num_hidden_layers' is the depth of one stack; else it counts all calls.
        per_stack = released.get("num_hidden_layers")
    if per_stack is None:
        raise CheckpointError("the required field 'num_layers_per_stack' is missing")
    scale = released.get("embedding_scale")
    if scale is None:
        width = checked(
            "initializer_range", released.get("initializer_range", _DEFAULT_RANGE), float
        )
        if width == 0:
            raise CheckpointError("'initializer_range' must be above 0 without 'embedding_scale'")
        scale = 1.0 / width
    rotary = {"rotary_base": _DEFAULT_BASE}
    if any(released.get(key) for key in ("rope_theta", "rope_parameters", "rope_scaling")):
        rotary = rotary_fields(released)
    return {
        "n_core": checked("num_layers_per_stack", per_stack, int),
        "n_iterations": H_cycles * (L_cycles + 1),
        "stacks": ("L",) * L_cycles + ("H",),
        "embed_scale": checked("embedding_scale", scale, float),
        **rotary,
    }


def _tensors(
    cfg: LoopedTransformerConfig, layer: Callable[..., Iterator[TensorSpec]]
) -> Iterator[TensorSpec]:
    d = cfg.d_model
    yield whole("model.embed_tokens.weight", (cfg.d_vocab, d), "embed.W_E")
    yield whole("model.z_L_init", (d,), "initial_state.state")
    for stack in ("L", "H"):
        for number in range(cfg.n_core):
            yield from layer(cfg, f"model.{stack}_module.layers.{number}", f"core.{stack}.{number}")
    if not cfg.tie_word_embeddings:
        yield whole("lm_head.weight", (cfg.d_vocab, d), "unembed.W_U", transposed)


def _split_layer(cfg: LoopedTransformerConfig, key: str, name: str) -> Iterator[TensorSpec]:
    """A layer with a matrix for each projection, as the modules of transformers are."""
    yield from llama.layer(cfg, key, name, norms={})
    width = cfg.n_heads * cfg.d_head
    gate = f"{key}.self_attn.gate_proj.weight"
    yield whole(gate, (width, cfg.d_model), f"{name}.attn.W_gate", heads_in(cfg.d_head))


def _fused_layer(cfg: LoopedTransformerConfig, key: str, name: str) -> Iterator[TensorSpec]:
    """A layer with fused projections, as transformers writes and converts checkpoints."""
    weights = ("W_gate", "W_Q", "W_K", "W_V")
    yield from fused.layer(cfg, key, name, "attn", "gqkv_proj", weights)


def _is_fused(keys: Collection[str]) -> bool:
    return any(".gqkv_proj." in key for key in keys)


_RELEASED = {
    "vocab_size": 65536,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_attention_heads": 12,
    "head_dim": 128,
    "num_hidden_layers": 128,
    "num_layers_per_stack": 16,
    "H_cycles": 2,
    "L_cycles": 3,
    "embedding_scale": 39.191835884530846,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "prefix_lm": True,
}

HRM_TEXT = Family(
    name="hrm-text",
    paper="",
    model_types=("hrm_text",),
    architectures=("HrmTextForCausalLM",),
    fields={
        "d_model": read("hidden_size"),
        "n_heads": read("num_attention_heads"),
        "d_head": read("head_dim", default=128),
        "d_mlp": read("intermediate_size"),
        "d_vocab": read("vocab_size"),
        "n_ctx": read("max_position_embeddings"),
        "eps": read("rms_norm_eps", kind=float, default=1e-6),
        "prefix_mask": read("prefix_lm", kind=bool, default=True),
        "tie_word_embeddings": read("tie_word_embeddings", kind=bool, default=False),
    },
    fixed={
        "block_norm": "pre",
        "normalization_type": "RMSPre",
        "norm_between_iterations": True,
        "initial_state": "learned",
        "slow_initial_state": "embed",
        "attn_gate": True,
        "rotary_layout": "half",
        "default_prepend_bos": True,
    },
    flags={"hidden_act": ("silu", "swish")},
    without_effect={
        "num_hidden_layers": "counts all calls where 'num_layers_per_stack' is given",
        **dict.fromkeys(("L_bp_cycles", "L_bp_steps"), "cuts gradients in the reference alone"),
    },
    derive=_derive,
    tensors=lambda cfg: _tensors(cfg, _fused_layer),
    has_tensors=_is_fused,
    tied=("lm_head.weight", "model.embed_tokens.weight"),
    known=(
        KnownModel(
            "sapientinc/HRM-Text-1B",
            ("hrm-text-1b", "hrm-text"),
            _RELEASED,
            tuple(_RELEASED),
        ),
    ),
)

HRM_TEXT_SPLIT = replace(
    HRM_TEXT,
    name="hrm-text-split",
    tensors=lambda cfg: _tensors(cfg, _split_layer),
    has_tensors=lambda keys: not _is_fused(keys),
    known=(),
)
"""The same with a tensor for each projection."""
