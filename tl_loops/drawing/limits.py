"""Where axes begin and end: at the data, and never beyond what a quantity can be."""

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from tl_loops.drawing.figure import Axis, Bars, Figure, Heat, Line, Number, Panel, Span

_MARGIN = 0.05
_MARKER = 0.03
"""Share of an axis that the half of a marker takes which stands at its end."""


def with_limits(figure: Figure) -> Figure:
    """The figure with ends for the axes that have none.

    Left open are axes of panels in space or without marks.
    """
    return replace(figure, panels=tuple(_limited(panel) for panel in figure.panels))


def whole_step(limits: tuple[Number, Number], most: int) -> int:
    """Steps between ticks of whole numbers (1, 2, 5, 10, ...), for so many ticks at most."""
    span = abs(limits[1] - limits[0])
    step = 1
    while span / step > most:
        # 1, 2, 5, 10, ...
        step = step * 5 // 2 if str(step)[0] == "2" else step * 2
    return step


def _limited(panel: Panel) -> Panel:
    if panel.z is not None or not panel.marks:
        return panel
    heats = [mark for mark in panel.marks if isinstance(mark, Heat)]
    if heats:
        rows, columns = heats[0].values.shape
        ends: dict[str, tuple[Number, Number]] = {
            "x": (-0.5, columns - 0.5),
            "y": (rows - 0.5, -0.5),  # row 0 is on top
        }
    else:
        ends = {"x": _ends(panel.x, _along_x(panel)), "y": _ends(panel.y, _along_y(panel))}
    axes = {
        which: replace(axis, limits=ends[which])
        for which, axis in (("x", panel.x), ("y", panel.y))
        if axis.limits is None
    }
    return replace(panel, **axes)


def _ends(axis: Axis, values: Iterable[np.ndarray]) -> tuple[Number, Number]:
    """Ends of an axis for some values, as the axis counts (log10 of them, or they themselves)."""
    shown = np.concatenate([np.zeros(0), *values])
    shown = shown[np.isfinite(shown)]
    least, most = axis.bounds
    if axis.log:
        shown = np.log10(shown[shown > 0])
        least, most = (math.log10(x) if x > 0 else -math.inf for x in (least, most))
    if axis.ticks:
        shown = np.concatenate([shown, [axis.ticks[0][0], axis.ticks[-1][0]]])
    if not shown.size:
        shown = np.zeros(1)
    low, high = float(shown.min()), float(shown.max())
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        # One number alone: all that it could be, or its surroundings.
        around = 0.5 if axis.whole or axis.log or not low else abs(low) / 2
        finite = math.isfinite(least) and math.isfinite(most)
        low, high = (
            (least, most) if finite else (max(low - around, least), min(high + around, most))
        )
        if high <= low:
            low, high = low - around, high + around
    margin, marker = _MARGIN * (high - low), _MARKER * (high - low)
    if axis.whole:
        margin = max(marker, 0.25)
        return low - margin, high + margin
    low, high = max(low - margin, least - marker), min(high + margin, most + marker)
    return (10**low, 10**high) if axis.log else (low, high)


def _along_x(panel: Panel) -> Iterable[np.ndarray]:
    for mark in panel.marks:
        if isinstance(mark, Line):
            yield mark.x
        elif isinstance(mark, Bars):
            yield from (mark.x - 0.5, mark.x + 0.5)
        elif isinstance(mark, Span):
            yield np.array([mark.start, mark.stop], dtype=np.float64)


def _along_y(panel: Panel) -> Iterable[np.ndarray]:
    for mark in panel.marks:
        if isinstance(mark, Line):
            yield mark.y
            if mark.spread is not None:
                yield from (mark.y - mark.spread, mark.y + mark.spread)
        elif isinstance(mark, Bars):
            yield np.concatenate([np.zeros(1), mark.height])
