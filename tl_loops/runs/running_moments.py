"""Moments of batches: what a run keeps of each, and how they add up, always in one order."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.errors import CheckpointError
from tl_loops.runs.moments import Moments

_COUNTS = "counts"


def batch_moments(
    values: Mapping[str, Float[Tensor, "*shape sample"]], counts: Sequence[int]
) -> dict[str, Tensor]:
    """What a run keeps of one batch: the moments of each quantity over its samples, and counts.

    Args:
        values: Samples along the last axis, by the name of the quantity.
        counts: Numbers that are summed over batches, such as that of prompts.
    """
    tensors = {_COUNTS: torch.tensor(list(counts))}
    for quantity, samples in values.items():
        for name, tensor in Moments.of(samples).tensors().items():
            tensors[f"{quantity}.{name}"] = tensor
    return tensors


class RunningMoments:
    """The moments of batches so far. Batches in one order always give the same bits.

    Args:
        shapes: Shape of each quantity.
        n_counts: How many counts each batch has.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], n_counts: int):
        self.moments = {name: Moments.empty(*shape) for name, shape in shapes.items()}
        self._counts = torch.zeros(n_counts, dtype=torch.int64)

    @property
    def counts(self) -> list[int]:
        """Sum of each count."""
        return self._counts.tolist()

    def add(self, number: int, batch: Mapping[str, Tensor]) -> None:
        """Add what :func:`batch_moments` kept of a batch.

        Raises:
            CheckpointError: It lacks numbers.
        """
        self._counts = self._counts + _checked(batch, number, _COUNTS, self._counts)
        for quantity, before in self.moments.items():
            parts = {
                name: _checked(batch, number, f"{quantity}.{name}", like)
                for name, like in before.tensors().items()
            }
            self.moments[quantity] = before.merge(Moments(**parts))


def _checked(batch: Mapping[str, Tensor], number: int, name: str, like: Tensor) -> Tensor:
    found = batch.get(name)
    if found is None or found.shape != like.shape or found.dtype != like.dtype:
        raise CheckpointError(
            f"batch {number} of the run does not hold {name} as {like.dtype} of shape "
            f"{list(like.shape)}: delete its file, or give another path"
        )
    return found
