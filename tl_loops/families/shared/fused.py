"""Layers that store the projections of attention, and of the gated MLP, joined."""

from collections.abc import Iterator, Sequence

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.families.base import (
    Part,
    TensorSpec,
    fused,
    heads_in,
    heads_out,
    transposed,
    whole,
)


def layer(
    cfg: LoopedTransformerConfig,
    key: str,
    name: str,
    attention: str,
    joined: str,
    weights: Sequence[str],
) -> Iterator[TensorSpec]:
    """The tensors of one layer without norms, whose heads all have keys and values of their own.

    Args:
        cfg: The config.
        key: Of the stored layer, e.g. ``"model.layers.0"``.
        name: Of the physical layer, e.g. ``"core.0"``.
        attention: Stored name of the attention, e.g. ``"self_attn"``.
        joined: Stored name of the joined projection, e.g. ``"qkv_proj"``.
        weights: Its parts, in order.
    """
    d, d_mlp, e = cfg.d_model, cfg.d_mlp or 0, cfg.d_head
    width, attn, mlp = cfg.n_heads * e, f"{key}.{attention}", f"{key}.mlp"
    parts = (Part(f"{name}.attn.{weight}", width, heads_in(e)) for weight in weights)
    yield fused(f"{attn}.{joined}.weight", d, *parts)
    yield whole(f"{attn}.o_proj.weight", (d, width), f"{name}.attn.W_O", heads_out(e))
    yield fused(
        f"{mlp}.gate_up_proj.weight",
        d,
        Part(f"{name}.mlp.W_gate", d_mlp, transposed),
        Part(f"{name}.mlp.W_in", d_mlp, transposed),
    )
    yield whole(f"{mlp}.down_proj.weight", (d, d_mlp), f"{name}.mlp.W_out", transposed)
