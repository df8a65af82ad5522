"""What the feedforward families share: models of one iteration, which loading may loop."""

from collections.abc import Iterator, Mapping
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import CheckpointError
from tl_loops.families.base import (
    Family,
    Field,
    Part,
    Released,
    TensorSpec,
    head_bias,
    heads_in,
    read,
    whole,
)
from tl_loops.families.shared import llama
from tl_loops.families.shared.rotary import rotary_fields

FIELDS: dict[str, Field] = {
    **llama.LOOPED_FIELDS,
    "attn_bias": read("attention_bias", kind=bool, default=False),
}

FIXED: dict[str, Any] = {**llama.LOOPED_FIXED, "n_iterations": 1}

BIASES: dict[str, tuple[Any, ...]] = {"attention_bias": (False, True)}
"""Of families whose attention may have biases."""

UNUSED_TABLES = ("*.rotary_emb.inv_freq", "*.attention.bias", "*.attention.masked_bias")
"""Buffers that older files hold: frequencies that the config gives, and causal masks."""


def derive(released: Released) -> dict[str, Any]:
    """The width of a head, and the rotation.

    Raises:
        CheckpointError: They are not implemented, or a layer does not see every earlier position.
    """
    llama.check_layer_types(released)
    return {"d_head": llama.head_width(released), **rotary_fields(released)}


def of_llama_kind(
    name: str, paper: str, prefix: str, fixed: Mapping[str, Any] | None = None, **differences: Any
) -> Family:
    """A family whose layers stand under the names of Hugging Face's Llama.

    Args:
        name: Of the family, and its model type.
        paper: Where it is described.
        prefix: What the name of its class in transformers begins with.
        fixed: Config fields beside :data:`FIXED`.
        **differences: What :class:`Family` has otherwise.
    """
    usual: dict[str, Any] = {"derive": derive, "tensors": llama.looped_stack, "flags": llama.FLAGS}
    return Family(
        name=name,
        paper=paper,
        model_types=(name,),
        architectures=(f"{prefix}ForCausalLM",),
        fields=FIELDS,
        fixed={**FIXED, **(fixed or {})},
        ignored=UNUSED_TABLES,
        tied=llama.TIED,
        feedforward=True,
        **{**usual, **differences},
    )


def divided(released: Released, width: str, heads: str) -> int:
    """The width of a head, as the model's width by the number of heads.

    Args:
        released: Content of ``config.json``.
        width: Key of the model's width.
        heads: Key of the number of heads.

    Raises:
        CheckpointError: It is no multiple.
    """
    if not released[heads] or released[width] % released[heads]:
        raise CheckpointError(
            f"{width!r} = {released[width]} is no multiple of {heads!r} = {released[heads]}"
        )
    return released[width] // released[heads]


def joined(cfg: LoopedTransformerConfig, name: str) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Weights and biases of queries, keys and values, where one tensor holds them.

    Args:
        cfg: The config.
        name: Of the physical layer, e.g. ``"core.0"``.
    """
    d, e = cfg.d_model, cfg.d_head
    weights = tuple(Part(f"{name}.attn.W_{x}", d, heads_in(e)) for x in "QKV")
    return weights, tuple(Part(f"{name}.attn.b_{x}", d, head_bias(e)) for x in "QKV")


def layer_norm(key: str, name: str, d: int) -> Iterator[TensorSpec]:
    """Gain and bias of a LayerNorm.

    Args:
        key: Of the stored norm.
        name: Of the norm in the model.
        d: Its length.
    """
    yield whole(f"{key}.weight", (d,), f"{name}.w")
    yield whole(f"{key}.bias", (d,), f"{name}.b")
