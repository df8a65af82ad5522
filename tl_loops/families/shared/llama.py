"""Layers under the names of Hugging Face's Llama, which several families share."""

from collections.abc import Iterator, Mapping
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.config.weights import key_value_name
from tl_loops.errors import CheckpointError
from tl_loops.families.base import (
    Field,
    Released,
    TensorSpec,
    checked,
    head_bias,
    heads_in,
    heads_out,
    read,
    transposed,
    whole,
)

NORMS = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}
TIED = ("lm_head.weight", "model.embed_tokens.weight")

FIELDS: dict[str, Field] = {
    "d_model": read("hidden_size"),
    "n_heads": read("num_attention_heads"),
    "n_key_value_heads": read("num_key_value_heads", default=None),
    "d_mlp": read("intermediate_size"),
    "d_vocab": read("vocab_size"),
    "n_ctx": read("max_position_embeddings"),
    "eps": read("rms_norm_eps", kind=float),
    "tie_word_embeddings": read("tie_word_embeddings", kind=bool, default=False),
}

LOOPED_FIELDS: dict[str, Field] = {**FIELDS, "n_core": read("num_hidden_layers")}
"""Of models whose layers are all in the loop."""

LOOPED_FIXED: dict[str, Any] = {
    "block_norm": "pre",
    "initial_state": "embed",
    "rotary_layout": "half",
    "default_prepend_bos": True,
}

FLAGS = {"hidden_act": ("silu", "swish"), "use_sliding_window": (False,)}


def head_width(released: Released) -> int:
    """``head_dim``, else the width by the number of heads.

    Raises:
        CheckpointError: It is missing and the width is no multiple.
    """
    width, heads = released["hidden_size"], released["num_attention_heads"]
    d_head = released.get("head_dim")
    if d_head is None:
        if heads == 0 or width % heads:
            raise CheckpointError(
                f"'head_dim' is missing and 'hidden_size' = {width} is no multiple of "
                f"'num_attention_heads' = {heads}"
            )
        d_head = width // heads
    return checked("head_dim", d_head, int, above_zero=True)


def check_layer_types(released: Released) -> None:
    """Raise on layers that do not attend to everything before them.

    Raises:
        CheckpointError: There is one.
    """
    layer_types = released.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise CheckpointError(
            f"'layer_types' is {layer_types!r}, which is not implemented; "
            "expected 'full_attention' for every layer"
        )


def layer(
    cfg: LoopedTransformerConfig, key: str, name: str, norms: Mapping[str, str] = NORMS
) -> Iterator[TensorSpec]:
    """The tensors of one layer.

    Args:
        cfg: The config.
        key: Of the stored layer, e.g. ``"model.layers.0"``.
        name: Of the physical layer, e.g. ``"core.0"``.
        norms: The layer's norms by stored name.
    """
    d, d_mlp, e = cfg.d_model, cfg.d_mlp or 0, cfg.d_head
    q_width, kv_width = cfg.n_heads * e, (cfg.n_key_value_heads or cfg.n_heads) * e
    W_K, W_V = key_value_name(cfg, "W_K"), key_value_name(cfg, "W_V")
    for stored, norm in norms.items():
        yield whole(f"{key}.{stored}.weight", (d,), f"{name}.{norm}.w")
    attn, mlp = f"{key}.self_attn", f"{key}.mlp"
    yield whole(f"{attn}.q_proj.weight", (q_width, d), f"{name}.attn.W_Q", heads_in(e))
    yield whole(f"{attn}.k_proj.weight", (kv_width, d), f"{name}.attn.{W_K}", heads_in(e))
    yield whole(f"{attn}.v_proj.weight", (kv_width, d), f"{name}.attn.{W_V}", heads_in(e))
    yield whole(f"{attn}.o_proj.weight", (d, q_width), f"{name}.attn.W_O", heads_out(e))
    if cfg.qk_bias or cfg.attn_bias:
        b_K = key_value_name(cfg, "b_K")
        yield whole(f"{attn}.q_proj.bias", (q_width,), f"{name}.attn.b_Q", head_bias(e))
        yield whole(f"{attn}.k_proj.bias", (kv_width,), f"{name}.attn.{b_K}", head_bias(e))
    if cfg.value_bias or cfg.attn_bias:
        b_V = key_value_name(cfg, "b_V")
        yield whole(f"{attn}.v_proj.bias", (kv_width,), f"{name}.attn.{b_V}", head_bias(e))
    if cfg.attn_bias:
        yield whole(f"{attn}.o_proj.bias", (d,), f"{name}.attn.b_O")
    if cfg.qk_norm == "full":
        yield whole(f"{attn}.q_norm.weight", (q_width,), f"{name}.attn.q_norm.w")
        yield whole(f"{attn}.k_norm.weight", (kv_width,), f"{name}.attn.k_norm.w")
    if cfg.qk_norm == "head_weight" and cfg.norm_has_weight:
        yield whole(f"{attn}.q_norm.weight", (e,), f"{name}.attn.q_norm.w")
        yield whole(f"{attn}.k_norm.weight", (e,), f"{name}.attn.k_norm.w")
    yield whole(f"{mlp}.gate_proj.weight", (d_mlp, d), f"{name}.mlp.W_gate", transposed)
    yield whole(f"{mlp}.up_proj.weight", (d_mlp, d), f"{name}.mlp.W_in", transposed)
    yield whole(f"{mlp}.down_proj.weight", (d, d_mlp), f"{name}.mlp.W_out", transposed)


def looped_stack(
    cfg: LoopedTransformerConfig, norms: Mapping[str, str] = NORMS
) -> Iterator[TensorSpec]:
    """The tensors of a whole model: its layers in the order of the data flow.

    Args:
        cfg: The config.
        norms: The layers' norms by stored name.
    """
    d, vocab = cfg.d_model, cfg.d_vocab
    yield whole("model.embed_tokens.weight", (vocab, d), "embed.W_E")
    for number, name in enumerate(cfg.layout.physical_names()):
        yield from layer(cfg, f"model.layers.{number}", name, norms)
    yield whole("model.norm.weight", (d,), "ln_final.w")
    if not cfg.tie_word_embeddings:
        yield whole("lm_head.weight", (vocab, d), "unembed.W_U", transposed)
