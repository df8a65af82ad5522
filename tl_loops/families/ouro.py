"""Ouro: one looped stack with sandwich norms and a halting gate (2510.25741)."""

from collections.abc import Iterator
from typing import Any

from tl_loops.config import LoopedTransformerConfig
from tl_loops.errors import CheckpointError
from tl_loops.families.base import (
    Family,
    KnownModel,
    Released,
    TensorSpec,
    checked,
    heads_in,
    heads_out,
    read,
    transposed,
    whole,
)
from tl_loops.families.rotary import rotary_fields
from tl_loops.physical import key_value_name

_NORMS = {
    "input_layernorm": "ln1",
    "input_layernorm_2": "ln1_post",
    "post_attention_layernorm": "ln2",
    "post_attention_layernorm_2": "ln2_post",
}


def _derive(released: Released) -> dict[str, Any]:
    layer_types = released.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise CheckpointError(
            f"'layer_types' is {layer_types!r}, which is not implemented; "
            "expected 'full_attention' for every layer"
        )
    d_model, heads = released["hidden_size"], released["num_attention_heads"]
    d_head = released.get("head_dim")
    if d_head is None:
        if heads == 0 or d_model % heads:
            raise CheckpointError(
                f"'head_dim' is missing and 'hidden_size' = {d_model} is no multiple of "
                f"'num_attention_heads' = {heads}"
            )
        d_head = d_model // heads
    # Released configs say 1.0, which means the last iteration; in bfloat16 the cumulative
    # probability can round to 1.0 earlier, which the reference then takes for an exit.
    threshold = released.get("early_exit_threshold")
    if threshold is not None and checked("early_exit_threshold", threshold, float) >= 1.0:
        threshold = None
    return {
        "d_head": checked("head_dim", d_head, int),
        "exit_threshold": None if threshold is None else float(threshold),
        **rotary_fields(released),
    }


def _tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    d, d_mlp, vocab, e = cfg.d_model, cfg.d_mlp or 0, cfg.d_vocab, cfg.d_head
    q_width, kv_width = cfg.n_heads * e, (cfg.n_key_value_heads or cfg.n_heads) * e
    W_K, W_V = key_value_name(cfg, "W_K"), key_value_name(cfg, "W_V")
    yield whole("model.embed_tokens.weight", (vocab, d), "embed.W_E")
    for layer in range(cfg.n_core):
        key, name = f"model.layers.{layer}", f"core.{layer}"
        for stored, norm in _NORMS.items():
            yield whole(f"{key}.{stored}.weight", (d,), f"{name}.{norm}.w")
        attn, mlp = f"{key}.self_attn", f"{key}.mlp"
        yield whole(f"{attn}.q_proj.weight", (q_width, d), f"{name}.attn.W_Q", heads_in(e))
        yield whole(f"{attn}.k_proj.weight", (kv_width, d), f"{name}.attn.{W_K}", heads_in(e))
        yield whole(f"{attn}.v_proj.weight", (kv_width, d), f"{name}.attn.{W_V}", heads_in(e))
        yield whole(f"{attn}.o_proj.weight", (d, q_width), f"{name}.attn.W_O", heads_out(e))
        yield whole(f"{mlp}.gate_proj.weight", (d_mlp, d), f"{name}.mlp.W_gate", transposed)
        yield whole(f"{mlp}.up_proj.weight", (d_mlp, d), f"{name}.mlp.W_in", transposed)
        yield whole(f"{mlp}.down_proj.weight", (d, d_mlp), f"{name}.mlp.W_out", transposed)
    yield whole("model.norm.weight", (d,), "ln_final.w")
    yield whole("model.early_exit_gate.weight", (1, d), "exit_gate.W", transposed)
    yield whole("model.early_exit_gate.bias", (1,), "exit_gate.b")
    if not cfg.tie_word_embeddings:
        yield whole("lm_head.weight", (vocab, d), "unembed.W_U", transposed)


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
        "d_model": read("hidden_size"),
        "n_heads": read("num_attention_heads"),
        "n_key_value_heads": read("num_key_value_heads", default=None),
        "d_mlp": read("intermediate_size"),
        "d_vocab": read("vocab_size"),
        "n_ctx": read("max_position_embeddings"),
        "eps": read("rms_norm_eps", kind=float),
        "n_core": read("num_hidden_layers"),
        "n_iterations": read("total_ut_steps"),
        "tie_word_embeddings": read("tie_word_embeddings", kind=bool, default=False),
    },
    fixed={
        "block_norm": "sandwich",
        "initial_state": "embed",
        "norm_between_iterations": True,
        "exit_gate": True,
        "rotary_layout": "half",
        "default_prepend_bos": True,
    },
    flags={
        "hidden_act": ("silu", "swish"),
        "use_sliding_window": (False,),
    },
    derive=_derive,
    tensors=_tensors,
    tied=("lm_head.weight", "model.embed_tokens.weight"),
    known=(
        KnownModel("ByteDance/Ouro-1.4B", ("ouro-1.4b",), _released(24)),
        KnownModel("ByteDance/Ouro-2.6B", ("ouro-2.6b",), _released(48)),
        KnownModel("ByteDance/Ouro-1.4B-Thinking", ("ouro-1.4b-thinking",), _released(24), _LENGTH),
        KnownModel("ByteDance/Ouro-2.6B-Thinking", ("ouro-2.6b-thinking",), _released(48), _LENGTH),
        KnownModel("KristianS7/Ouro-1.4B", (), _released(24), _ALL),
        KnownModel("scpalmetto/Ouro-2.6B-Thinking-Fixed", (), _released(48), _ALL),
    ),
)
