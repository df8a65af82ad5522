"""Where a lens reads: points on the residual stream, by hook name, iteration and layer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tl_loops.layout.coordinate import Phase
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout

PointSet = Literal["blocks", "core", "states"]

_BLOCK = re.compile(r"^blocks\.(\d+)\.hook_(resid_pre|resid_mid|resid_post)$")
_ITERATION = re.compile(r"^iter\.(\d+)\.hook_(state_in|injected|state_out)$")
_LOOSE = ("hook_embed", "hook_injection", "hook_initial_state")
_IN_BLOCK = {"resid_pre": 0.0, "resid_mid": 0.3, "resid_post": 0.6}
_BEFORE_BLOCK = {
    "state_out": 0.35,
    "injection": 0.3,
    "initial_state": 0.25,
    "state_in": 0.2,
    "injected": 0.1,
}
"""How far a point lies behind the start of its block, and before that of the block it leads to."""


@dataclass(frozen=True)
class LensPoint:
    """One place on the residual stream.

    Attributes:
        name: Canonical hook name; block indices count for one number of iterations.
        alias: The same by coordinate (``iter.3.0.hook_resid_post``), valid for any number.
        label: Short label for plots.
        kind: ``"resid_pre"``, ``"resid_mid"``, ``"resid_post"``, ``"state_in"``, ``"injected"``,
            ``"state_out"``, ``"embed"``, ``"initial_state"`` or ``"injection"``.
        phase: Phase of the block; ``"core"`` between iterations; ``None`` outside of both.
        iteration: Iteration in the core, else ``None``.
        layer: Layer inside the phase; ``None`` between iterations.
        block: Index of the unrolled block; ``None`` between iterations.
        depth: Place in the computation: a point depends on those of smaller depth alone.
    """

    name: str
    alias: str
    label: str
    kind: str
    phase: Phase | None = None
    iteration: int | None = None
    layer: int | None = None
    block: int | None = None
    depth: float = 0.0

    @property
    def series(self) -> tuple[str, Phase | None, int | None]:
        """Points of one series differ in their iteration alone."""
        return self.kind, self.phase, self.layer


def select_points(model: Model, points: PointSet | str | Sequence[str]) -> tuple[LensPoint, ...]:
    """The points that a lens reads.

    Args:
        model: A model with a layout.
        points: ``"blocks"``: behind every unrolled block. ``"core"``: behind every core block.
            ``"states"``: the state that leaves each iteration. Or hook names of the residual
            stream, canonical or by coordinate (``"iter.3.0.hook_resid_mid"``).

    Returns:
        The points in the order in which they are named.

    Raises:
        HookNameError: The model has no such hook point.
        ValueError: No point, one twice, or a hook point that is not on the residual stream.
    """
    layout = require_layout(model)
    if points == "states":
        names = [f"iter.{t}.hook_state_out" for t in range(layout.n_iterations)]
    elif points in ("blocks", "core"):
        inside = points == "core"
        first, last = (layout.core_start, layout.coda_start) if inside else (0, layout.n_layers)
        names = [f"blocks.{index}.hook_resid_post" for index in range(first, last)]
    elif isinstance(points, str):
        names = [model.hook_name(points)]
    else:
        names = [model.hook_name(name) for name in points]
    if not names:
        raise ValueError("points is empty: give 'blocks', 'core', 'states' or hook names")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"points names {twice} twice")
    return tuple(_point(layout, name) for name in names)


def _point(layout: LoopLayout, name: str) -> LensPoint:
    block, between = _BLOCK.match(name), _ITERATION.match(name)
    if block is not None:
        index, kind = int(block.group(1)), block.group(2)
        at = layout.coordinate(index)
        label = layout.label(index) + ("" if kind == "resid_post" else f" {kind}")
        return LensPoint(
            name,
            layout.alias(name),
            label,
            kind,
            at.phase,
            at.iteration,
            at.layer,
            index,
            index + _IN_BLOCK[kind],
        )
    if between is not None:
        t, kind = int(between.group(1)), between.group(2)
        label = f"r{t}" + ("" if kind == "state_out" else f" {kind}")
        blocks = layout.iteration_blocks(t)
        following = blocks.stop if kind == "state_out" else blocks.start
        depth = following - _BEFORE_BLOCK[kind]
        return LensPoint(name, name, label, kind, "core", t, depth=depth)
    if name in _LOOSE:
        kind = name.removeprefix("hook_")
        depth = -1.0 if kind == "embed" else layout.core_start - _BEFORE_BLOCK[kind]
        return LensPoint(name, name, kind, kind, depth=depth)
    raise ValueError(
        f"{name} is not on the residual stream; a lens reads hook_resid_pre, hook_resid_mid and "
        "hook_resid_post of a block, hook_state_in, hook_injected and hook_state_out of an "
        f"iteration, {', '.join(_LOOSE[:-1])} and {_LOOSE[-1]}"
    )
