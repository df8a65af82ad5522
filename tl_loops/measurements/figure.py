"""Depth profiles: by iteration, by layer and unrolled, as in arXiv 2604.11791 (section 4.1)."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tl_loops.arguments import checked
from tl_loops.drawing.colours import (
    CODA,
    MUTED,
    PRELUDE,
    REFERENCE,
    iteration_colours,
    layer_colours,
)
from tl_loops.drawing.depth import block_colours, depth_axis, iteration_rules, phase_spans
from tl_loops.drawing.draw import draw
from tl_loops.drawing.figure import Axis, Figure, Line, Mark, Panel, Span, as_array, every_few
from tl_loops.drawing.quantities import (
    ITERATION,
    RELATIVE_DEPTH,
    named,
    relative_depth_limits,
)
from tl_loops.drawing.subject import subject_of
from tl_loops.errors import shortened
from tl_loops.layout.layout import LoopLayout
from tl_loops.measurements.labels import metric_axis, metric_title, spans_decades

if TYPE_CHECKING:  # a profile draws itself by this
    from tl_loops.measurements.profile import LoopProfile

_GROUPINGS = {
    "iteration": "by iteration",
    "layer": "by layer",
    "unrolled": "along the unrolled depth",
}


@checked
def plot_profile(
    profile: "LoopProfile",
    metric: str | None = None,
    by: str = "iteration",
    *,
    std: bool = False,
    log: bool | None = None,
    title: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """One metric of a profile in one of the paper's three groupings.

    ``"iteration"``: one curve per iteration from green to yellow, over the relative depth of one
    pass; prelude and coda stand in front and after, shaded. ``"layer"``: one curve per core layer
    from blue to green, over the iterations; blocks of prelude and coda are points left and right.
    ``"unrolled"``: one curve over all blocks. A feedforward profile is always unrolled.

    Args:
        profile: From :func:`tl_loops.measure`.
        metric: Name of a metric; ``None``: the first one.
        by: The grouping.
        std: Whether a band shows one standard deviation over prompts to both sides.
        log: Whether the values' axis is logarithmic; ``None``: for distances and differences
            between iterations, which shrink by factors.
        title: In place of the metric's name and grouping.
        backend: ``"plotly"``, ``"matplotlib"`` or ``None`` (see :func:`tl_loops.plots.draw`).
        **options: ``width``, ``height``, and what the library takes.

    Returns:
        A figure of the library.

    Raises:
        ValueError: Unknown metric or grouping.
        TypeError: It is no profile.
        ImportError: The library is missing.
    """
    if not hasattr(profile, "moments"):
        raise TypeError(f"profile must be a LoopProfile, got {shortened(profile)}")
    metric = profile.metrics[0] if metric is None else metric
    if by not in _GROUPINGS:
        raise ValueError(f"by={by!r}, expected 'iteration', 'layer' or 'unrolled'")
    if profile.layout is None:
        by = "unrolled"
    if log is None:
        log = spans_decades(metric)
    panel = profile_panel(profile, metric, by, std, log)
    legend = {"iteration": "iteration", "layer": "core layer", "unrolled": ""}[by]
    figure = Figure(
        title or f"{metric_title(metric)} {_GROUPINGS[by]}",
        subject_of(profile).line(complete=title is None),
        (panel,),
        legend=legend,
        footnotes=("Bands: one standard deviation over prompts.",) if std else (),
    )
    return draw(figure, backend, **options)


def profile_panel(
    profile: "LoopProfile", metric: str, by: str, std: bool, log: bool, title: str = ""
) -> Panel:
    """The panel of :func:`plot_profile`; blocks where a metric has no value by nature are absent.

    Raises:
        ValueError: Unknown metric.
    """
    values = _Values(profile, metric, std)
    layout = profile.layout
    y = metric_axis(metric, log)
    if layout is None or by == "unrolled":
        marks, x = _unrolled(values, layout, profile.n_layers)
    elif by == "iteration":
        marks, x = _by_iteration(values, layout, as_array(profile.pass_depth))
    else:
        marks, x = _by_layer(values, layout)
    note = ""
    if not values.exists.any():
        note = f"Nothing to draw: no prompt has a value of {metric}."
    elif not np.isfinite(values.mean).any():
        note = f"Nothing to draw: {metric} is undefined (NaN) on every prompt."
    return Panel(tuple(marks), x, y, title=title, note=note)


class _Values:
    """Mean and deviation at each block, and words about each."""

    def __init__(self, profile: "LoopProfile", metric: str, std: bool):
        self.mean = as_array(profile.mean(metric))
        self.std = as_array(profile.std(metric))
        self.count = profile.count(metric).tolist()
        self.exists = as_array(profile.count(metric) + profile.undefined(metric)) > 0
        self.bands = std
        layout = profile.layout
        names = [str(block) for block in range(profile.n_layers)]
        self.names = names if layout is None else layout.labels()

    def line(self, blocks: list[int], x: Any, name: str, colour: str, **more: Any) -> Line:
        """The blocks that have a value, at some x."""
        at = np.asarray(blocks, dtype=int)
        x = as_array(x)[self.exists[at]] if len(at) else np.zeros(0)
        at = at[self.exists[at]]
        spread = np.nan_to_num(self.std[at]) if self.bands else None
        hover = [
            f"{self.names[b]}: {self.mean[b]:.4g} ± {self.std[b]:.2g} ({self.count[b]} prompts)"
            for b in at.tolist()
        ]
        return Line(x, self.mean[at], name, colour, spread=spread, hover=hover, **more)


def _unrolled(values: _Values, layout: LoopLayout | None, n_blocks: int) -> tuple[list[Mark], Axis]:
    blocks = list(range(n_blocks))
    axis = depth_axis(layout, n_blocks)
    if layout is None:
        return [values.line(blocks, blocks, "mean over prompts", REFERENCE)], axis
    marks: list[Mark] = [*phase_spans(layout), *iteration_rules(layout)]
    marks.append(
        values.line(
            blocks, blocks, "mean", MUTED, symbol=None, width=1.5, in_legend=False
        )
    )  # fmt: skip
    colours = block_colours(layout)
    by_colour: dict[str, list[int]] = {}
    for block in blocks:
        by_colour.setdefault(colours[block], []).append(block)
    values.bands = False
    for colour, members in by_colour.items():
        marks.append(
            values.line(members, members, colour, colour, joined=False, in_legend=False)
        )  # fmt: skip
    return marks, axis


def _by_iteration(
    values: _Values, layout: LoopLayout, depth: np.ndarray
) -> tuple[list[Mark], Axis]:
    T = layout.n_iterations
    marks: list[Mark] = list(pass_spans(layout, depth))
    in_legend = every_few(T)
    for t, colour in enumerate(iteration_colours(T)):
        name = f"iteration {t}"
        marks.append(
            values.line(layout.pass_blocks(t), depth, name, colour, in_legend=in_legend(t))
        )
    return marks, pass_axis(len(depth))


def pass_axis(places: int) -> Axis:
    """The relative depth in one pass, with room for prelude and coda at its ends."""
    axis = named(RELATIVE_DEPTH, "relative depth in one pass (%)")
    return replace(axis, limits=relative_depth_limits(places))


def pass_spans(layout: LoopLayout, depth: np.ndarray) -> tuple[Span, ...]:
    """Prelude and coda as shaded ranges of the relative depth."""
    first, last = relative_depth_limits(len(depth))
    edges = [first, *((depth[:-1] + depth[1:]) / 2).tolist(), last]
    spans = []
    if layout.n_prelude:
        spans.append(Span(edges[0], edges[layout.n_prelude], "prelude", PRELUDE))
    if layout.n_coda:
        spans.append(Span(edges[-1 - layout.n_coda], edges[-1], "coda", CODA))
    return tuple(spans)


def _by_layer(values: _Values, layout: LoopLayout) -> tuple[list[Mark], Axis]:
    T = layout.n_iterations
    marks: list[Mark] = []
    prelude = list(range(layout.n_prelude))
    coda = list(range(layout.coda_start, layout.n_layers))
    for blocks, place, side, colour in ((prelude, -1, "prelude", PRELUDE), (coda, T, "coda", CODA)):
        if values.exists[blocks].any():
            marks.append(Span(place - 0.5, place + 0.5, side, colour))
            x = torch.full((len(blocks),), float(place))
            marks.append(
                values.line(
                    blocks, x, side, colour, joined=False, symbol="diamond", in_legend=False
                )
            )
    named = every_few(layout.n_core)
    for layer, colour in enumerate(layer_colours(layout.n_core)):
        blocks = [layout.index(iteration=t, layer=layer) for t in range(T)]
        marks.append(
            values.line(blocks, range(T), f"layer {layer}", colour, in_legend=named(layer))
        )
    step = max(1, T // 16)
    # Prelude and coda have a place beside the iterations, but no number.
    ticks = tuple((t, str(t)) for t in range(0, T, step))
    ends = [-0.5, T - 0.5]
    for mark in marks:
        if isinstance(mark, Span):
            ends += [mark.start, mark.stop]
    return marks, replace(ITERATION, ticks=ticks, limits=(min(ends), max(ends)))
