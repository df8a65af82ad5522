"""What a lens is run on: tokens, mask, and the positions that are read, checked before any pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_loops.layout.model import Model
from tl_loops.upstream import model_input

# Shapes are checked below, with messages of their own.
LensInput = str | list[str] | Tensor
Positions = int | Sequence[int] | Tensor | Literal["all", "last"]


@dataclass(frozen=True, eq=False)
class LensInputs:
    """Prompts as a lens reads them.

    Attributes:
        tokens: Token ids, [batch, pos].
        attention_mask: True at tokens, False at padding; ``None``: no padding.
        positions: Which position each row is read at, [batch, read].
        initial_state: State before iteration 0, [batch, pos, d_model]; ``None``: the model's rule.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"] | None
    positions: Int[Tensor, "batch read"]
    initial_state: Float[Tensor, "batch pos d_model"] | None = None

    def select(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch read d"]:
        """The vectors at the positions that are read."""
        rows = torch.arange(x.shape[0], device=x.device).unsqueeze(-1)
        return x[rows, self.positions.to(x.device)]

    def rows(self, rows: slice) -> "LensInputs":
        """The same for a part of the batch."""
        return LensInputs(
            self.tokens[rows],
            None if self.attention_mask is None else self.attention_mask[rows],
            self.positions[rows],
            None if self.initial_state is None else self.initial_state[rows],
        )

    @property
    def forward_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward pass on these prompts."""
        return {"attention_mask": self.attention_mask, "initial_state": self.initial_state}


def lens_inputs(
    model: Model,
    input: LensInput,
    positions: Positions,
    attention_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> LensInputs:
    """Tokenise, find the padding as the model's forward pass does, and resolve positions.

    Args:
        model: A looped model.
        input: Text, or tokens [batch, pos] or [pos].
        positions: ``"all"``; ``"last"``: the last real token of each prompt; one position or
            several (negative ones count from the end of the row); or [batch, read], for each
            prompt its own.
        attention_mask: [batch, pos], 1 at tokens, 0 at padding.
        initial_state: [batch, pos, d_model].

    Returns:
        The inputs, with positions counted from 0 along the row.

    Raises:
        ValueError: A shape or a position does not fit; a row without a real token; text for a
            model without tokenizer.
    """
    fed = model_input(model, input, attention_mask)
    tokens, mask = fed.tokens, fed.mask
    expected = (*tokens.shape, model.cfg.d_model)
    if initial_state is not None and tuple(initial_state.shape) != expected:
        raise ValueError(
            f"initial_state must be [batch, pos, d_model] = {expected}, "
            f"got {tuple(initial_state.shape)}"
        )
    return LensInputs(tokens, mask, _resolve(positions, tokens, mask), initial_state)


def _resolve(positions: Positions, tokens: Tensor, mask: Tensor | None) -> Tensor:
    batch, n_pos = tokens.shape
    if isinstance(positions, str):
        if positions not in ("all", "last"):
            raise ValueError(f"positions must be 'all', 'last' or indices, got {positions!r}")
        every = torch.arange(n_pos, device=tokens.device)
        if positions == "all":
            return every.expand(batch, n_pos)
        if mask is None:
            return every[-1:].expand(batch, 1)
        return (every * mask).amax(-1, keepdim=True)
    index = torch.as_tensor(positions, device=tokens.device)
    if not index.numel():
        raise ValueError("positions is empty")
    if index.is_floating_point() or index.dtype == torch.bool or index.ndim > 2:
        raise ValueError("positions must be integers: one, a list, or [batch, read]")
    index = index.long().reshape(1, -1) if index.ndim < 2 else index.long()
    if index.shape[0] not in (1, batch):
        raise ValueError(
            f"positions has shape {list(index.shape)}, expected indices for all prompts or "
            f"[{batch}, read]"
        )
    if int(index.min()) < -n_pos or int(index.max()) >= n_pos:
        raise ValueError(
            f"positions span {int(index.min())} to {int(index.max())}, but there are {n_pos} "
            "positions, counted from 0"
        )
    return (index % n_pos).expand(batch, index.shape[1])
