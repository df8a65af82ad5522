"""What all blocks of one forward pass share: positions, rotations and the attention mask."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_loops.nn.rotary import RotaryTable


@dataclass(frozen=True)
class ForwardContext:
    """Per-call facts that do not depend on the block.

    Attributes:
        positions: Absolute position of each new token; left padding does not count.
        cos: Rotary cosines of the new tokens, by rotated dimension; ``None`` without rotations.
        sin: Their sines, with a minus in the first dimension of a pair.
        allowed: Which key each query may see; ``None`` when plain causal (or unmasked) attention
            without cached keys says it all.
        causal: With ``allowed=None``: whether attention is causal.
        blind: Queries that see no key at all (padding); their attention output is zero.
        tokens: The new tokens, where they are known.
        n_past: Tokens in the key-value cache.
        notes: What mechanisms tell the core block that this is for, by their names.
    """

    positions: Int[Tensor, "batch pos"]
    cos: Float[Tensor, "batch pos 1 rotary"] | None
    sin: Float[Tensor, "batch pos 1 rotary"] | None
    allowed: Bool[Tensor, "#batch 1 query key"] | None
    causal: bool
    blind: Bool[Tensor, "batch 1 query 1"] | None
    tokens: Int[Tensor, "batch pos"] | None = None
    n_past: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)


def make_context(
    batch: int,
    n_new: int,
    n_past: int,
    attention_mask: Int[Tensor, "batch key"] | Bool[Tensor, "batch key"] | None,
    causal: bool,
    rotary: RotaryTable | None,
    device: torch.device,
    tokens: Int[Tensor, "batch pos"] | None = None,
    prefix_mask: Bool[Tensor, "batch pos"] | None = None,
) -> ForwardContext:
    """Positions and masks for ``n_new`` tokens after ``n_past`` cached ones.

    Args:
        batch: Batch size.
        n_new: Tokens in this call.
        n_past: Tokens in the key-value cache.
        attention_mask: 1 for tokens, 0 for padding, over past and new tokens.
        causal: Whether a token sees only itself and earlier ones.
        rotary: Table of rotations, if the model has rotary positions.
        device: Where the masks are made.
        tokens: The new tokens, where they are known.
        prefix_mask: New tokens that see each other in both directions.

    Raises:
        ValueError: The mask's shape is not [batch, past + new].
    """
    n_keys = n_past + n_new
    if attention_mask is not None:
        if tuple(attention_mask.shape) != (batch, n_keys):
            raise ValueError(
                f"attention_mask must be [batch, past + new tokens] = ({batch}, {n_keys}), "
                f"got {tuple(attention_mask.shape)}"
            )
        attention_mask = attention_mask.to(device).bool()
        if bool(attention_mask.all()):
            attention_mask = None
    if attention_mask is None:
        positions = torch.arange(n_past, n_keys, device=device).expand(batch, n_new)
    else:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, n_past:]
    cos, sin = rotary(positions) if rotary is not None else (None, None)

    allowed = blind = None
    masked = attention_mask is not None or prefix_mask is not None
    if masked or (causal and n_past > 0 and n_new > 1):
        allowed = torch.ones(1, 1, n_new, n_keys, dtype=torch.bool, device=device)
        if causal:
            allowed = allowed.tril(diagonal=n_past)
            if prefix_mask is not None:
                allowed = allowed | (prefix_mask[:, None, :, None] & prefix_mask[:, None, None, :])
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None, None, :]
            sees_any = allowed.any(-1, keepdim=True)
            blind = None if bool(sees_any.all()) else ~sees_any
        allowed = allowed.expand(batch, 1, n_new, n_keys)
    # One new token after a cache sees every key: neither mask nor causality is needed.
    causal = causal and not (n_past > 0 and n_new == 1)
    return ForwardContext(positions, cos, sin, allowed, causal, blind, tokens, n_past)
