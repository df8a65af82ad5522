"""GPT-2: a feedforward model with learned positions, which loading may loop."""

from collections.abc import Iterator
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.families.base import (
    Family,
    Part,
    Released,
    TensorSpec,
    checked,
    fused_bias,
    heads_out,
    read,
    transposed,
    turned,
    whole,
)
from tl_loops.families.shared import feedforward

_TIED = ("lm_head.weight", "wte.weight")


def _derive(released: Released) -> dict[str, Any]:
    width = released["n_embd"]
    inner = released.get("n_inner")
    tie = released.get("tie_word_embeddings")
    return {
        "d_head": feedforward.divided(released, "n_embd", "n_head"),
        "d_mlp": 4 * width if inner is None else checked("n_inner", inner, int, above_zero=True),
        "tie_word_embeddings": True if tie is None else checked("tie_word_embeddings", tie, bool),
    }


def _tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    d, e, d_mlp, vocab = cfg.d_model, cfg.d_head, cfg.d_mlp or 0, cfg.d_vocab
    yield whole("wte.weight", (vocab, d), "embed.W_E")
    yield whole("wpe.weight", (cfg.n_ctx, d), "pos_embed.W_pos")
    for number, name in enumerate(cfg.layout.physical_names()):
        key, attn, mlp = f"h.{number}", f"{name}.attn", f"{name}.mlp"
        for stored, norm in (("ln_1", "ln1"), ("ln_2", "ln2")):
            yield from feedforward.layer_norm(f"{key}.{stored}", f"{name}.{norm}", d)
        projections, biases = feedforward.joined(cfg, name)
        yield turned(f"{key}.attn.c_attn.weight", d, *projections)
        yield fused_bias(f"{key}.attn.c_attn.bias", *biases)
        yield turned(f"{key}.attn.c_proj.weight", d, Part(f"{attn}.W_O", d, heads_out(e)))
        yield whole(f"{key}.attn.c_proj.bias", (d,), f"{attn}.b_O")
        yield turned(f"{key}.mlp.c_fc.weight", d, Part(f"{mlp}.W_in", d_mlp, transposed))
        yield whole(f"{key}.mlp.c_fc.bias", (d_mlp,), f"{mlp}.b_in")
        yield turned(f"{key}.mlp.c_proj.weight", d_mlp, Part(f"{mlp}.W_out", d, transposed))
        yield whole(f"{key}.mlp.c_proj.bias", (d,), f"{mlp}.b_out")
    yield from feedforward.layer_norm("ln_f", "ln_final", d)
    if not cfg.tie_word_embeddings:
        yield whole("lm_head.weight", (vocab, d), "unembed.W_U", transposed)


GPT2 = Family(
    name="gpt2",
    paper="",
    model_types=("gpt2",),
    architectures=("GPT2LMHeadModel",),
    fields={
        "d_model": read("n_embd"),
        "n_heads": read("n_head"),
        "d_vocab": read("vocab_size"),
        "n_ctx": read("n_positions", "n_ctx"),
        "n_core": read("n_layer"),
        "eps": read("layer_norm_epsilon", kind=float),
        "act_fn": read("activation_function", kind=str),
    },
    fixed={
        **feedforward.FIXED,
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
        "gated_mlp": False,
        "attn_bias": True,
        "mlp_bias": True,
    },
    flags={
        "activation_function": ("gelu_new", "gelu", "relu", "silu"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
    without_effect={
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), "training only"),
        **dict.fromkeys(
            (
                *("summary_type", "summary_use_proj", "summary_activation"),
                *("summary_proj_to_labels", "summary_first_dropout", "task_specific_params"),
            ),
            "of other heads than the language model's",
        ),
    },
    derive=_derive,
    tensors=_tensors,
    ignored=("h.*.attn.bias", "h.*.attn.masked_bias"),
    spellings=(("transformer.", ""),),
    tied=_TIED,
    feedforward=True,
)
