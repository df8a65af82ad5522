"""Dory: a normalised transformer whose middle layers are run several times.

Native in Hugging Face transformers as ``dory``. Streams stay near the unit sphere (nGPT,
2410.01131): L2 norms everywhere, branches that pull the stream towards what they write, trained
scales. Most layers have a window and a rotary base of their own.
"""

from collections.abc import Iterator
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import CheckpointError, shortened
from tl_loops.families.base import (
    Family,
    KnownModel,
    Released,
    TensorSpec,
    checked,
    head_bias,
    heads_in,
    read,
    transposed,
    whole,
)
from tl_loops.families.shared import llama

_WINDOWED, _FULL = "sliding_attention", "full_attention"
_BASES = {_WINDOWED: 10_000.0, _FULL: 10_000_000.0}
_CACHES = {"per_loop": None, "last_loop": "shared"}


def _layers(released: Released) -> tuple[list[str], dict[str, int]]:
    """The kind of attention of every layer, and how many stand before, in and after the loop.

    Files count a layer once, or its attention and its MLP.
    """
    counts = {
        key: checked(key, released.get(key, default), int)
        for key, default in (
            ("num_hidden_layers", 36),
            ("n_input_layers", 8),
            ("n_output_layers", 8),
        )
    }
    if released.get("n_recurrent_layers") is not None:
        key = "n_recurrent_layers"
        counts[key] = checked(key, released[key], int)
    kinds = released.get("layer_types")
    if kinds is not None and not isinstance(kinds, list):
        raise CheckpointError(f"'layer_types' must be a list, found {shortened(kinds)}")
    if kinds is not None and "mlp" in kinds:
        if set(kinds[1::2]) != {"mlp"} or any(count % 2 for count in counts.values()):
            raise CheckpointError(
                "'layer_types' lists attentions and MLPs: each must be an attention and an 'mlp' "
                "in turn, and all numbers of layers even"
            )
        kinds, counts = kinds[::2], {key: count // 2 for key, count in counts.items()}
    depth, before, after = (counts[key] for key in list(counts)[:3])
    if kinds is None:
        kinds = [_WINDOWED if (layer + 1) % 4 else _FULL for layer in range(depth)]
    if len(kinds) != depth or not all(kind in (_WINDOWED, _FULL) for kind in kinds):
        raise CheckpointError(
            f"'layer_types' must name {_WINDOWED!r} or {_FULL!r} for each of {depth} layers, found "
            f"{shortened(kinds)}"
        )
    core = counts.get("n_recurrent_layers", depth - before - after)
    if core < 1 or before + core + after != depth:
        raise CheckpointError(
            f"{before} layers before the loop, {core} in it and {after} after it must be "
            f"{depth} in all, with at least 1 in the loop"
        )
    return kinds, {"n_prelude": before, "n_core": core, "n_coda": after}


def _base(released: Released, kind: str) -> float:
    """The rotary base of a kind of layers."""
    given = released.get("rope_parameters")
    if given is None:
        return _BASES[kind]
    own = given.get(kind) if isinstance(given, dict) else None
    if not isinstance(own, dict) or not own.keys() <= {"rope_type", "rope_theta"}:
        raise CheckpointError(
            f"'rope_parameters' must hold 'rope_type' and 'rope_theta' for {kind!r} alone, found "
            f"{shortened(own if isinstance(given, dict) else given)}"
        )
    if own.get("rope_type") != "default":
        raise CheckpointError(
            f"'rope_parameters' of {kind!r} has rope_type {shortened(own.get('rope_type'))}, which "
            "is not implemented; expected 'default'"
        )
    key = f"rope_parameters.{kind}.rope_theta"
    return checked(key, own.get("rope_theta"), float, above_zero=True)


def _windows(released: Released, kinds: list[str]) -> dict[str, Any]:
    """Windows and rotary bases."""
    layers = tuple(number for number, kind in enumerate(kinds) if kind == _WINDOWED)
    if not layers:
        return {"rotary_base": _base(released, _FULL)}
    window = checked("sliding_window", released.get("sliding_window", 1024), int, above_zero=True)
    base = _base(released, _WINDOWED)
    found = {"attn_window": window, "attn_window_layers": layers}
    if len(layers) == len(kinds):
        return {**found, "rotary_base": base}
    return {**found, "rotary_base": _base(released, _FULL), "attn_window_rotary_base": base}


def _derive(released: Released) -> dict[str, Any]:
    kinds, sizes = _layers(released)
    width = checked("hidden_size", released["hidden_size"], int)
    d_head = checked("head_dim", released.get("head_dim", 256), int, above_zero=True)
    unit = checked(
        "initializer_range", released.get("initializer_range", 0.0177), float, above_zero=True
    )
    alpha = checked(
        "ngpt_alpha_init", released.get("ngpt_alpha_init", 0.05), float, above_zero=True
    )
    loops = checked("n_recurrent_loops", released.get("n_recurrent_loops", 2), int, above_zero=True)
    cache = released.get("recurrent_kv_cache_mode", "per_loop")
    if cache not in _CACHES:
        raise CheckpointError(
            f"'recurrent_kv_cache_mode' must be one of {', '.join(map(repr, _CACHES))}, found "
            f"{shortened(cache)}"
        )
    return {
        **sizes,
        **_windows(released, kinds),
        "n_iterations": loops,
        "d_head": d_head,
        "kv_sharing": _CACHES[cache],
        "residual_rate": alpha / unit,
        "query_scale": d_head**0.5 / unit,
        "attn_gate_scale": width**0.25 / unit,
        "neuron_scale": width**0.5,
        "logit_scale": 1 / unit,
    }


def _tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    d, d_mlp, vocab = cfg.d_model, cfg.d_mlp or 0, cfg.d_vocab
    heads = cfg.n_heads * cfg.d_head
    yield whole("model.embed_tokens.weight", (vocab, d), "embed.W_E")
    for number, name in enumerate(cfg.layout.physical_names()):
        key = f"model.layers.{number}"
        yield from llama.layer(cfg, key, name, norms={})
        attn, mlp = f"{key}.self_attn", f"{key}.mlp"
        split = head_bias(cfg.d_head)
        gate = heads_in(cfg.d_head)
        yield whole(f"{attn}.gate_proj.weight", (heads, d), f"{name}.attn.W_gate", gate)
        yield whole(f"{attn}.sqk", (heads,), f"{name}.attn.query_scale.w", split)
        yield whole(f"{attn}.s_gate", (heads,), f"{name}.attn.gate_scale.w", split)
        yield whole(f"{mlp}.suv_gate", (d_mlp,), f"{name}.mlp.gate_scale.w")
        yield whole(f"{mlp}.suv_up", (d_mlp,), f"{name}.mlp.in_scale.w")
        yield whole(f"{key}.lambda_1", (d,), f"{name}.attn_rate.w")
        yield whole(f"{key}.lambda_2", (d,), f"{name}.mlp_rate.w")
    if not cfg.tie_word_embeddings:
        yield whole("lm_head.weight", (vocab, d), "unembed.W_U", transposed)
    yield whole("lm_head.logit_scale", (vocab,), "unembed.w")


_RELEASED = {
    "vocab_size": 131072,
    "hidden_size": 2560,
    "intermediate_size": 7168,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "initializer_range": 0.0177,
    "sliding_window": 1024,
    "n_input_layers": 8,
    "n_output_layers": 8,
    "n_recurrent_loops": 2,
    "tie_word_embeddings": False,
}

DORY = Family(
    name="dory",
    paper="",
    model_types=("dory",),
    architectures=("DoryForCausalLM",),
    fields={
        "d_model": read("hidden_size"),
        "n_heads": read("num_attention_heads", default=16),
        "n_key_value_heads": read("num_key_value_heads", default=4),
        "d_mlp": read("intermediate_size"),
        "d_vocab": read("vocab_size"),
        "n_ctx": read("max_position_embeddings"),
        "tie_word_embeddings": read("tie_word_embeddings", kind=bool, default=False),
    },
    fixed={
        "eps": 1e-6,
        "normalization_type": "L2",
        "block_norm": "stream",
        "injection": "add_normed",
        "initial_state": "embed",
        "qk_norm": "head_weight",
        "attn_gate": True,
        "inner_norms": True,
        "rotary_layout": "half",
        "default_prepend_bos": True,
    },
    flags={"hidden_act": ("silu", "swish")},
    derive=_derive,
    tensors=_tensors,
    tied=llama.TIED,
    known=(
        KnownModel(
            "nvidia/NVIDIA-Nemotron-Labs-Dory1.0-4B-BF16",
            ("dory-1.0-4b", "dory"),
            _RELEASED,
            tuple(_RELEASED),
        ),
    ),
)
