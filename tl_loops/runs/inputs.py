"""What an analysis is run on: tokens, mask, forward arguments, positions; checked beforehand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_loops.arguments import argument
from tl_loops.errors import shortened
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import layout_of
from tl_loops.layout.selection import Selection, distinct_indices
from tl_loops.upstream import Cache, TextOrTokens, attention_needs, model_input

FORWARD_ARGUMENTS = (
    "attention_mask",
    "initial_state",
    "exit_at",
    "exit_threshold",
    "weighted_exit",
)
"""Arguments of the model's forward pass that every run can be given."""

_FORWARD_KINDS: dict[str, Any] = {
    "attention_mask": Shaped[Tensor, "..."],
    "initial_state": Float[Tensor, "batch pos d_model"],
    "exit_at": int,
    "exit_threshold": float,
    "weighted_exit": bool,
}

# Indices are checked below, with messages of their own.
Positions = int | Sequence[int] | Tensor | Literal["all", "last"]


@dataclass(frozen=True, eq=False)
class RunInputs:
    """Prompts and the forward arguments that every run of them gets.

    Attributes:
        tokens: Token ids, [batch, pos].
        mask: True at real tokens, False at padding; ``None``: no padding.
        attention_mask: The mask, where attention is given it; not for right padding of a causal
            model, unless the caller gave the mask.
        initial_state: State before iteration 0, [batch, pos, d_model]; ``None``: the model's rule.
        exits: ``exit_at``, ``exit_threshold`` and ``weighted_exit``, where they are given.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"] | None = None
    attention_mask: Bool[Tensor, "batch pos"] | None = None
    initial_state: Float[Tensor, "batch pos d_model"] | None = None
    exits: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of prompts and of positions."""
        return (self.tokens.shape[0], self.tokens.shape[1])

    @property
    def forward_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward pass on these prompts."""
        given = {"attention_mask": self.attention_mask, "initial_state": self.initial_state}
        return {name: value for name, value in given.items() if value is not None} | dict(
            self.exits
        )


def run_inputs(
    model: Model, input: TextOrTokens, arguments: Mapping[str, Any] | None = None
) -> RunInputs:
    """Tokenise, find the padding, and check the forward arguments of every run.

    Args:
        model: A looped model or a plain HookedTransformer.
        input: Text, or tokens [batch, pos] or [pos].
        arguments: Some of :data:`FORWARD_ARGUMENTS`.

    Raises:
        ValueError: Prompts that cannot be fed, or an argument that is unknown or does not fit.
    """
    given = dict(arguments or {})
    for name in given:
        if name not in FORWARD_ARGUMENTS:
            hint = (
                "run the whole call inside `with model.iterations(n):`"
                if name == "n_iterations"
                else f"those that are: {', '.join(FORWARD_ARGUMENTS)}"
            )
            raise ValueError(f"{name!r} is not an argument of the patched runs; {hint}")
        if layout_of(model) is None and name != "attention_mask":
            raise ValueError(f"{name!r} needs a looped model")
    given = _of_their_kinds(given)
    explicit = given.pop("attention_mask", None)
    fed = model_input(model, input, explicit)
    needed = explicit is not None or attention_needs(fed.mask, model.cfg)
    initial_state = given.pop("initial_state", None)
    _check_initial_state(model, fed.tokens, initial_state)
    # exit_at=0 is the first iteration, not a flag that is off.
    exits = {name: v for name, v in given.items() if v is not None and v is not False}
    attention_mask = fed.mask if needed else None
    return RunInputs(fed.tokens, fed.mask, attention_mask, initial_state, exits)


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

    def rows(self, rows: slice | Int[Tensor, "row"]) -> "LensInputs":
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
    input: TextOrTokens,
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
    given = {"attention_mask": attention_mask, "initial_state": initial_state}
    given = _of_their_kinds(given)
    fed = model_input(model, input, given["attention_mask"])
    initial_state = given["initial_state"]
    tokens, mask = fed.tokens, fed.mask
    _check_initial_state(model, tokens, initial_state)
    return LensInputs(tokens, mask, resolve_positions(positions, tokens, mask), initial_state)


def real_positions(
    cache: Cache, batch: int, n_pos: int, pos: Selection | None = None
) -> Bool[Tensor, "batch pos"]:
    """Which positions of a cached run a selection names, counted along each prompt's real tokens.

    Args:
        cache: A cache; its ``mask``, where it has one, tells real tokens from padding.
        batch: Number of prompts in it.
        n_pos: Number of positions in it.
        pos: Which of each prompt's real tokens, so that -1 is its last; ``None``: all.

    Returns:
        True at what is chosen, on the CPU.

    Raises:
        IndexError: A prompt has no such token.
        ValueError: The selection is empty.
    """
    mask = getattr(cache, "mask", None)
    real = torch.ones(batch, n_pos, dtype=torch.bool)
    if mask is not None:
        real = mask.cpu().reshape(batch, n_pos)
    if pos is None:
        return real
    chosen = torch.zeros_like(real)
    for row in range(batch):
        (where,) = real[row].nonzero(as_tuple=True)
        index = distinct_indices("pos", len(where), pos)
        chosen[row, where[list(index)]] = True
    return chosen


def _of_their_kinds(given: Mapping[str, Any]) -> dict[str, Any]:
    """Forward arguments, each of its kind or left out."""
    return {
        name: value if value is None else argument(name, value, _FORWARD_KINDS[name])
        for name, value in given.items()
    }


def _check_initial_state(model: Model, tokens: Tensor, initial_state: Tensor | None) -> None:
    expected = (*tokens.shape, model.cfg.d_model)
    if initial_state is not None and tuple(initial_state.shape) != expected:
        raise ValueError(
            f"initial_state must be [batch, pos, d_model] = {expected}, "
            f"got {tuple(initial_state.shape)}"
        )


def resolve_positions(
    positions: Positions, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"] | None
) -> Int[Tensor, "batch read"]:
    """Positions of each prompt, counted from 0 along the row.

    Args:
        positions: As in :func:`lens_inputs`.
        tokens: Of the prompts.
        mask: True at real tokens; ``None``: no padding.

    Raises:
        ValueError: A shape or a position does not fit.
    """
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
    try:
        index = torch.as_tensor(positions, device=tokens.device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(
            f"positions must be 'all', 'last' or indices, got {shortened(positions)}"
        ) from None
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
