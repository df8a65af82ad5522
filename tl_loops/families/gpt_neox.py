"""GPT-NeoX and Pythia: feedforward models with parallel branches, which loading may loop."""

from collections.abc import Iterator
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import CheckpointError
from tl_loops.families.base import (
    Family,
    Released,
    TensorSpec,
    checked,
    fused,
    fused_bias,
    heads_out,
    read,
    transposed,
    whole,
)
from tl_loops.families.shared import feedforward
from tl_loops.families.shared.rotary import rotary_fields

_TIED = ("embed_out.weight", "gpt_neox.embed_in.weight")


def _spread(released: Released) -> Released:
    """With the share of rotated dimensions, which has three places, as ``rotary_pct``."""
    parameters = released.get("rope_parameters")
    parameters = dict(parameters) if isinstance(parameters, dict) else parameters
    inside = parameters.pop("partial_rotary_factor", None) if isinstance(parameters, dict) else None
    given = (released.get("rotary_pct"), released.get("partial_rotary_factor"), inside)
    shares = {checked("rotary_pct", share, float) for share in given if share is not None}
    if len(shares) > 1:
        raise CheckpointError(f"the share of rotated dimensions is given twice: {sorted(shares)}")
    base = released.get("rope_theta") or released.get("rotary_emb_base")
    if base is None and not (isinstance(parameters, dict) and "rope_theta" in parameters):
        base = 10_000.0
    rest = {key: value for key, value in released.items() if key != "partial_rotary_factor"}
    share = shares.pop() if shares else 0.25
    return {**rest, "rotary_pct": share, "rope_theta": base, "rope_parameters": parameters}


def _derive(released: Released) -> dict[str, Any]:
    d_head = feedforward.divided(released, "hidden_size", "num_attention_heads")
    rotary_dim = int(d_head * released["rotary_pct"])
    if not 2 <= rotary_dim <= d_head or rotary_dim % 2:
        raise CheckpointError(
            f"'rotary_pct' gives {rotary_dim} rotated dimensions of {d_head}, expected an even "
            "number of at least 2"
        )
    return {"d_head": d_head, "rotary_dim": rotary_dim, **rotary_fields(released)}


def _tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    d, e, d_mlp, vocab = cfg.d_model, cfg.d_head, cfg.d_mlp or 0, cfg.d_vocab
    yield whole("gpt_neox.embed_in.weight", (vocab, d), "embed.W_E")
    for number, name in enumerate(cfg.layout.physical_names()):
        key, attn, mlp = f"gpt_neox.layers.{number}", f"{name}.attn", f"{name}.mlp"
        for stored, norm in (("input_layernorm", "ln1"), ("post_attention_layernorm", "ln2")):
            yield from feedforward.layer_norm(f"{key}.{stored}", f"{name}.{norm}", d)
        # Query, key and value of a head stand together, head by head.
        stored, heads = f"{key}.attention.query_key_value", cfg.n_heads
        weights, biases = feedforward.joined(cfg, name)
        yield fused(f"{stored}.weight", d, *weights, groups=heads)
        yield fused_bias(f"{stored}.bias", *biases, groups=heads)
        yield whole(f"{key}.attention.dense.weight", (d, d), f"{attn}.W_O", heads_out(e))
        yield whole(f"{key}.attention.dense.bias", (d,), f"{attn}.b_O")
        yield whole(f"{key}.mlp.dense_h_to_4h.weight", (d_mlp, d), f"{mlp}.W_in", transposed)
        yield whole(f"{key}.mlp.dense_h_to_4h.bias", (d_mlp,), f"{mlp}.b_in")
        yield whole(f"{key}.mlp.dense_4h_to_h.weight", (d, d_mlp), f"{mlp}.W_out", transposed)
        yield whole(f"{key}.mlp.dense_4h_to_h.bias", (d,), f"{mlp}.b_out")
    yield from feedforward.layer_norm("gpt_neox.final_layer_norm", "ln_final", d)
    if not cfg.tie_word_embeddings:
        yield whole("embed_out.weight", (vocab, d), "unembed.W_U", transposed)


GPT_NEOX = Family(
    name="gpt-neox",
    paper="2204.06745",
    model_types=("gpt_neox",),
    architectures=("GPTNeoXForCausalLM",),
    fields={
        "d_model": read("hidden_size"),
        "n_heads": read("num_attention_heads"),
        "d_mlp": read("intermediate_size"),
        "d_vocab": read("vocab_size"),
        "n_ctx": read("max_position_embeddings"),
        "n_core": read("num_hidden_layers"),
        "eps": read("layer_norm_eps", kind=float),
        "act_fn": read("hidden_act", kind=str),
        "parallel_attn_mlp": read("use_parallel_residual", kind=bool, default=True),
        "tie_word_embeddings": read("tie_word_embeddings", kind=bool, default=False),
    },
    fixed={
        **feedforward.FIXED,
        "normalization_type": "LN",
        "gated_mlp": False,
        "attn_bias": True,
        "mlp_bias": True,
        "default_prepend_bos": False,
    },
    flags={
        "hidden_act": ("gelu", "gelu_new", "relu", "silu"),
        "attention_bias": (True,),
    },
    without_effect={
        **dict.fromkeys(("hidden_dropout", "classifier_dropout"), "training only"),
        "is_decoder": "no encoder in this family",
    },
    derive=_derive,
    tensors=_tensors,
    ignored=feedforward.UNUSED_TABLES,
    tied=_TIED,
    spread=_spread,
    feedforward=True,
)
