"""From the batches of a measurement to the parts of a profile: what is kept, and how it adds up."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.errors import CheckpointError
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.segments import Segment
from tl_loops.measurements.provenance import Provenance
from tl_loops.runs.batch_file import SavedRun
from tl_loops.runs.in_batches import Batch
from tl_loops.runs.moments import Moments

KIND = "measurement"
_SIZE = "n_prompts, n_tokens"
_LAYOUT = ("n_prelude", "n_core", "n_coda", "n_iterations", "stacks", "shared_stacks")

Parts = tuple[dict[str, Moments], LoopLayout | None, Provenance]
"""Moments, layout and provenance: what a profile is made of."""


def batch_result(
    values: Mapping[str, Float[Tensor, "block batch"]], n_prompts: int, n_tokens: int
) -> dict[str, Tensor]:
    """What a run keeps of one batch: the moments of each metric, and how many prompts it had."""
    tensors = {_SIZE: torch.tensor([n_prompts, n_tokens])}
    for metric, samples in values.items():
        for name, tensor in Moments.of(samples).tensors().items():
            tensors[f"{metric}.{name}"] = tensor
    return tensors


class AddedUp:
    """The moments of batches, added up in the order in which they come.

    Args:
        blocks: Unrolled blocks that get a value, by metric.
        n_layers: Unrolled depth.
    """

    def __init__(self, blocks: Mapping[str, Sequence[int]], n_layers: int):
        self.blocks, self.n_layers = blocks, n_layers
        self._moments = {name: Moments.empty(len(at)) for name, at in blocks.items()}
        self._size = torch.zeros(2, dtype=torch.int64)

    def add(self, number: int, batch: Batch) -> None:
        """Add a batch.

        Raises:
            CheckpointError: It lacks numbers of a metric.
        """
        for metric, before in self._moments.items():
            parts = {}
            for name, like in before.tensors().items():
                part = batch.get(f"{metric}.{name}")
                if part is None or part.shape != like.shape or part.dtype != like.dtype:
                    raise CheckpointError(
                        f"batch {number} does not hold {name} of {metric} as {like.numel()} "
                        f"numbers of {like.dtype}; delete its file, or give another path"
                    )
                parts[name] = part
            self._moments[metric] = before.merge(Moments(**parts))
        self._size = self._size + batch[_SIZE]

    @property
    def n_prompts(self) -> int:
        """Number of prompts so far."""
        return int(self._size[0])

    @property
    def n_tokens(self) -> int:
        """Number of tokens so far."""
        return int(self._size[1])

    def moments(self) -> dict[str, Moments]:
        """Moments [n_layers] by metric."""
        return {
            name: moments.scattered(self.blocks[name], self.n_layers)
            for name, moments in self._moments.items()
        }


def about_run(
    layout: LoopLayout | None,
    n_layers: int,
    blocks: Mapping[str, Sequence[int]],
    fixed: Mapping[str, Any],
) -> dict[str, Any]:
    """What the file of a run says besides numbers, from which :func:`profile_parts` begins.

    Args:
        layout: Of the model; ``None`` for a feedforward model.
        n_layers: Unrolled depth.
        blocks: As in :class:`AddedUp`.
        fixed: Fields of the provenance that do not depend on the batches.
    """
    at = None if layout is None else _as_data(layout)
    return {"layout": at, "n_layers": n_layers, "blocks": blocks, "provenance": fixed}


def profile_parts(saved: SavedRun) -> Parts:
    """What the profile of a run, or of one of its shards, is made of.

    Raises:
        CheckpointError: It is no measurement, or lacks numbers.
    """
    if saved.run.kind != KIND:
        raise CheckpointError(f"{saved.name} is of a {saved.run.kind}, expected a {KIND}")
    about = saved.run.about
    added = AddedUp(about["blocks"], about["n_layers"])
    for number in sorted(saved.batches):
        added.add(number, saved.batches[number])
    layout = None if about["layout"] is None else _layout(about["layout"])
    what = {**about["provenance"], "n_prompts": added.n_prompts, "n_tokens": added.n_tokens}
    return added.moments(), layout, Provenance(**what)


def _as_data(layout: LoopLayout) -> dict[str, Any]:
    """A layout in JSON's types."""
    if layout.segments is not None:
        return {"segments": [astuple(s) for s in layout.segments], "n_coda": layout.n_coda}
    return {name: getattr(layout, name) for name in _LAYOUT}


def _layout(data: Mapping[str, Any]) -> LoopLayout:
    """What :func:`_as_data` described."""
    if "segments" in data:
        return LoopLayout.of_segments([Segment(*s) for s in data["segments"]], data["n_coda"])
    stacks = data["stacks"]
    return LoopLayout(**{**data, "stacks": None if stacks is None else tuple(stacks)})
