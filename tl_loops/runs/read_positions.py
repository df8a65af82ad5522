"""Logits only where they are read: the unembedding is asked for no other position.

A vocabulary of 49,152 words times every position of every cell is what fills a GPU.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.layout.model import Model
from tl_loops.runs.cells import after_prefix


@contextmanager
def logits_only_at(model: Model, positions: Int[Tensor, "batch read"]) -> Iterator[None]:
    """Within, runs give logits [batch, read, d_vocab], of each prompt's own positions.

    What stands before the unembedding is run at all positions, so its hooks see all of them. Not
    for logits that are weighted by position after the unembedding (``weighted_exit``).
    """

    def select(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_at(given[0], positions), *given[1:])

    handle = model.unembed.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


class ReadPositions:
    """Where the logits of runs are read.

    Args:
        positions: Of each prompt, counted from 0; ``None``: all.
        arguments: Forward arguments of the runs.
    """

    def __init__(
        self,
        positions: Int[Tensor, "batch read"] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ):
        self.positions = positions
        self.late = bool((arguments or {}).get("weighted_exit"))

    def n_read(self, n_pos: int) -> int:
        """How many positions of a prompt are read."""
        return n_pos if self.positions is None else self.positions.shape[1]

    def run(
        self, model: Model, call: Callable[[], Tensor], n_cells: int = 1, n_past: int = 0
    ) -> Tensor:
        """What a call of the model gives, with logits at the positions that are read.

        Args:
            model: Which is called.
            call: Calls it on ``n_cells`` copies of the prompts.
            n_cells: Copies of the prompts.
            n_past: Positions in front that the call leaves out; those that are read of them give
                numbers without meaning.
        """
        if self.positions is None:
            return call()
        index = (self.positions - n_past).clamp(min=0).repeat(n_cells, 1)
        if self.late:
            return _at(call(), index)
        with logits_only_at(model, index):
            return call()

    def whole(
        self,
        base: Float[Tensor, "batch read d_vocab"],
        n_past: int,
        new: Float[Tensor, "batch new d_vocab"],
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Logits of a cell: those of the base run in the first positions, then its own."""
        if self.positions is None or not n_past:
            return after_prefix(base, n_past, new)
        return torch.where((self.positions < n_past).unsqueeze(-1).to(new.device), base, new)


def _at(x: Float[Tensor, "batch pos d"], positions: Int[Tensor, "batch read"]) -> Tensor:
    rows = torch.arange(x.shape[0], device=x.device).unsqueeze(-1)
    return x[rows, positions.to(x.device)]
