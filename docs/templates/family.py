"""Mymodel: one looped stack between a prelude and a coda (PAPER).

Copy to tl_loops/families/mymodel.py, replace every "mymodel" and "MYMODEL", and go through the
lines marked with a number: docs/adding_a_family.md explains them.
"""

from collections.abc import Iterator
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.config.weights import key_value_name
from tl_loops.errors import CheckpointError
from tl_loops.families.base import (
    Family,
    Released,
    TensorSpec,
    heads_in,
    heads_out,
    read,
    transposed,
    whole,
)
from tl_loops.families.shared.rotary import rotary_fields


def _derive(released: Released) -> dict[str, Any]:
    """(1) Config fields that are computed from several released ones."""
    d_model, heads = released["hidden_size"], released["num_attention_heads"]
    if heads < 1 or d_model % heads:
        raise CheckpointError(
            f"'hidden_size' = {d_model} is no multiple of 'num_attention_heads' = {heads}"
        )
    return {"d_head": d_model // heads, **rotary_fields(released)}


def _tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    """(2) Every stored tensor: its key, its stored shape, its physical name, and a view."""
    d, d_mlp, vocab, e = cfg.d_model, cfg.d_mlp or 0, cfg.d_vocab, cfg.d_head
    q_width, kv_width = cfg.n_heads * e, (cfg.n_key_value_heads or cfg.n_heads) * e
    W_K, W_V = key_value_name(cfg, "W_K"), key_value_name(cfg, "W_V")
    yield whole("model.embed_tokens.weight", (vocab, d), "embed.W_E")
    for stored, phase, size in (
        ("model.prelude", "prelude", cfg.n_prelude),
        ("model.core", "core", cfg.n_core),
        ("model.coda", "coda", cfg.n_coda),
    ):
        for layer in range(size):
            key, name = f"{stored}.{layer}", f"{phase}.{layer}"
            yield whole(f"{key}.input_layernorm.weight", (d,), f"{name}.ln1.w")
            yield whole(f"{key}.post_attention_layernorm.weight", (d,), f"{name}.ln2.w")
            attn, mlp = f"{key}.self_attn", f"{key}.mlp"
            yield whole(f"{attn}.q_proj.weight", (q_width, d), f"{name}.attn.W_Q", heads_in(e))
            yield whole(f"{attn}.k_proj.weight", (kv_width, d), f"{name}.attn.{W_K}", heads_in(e))
            yield whole(f"{attn}.v_proj.weight", (kv_width, d), f"{name}.attn.{W_V}", heads_in(e))
            yield whole(f"{attn}.o_proj.weight", (d, q_width), f"{name}.attn.W_O", heads_out(e))
            yield whole(f"{mlp}.gate_proj.weight", (d_mlp, d), f"{name}.mlp.W_gate", transposed)
            yield whole(f"{mlp}.up_proj.weight", (d_mlp, d), f"{name}.mlp.W_in", transposed)
            yield whole(f"{mlp}.down_proj.weight", (d, d_mlp), f"{name}.mlp.W_out", transposed)
    yield whole("model.norm.weight", (d,), "ln_final.w")
    if not cfg.tie_word_embeddings:
        yield whole("lm_head.weight", (vocab, d), "unembed.W_U", transposed)


MYMODEL = Family(
    name="mymodel",
    paper="PAPER",
    model_types=("mymodel",),  # (3) what config.json says
    architectures=("MymodelForCausalLM",),
    fields={  # (4) config fields that stand in config.json under another name
        "d_model": read("hidden_size"),
        "n_heads": read("num_attention_heads"),
        "n_key_value_heads": read("num_key_value_heads", default=None),
        "d_mlp": read("intermediate_size"),
        "d_vocab": read("vocab_size"),
        "n_ctx": read("max_position_embeddings"),
        "eps": read("rms_norm_eps", kind=float),
        "n_prelude": read("n_prelude"),
        "n_core": read("n_core"),
        "n_coda": read("n_coda"),
        "n_iterations": read("n_loops"),
        "tie_word_embeddings": read("tie_word_embeddings", kind=bool, default=False),
    },
    fixed={  # (5) the architecture: what is the same in every checkpoint
        "block_norm": "pre",
        "initial_state": "embed",
        "injection": "add",
        "rotary_layout": "half",
    },
    flags={  # (6) released options that change the mathematics, with the values that are built
        "hidden_act": ("silu", "swish"),
        "sliding_window": (),
    },
    derive=_derive,
    tensors=_tensors,
    tied=("lm_head.weight", "model.embed_tokens.weight"),
    known=(),  # (7) names that load from the hub
)
