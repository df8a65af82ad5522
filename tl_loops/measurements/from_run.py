"""From the batches of a measurement to the parts of a profile."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

from tl_loops.errors import CheckpointError
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.segments import Segment
from tl_loops.measurements.provenance import Provenance
from tl_loops.runs.batch_file import SavedRun
from tl_loops.runs.moments import Moments
from tl_loops.runs.running_moments import RunningMoments

KIND = "measurement"
_SIZES = ("n_prelude", "n_core", "n_coda", "n_iterations")
_LAYOUT = (*_SIZES, "stacks", "shared_stacks", "layer_repeats")

Parts = tuple[dict[str, Moments], LoopLayout | None, Provenance]
"""Moments, layout and provenance: what a profile is made of."""


def empty_sums(blocks: Mapping[str, Sequence[int]]) -> RunningMoments:
    """Moments of no batch yet; counts are prompts and tokens.

    Args:
        blocks: Unrolled blocks that get a value, by metric.
    """
    return RunningMoments({name: (len(at),) for name, at in blocks.items()}, n_counts=2)


def scattered(
    added: RunningMoments, blocks: Mapping[str, Sequence[int]], n_layers: int
) -> dict[str, Moments]:
    """Moments [n_layers] by metric, empty at blocks without a value."""
    return {name: m.scattered(blocks[name], n_layers) for name, m in added.moments.items()}


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
        blocks: Unrolled blocks that get a value, by metric.
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
    added = empty_sums(about["blocks"])
    for number in sorted(saved.batches):
        added.add(number, saved.batches[number])
    moments = scattered(added, about["blocks"], about["n_layers"])
    layout = None if about["layout"] is None else _layout(about["layout"])
    n_prompts, n_tokens = added.counts
    what = {**about["provenance"], "n_prompts": n_prompts, "n_tokens": n_tokens}
    return moments, layout, Provenance(**what)


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
