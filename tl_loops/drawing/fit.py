"""How a figure fits a width: panels in a row, words that wrap, labels that do not meet."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from tl_loops.drawing.figure import Axis, Box, Figure, Heat, Mark, Span, Ticks

_CHARACTER = 0.62
"""Width of a character as a share of the size of its font; wide fonts have about this."""
_LEAST_PANEL = 215
_LEGEND_BESIDE = 560
"""Pixels of a figure below which its legend stands under it."""


COLOUR_BAR = 44
"""Height of the bar that explains the colours of heatmaps, with its numbers."""
CELL_SIZE = 10
"""Size of the font of words in the cells of heatmaps."""
BAR_LENGTH = 170
"""Length of that bar."""


def text_width(text: str, size: float | int = 12) -> float:
    """Pixels that a text takes, or a little more."""
    return _CHARACTER * size * len(text)


def wrapped(text: str, pixels: float | int, size: float | int = 12) -> list[str]:
    """A text in lines of at most so many pixels."""
    return textwrap.wrap(text, max(8, int(pixels / (_CHARACTER * size))))


def arranged(axis: Axis, pixels: float | int, size: float | int = 12) -> tuple[Ticks, bool]:
    """The ticks of a horizontal axis of so many pixels, and whether their labels are turned.

    Labels that would meet are thinned if they are numbers, else turned, and thinned if they are
    still too many.
    """
    ticks = axis.ticks or ()
    if not ticks:
        return ticks, False
    widest = max(text_width(text, size) for _, text in ticks) + 6
    if all(text.lstrip("-").isdigit() for _, text in ticks):
        return axis.shown_ticks(int(pixels), math.ceil(widest)), False
    low, high = axis.limits or (ticks[0][0] - 0.5, ticks[-1][0] + 0.5)
    scale = pixels / (abs(high - low) or 1.0)
    if all((b - a) * scale >= widest for (a, _), (b, _) in pairwise(ticks)):
        return ticks, False
    return axis.shown_ticks(int(pixels)), True


@dataclass(frozen=True)
class Fit:
    """Sizes of a figure of some width, in pixels.

    Attributes:
        width: Of the whole.
        columns: Panels in a row.
        panel: Width of a panel.
        panel_height: Height of a panel.
        left: Left of the first panel.
        right: Right of the last panel, with the legend if it stands there.
        gap: Between panels beside each other.
        above: Above each panel: its title, and labels of shaded ranges.
        labels: The part of it that labels take.
        below: Below each panel that writes its x axis: labels and title.
        legend: ``"none"``, ``"beside"`` or ``"below"``.
        under: Under all panels: the legend, if it stands there, and the colour scale.
        bar: The part of it that the colour scale takes.
        unit: Lines that say what the colours are.
        unit_above: Whether they stand above their bar rather than right of it.
        written: Whether the words in the cells of heatmaps fit their cells.
    """

    width: int
    columns: int
    panel: int
    panel_height: int
    left: int
    right: int
    gap: int
    above: int
    labels: int
    below: int
    legend: str
    under: int
    bar: int
    unit: tuple[str, ...]
    unit_above: bool
    written: bool


def fit(figure: Figure, width: int) -> Fit:
    """Sizes of a figure of so many pixels."""
    left = max((_beside(panel.y, figure.panel_size[1]) for panel in figure.panels), default=60)
    entry = max((text_width(name) for name in (*figure.names, figure.legend)), default=0) + 48
    legend = "none"
    if figure.named:
        legend = "beside" if width >= _LEGEND_BESIDE and entry < 0.3 * width else "below"
    right = round(entry + 24) if legend == "beside" else 30
    gap = max(left + 6, 40)
    least = min(_LEAST_PANEL, figure.panel_size[0])
    columns = figure.columns
    while columns > 1 and (width - left - right - (columns - 1) * gap) / columns < least:
        columns -= 1
    panel = max(80, int((width - left - right - (columns - 1) * gap) / columns))
    rows = 0
    if legend == "below":
        rows = math.ceil(len(figure.names) / max(1, int((width - 20) // entry)))
        rows += bool(figure.legend)
    unit, above = _unit(figure, width - left)
    bar = 0 if figure.colours is None else COLOUR_BAR + (16 * len(unit) if above else 0)
    height = figure.panel_size[1]
    if figure.keeps_shape:
        height = max(60, round(height * min(1.0, panel / figure.panel_size[0])))
    labels = 18 if _has_labels(figure) else 0
    titles = max((len(heading_lines(p.title, panel)) for p in figure.panels), default=0)
    return Fit(
        width,
        columns,
        panel,
        height,
        left,
        right,
        gap,
        17 * titles + labels,
        labels,
        max((_below(p.x, panel) for p in figure.panels), default=40),
        legend,
        23 * rows + (20 if rows else 0) + bar,
        bar,
        unit,
        above,
        all(_fits(mark, panel) for p in figure.panels for mark in p.marks),
    )


def fitted(figure: Figure, sizes: Fit) -> Figure:
    """The figure with as many columns, and words in cells only where they fit."""
    if not sizes.written:
        panels = tuple(
            replace(panel, marks=tuple(_without_words(mark) for mark in panel.marks))
            for panel in figure.panels
        )
        figure = replace(figure, panels=panels)
    return replace(figure, columns=sizes.columns)


def _without_words(mark: Mark) -> Mark:
    return replace(mark, text=None) if isinstance(mark, Heat) else mark


def _fits(mark: object, pixels: int) -> bool:
    """Whether the words in the cells of a heatmap fit a panel of so many pixels."""
    if not isinstance(mark, Heat) or mark.text is None:
        return True
    widest = max((text_width(text, CELL_SIZE) for text in mark.text.flat), default=0)
    return widest + 2 <= pixels / max(1, mark.text.shape[1])


def _unit(figure: Figure, pixels: int) -> tuple[tuple[str, ...], bool]:
    """What the colours are, in lines, and whether these stand above the bar for want of room."""
    if figure.colours is None:
        return (), False
    text, room = figure.colours.unit, pixels - BAR_LENGTH - 30
    beside = wrapped(text, room)
    words = max((text_width(word) for word in text.split()), default=0)
    if words <= room and len(beside) <= 2:
        return tuple(beside), False
    return tuple(wrapped(text, pixels - 20)), True


def heading_lines(title: str, pixels: float | int) -> list[str]:
    """The title of a panel in lines."""
    return wrapped(title, pixels, 13)


def _has_labels(figure: Figure) -> bool:
    """Whether labels of shaded ranges or of boxes stand above the panels."""
    return any(
        isinstance(mark, (Span, Box)) and bool(mark.label)
        for panel in figure.panels
        for mark in panel.marks
    )


def is_heat(marks: Sequence[object]) -> bool:
    """Whether some of the marks are heatmaps."""
    return any(isinstance(mark, Heat) for mark in marks)


def _beside(axis: Axis, pixels: int) -> int:
    """Pixels that labels and title of a vertical axis take."""
    labels = 44.0 if axis.ticks is None else max((text_width(t) for _, t in axis.ticks), default=0)
    return round(labels + 12 + 17 * len(wrapped(axis.label, 0.95 * pixels)))


def _below(axis: Axis, pixels: int) -> int:
    """Pixels that labels and title of a horizontal axis take."""
    ticks, turned = arranged(axis, pixels)
    labels = max((text_width(text) for _, text in ticks), default=0) if turned else 18
    return round(labels + 8 + 17 * len(wrapped(axis.label, pixels)))
