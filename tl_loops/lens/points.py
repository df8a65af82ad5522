"""Where a lens reads: points on the residual stream, by hook name, iteration and layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tl_loops.layout.coordinate import Phase
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.layout.names import Place, hook_specs, spec_of
from tl_loops.layout.of_model import require_layout

PointSet = Literal["blocks", "core", "states"]

_IN_BLOCK = {"resid_pre": 0.0, "resid_mid": 0.3, "resid_post": 0.6}
_BEFORE_BLOCK = {
    "state_out": 0.35,
    "injection": 0.3,
    "initial_state": 0.25,
    "state_in": 0.2,
    "injected": 0.1,
}
"""How far a point lies after the start of its block, and before that of the block it leads to."""

_WHERE: dict[Place, str] = {"block": "of a block", "iteration": "of an iteration", "run": "once"}


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
        points: ``"blocks"``: after every unrolled block. ``"core"``: after every core block.
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
    spec = spec_of(name)
    if spec is None or not spec.residual:
        said = "; ".join(
            f"{', '.join(row.name for row in hook_specs(place) if row.residual)} {where}"
            for place, where in _WHERE.items()
        )
        raise ValueError(f"{name} is not on the residual stream; a lens reads {said}")
    kind = spec.short
    if spec.place == "run":
        depth = -1.0 if kind == "embed" else layout.core_start - _BEFORE_BLOCK[kind]
        return LensPoint(name, name, kind, kind, depth=depth)
    number = int(name.split(".")[1])
    if spec.place == "iteration":
        label = f"r{number}" + ("" if kind == "state_out" else f" {kind}")
        blocks = layout.iteration_blocks(number)
        following = blocks.stop if kind == "state_out" else blocks.start
        depth = following - _BEFORE_BLOCK[kind]
        return LensPoint(name, name, label, kind, "core", number, depth=depth)
    at = layout.coordinate(number)
    label = layout.label(number) + ("" if kind == "resid_post" else f" {kind}")
    where = (at.phase, at.iteration, at.layer, number, number + _IN_BLOCK[kind])
    return LensPoint(name, layout.alias(name), label, kind, *where)
