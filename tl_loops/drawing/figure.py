"""A figure as data: panels of lines, bars and heatmaps that either drawing library can draw."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from tl_loops.drawing.colours import MUTED, ON_DARK, SCALES, ink_on
from tl_loops.drawing.sizes import finite_limits
from tl_loops.errors import shortened

Number = float | int
Ticks = tuple[tuple[Number, str], ...]


@dataclass(frozen=True)
class Axis:
    """One axis of a panel.

    Attributes:
        label: Quantity and unit.
        log: Whether the axis is logarithmic.
        ticks: Places and their labels; ``None``: numbers, chosen by the library.
        limits: Ends of the axis; ``None``: from the data.
        reversed: Whether values fall along the axis.
        whole: Whether only whole numbers mean something (iterations).
        bounds: The least and the largest value that the quantity can have (a share: 0 and 1). The
            axis goes beyond them by no more than a marker takes.
    """

    label: str
    log: bool = False
    ticks: Ticks | None = None
    limits: tuple[Number, Number] | None = None
    reversed: bool = False
    whole: bool = False
    bounds: tuple[Number, Number] = (-math.inf, math.inf)

    def shown_ticks(self, pixels: int, apart: int = 14) -> Ticks:
        """The ticks of an axis of so many pixels, thinned until labels are so far apart."""
        ticks = self.ticks or ()
        if not ticks:
            return ticks
        low, high = (ticks[0][0] - 0.5, ticks[-1][0] + 0.5) if self.limits is None else self.limits
        scale = pixels / (abs(high - low) or 1.0)
        near = min((b - a for (a, _), (b, _) in pairwise(ticks)), default=1)
        # Evenly first: every second, every third, ...
        kept: list[tuple[Number, str]] = []
        for tick in ticks[:: max(1, math.ceil(apart / (scale * near)))] if _even(ticks) else ticks:
            if not kept or (tick[0] - kept[-1][0]) * scale >= apart:
                kept.append(tick)
        return tuple(kept)


@dataclass(frozen=True, eq=False)
class Line:
    """Points, joined or not.

    Attributes:
        x: [point].
        y: [point]; NaN leaves a gap.
        name: For the legend and the hover.
        colour: ``#rrggbb``.
        z: [point], in a panel with a third axis.
        spread: [point], half the height of a band around the line.
        hover: One text per point; empty: the coordinates.
        joined: Whether a line joins the points.
        symbol: Marker at each point; ``None``: none (but for a point that has no neighbours).
        dashed: Whether the line is dashed.
        width: Of the line, in pixels.
        in_legend: Whether the legend names it.
    """

    x: np.ndarray
    y: np.ndarray
    name: str
    colour: str
    z: np.ndarray | None = None
    spread: np.ndarray | None = None
    hover: Sequence[str] = ()
    joined: bool = True
    symbol: Literal["circle", "diamond", "square"] | None = "circle"
    dashed: bool = False
    width: Number = 2
    in_legend: bool = True


@dataclass(frozen=True, eq=False)
class Bars:
    """Vertical bars; several in one panel stand beside each other.

    Attributes:
        x: [bar].
        height: [bar].
        name: For the legend and the hover.
        colour: ``#rrggbb``.
        hover: One text a bar; empty: the coordinates.
    """

    x: np.ndarray
    height: np.ndarray
    name: str
    colour: str
    hover: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Heat:
    """A matrix as colours, row 0 on top; cell (i, j) is centred at y = i, x = j.

    Attributes:
        values: [row, column]; NaN is left blank.
        hover: [row, column] of text; ``None``: labels and value.
        blank: Whether NaN stands for places without a value, and not for an undefined one.
        text: [row, column] of short text that is written in the cells.
    """

    values: np.ndarray
    hover: np.ndarray | None = None
    blank: bool = False
    text: np.ndarray | None = None


@dataclass(frozen=True)
class Span:
    """A shaded range of the x axis, such as the prelude."""

    start: Number
    stop: Number
    label: str
    colour: str


@dataclass(frozen=True)
class Rule:
    """A thin line across the panel at one x (or one y)."""

    at: Number
    label: str = ""
    axis: Literal["x", "y"] = "x"
    colour: str = MUTED
    dashed: bool = True


@dataclass(frozen=True)
class Box:
    """The outline of a rectangle, with a label above its left corner."""

    x: tuple[Number, Number]
    y: tuple[Number, Number]
    colour: str
    label: str = ""


Mark = Line | Bars | Heat | Span | Rule | Box


@dataclass(frozen=True)
class Panel:
    """One coordinate system.

    Attributes:
        marks: What it shows, the first at the back.
        x: Horizontal axis.
        y: Vertical axis.
        z: Third axis, for points in space.
        title: Above the panel.
        note: Words in place of marks where there is nothing to show.
    """

    marks: tuple[Mark, ...]
    x: Axis
    y: Axis
    z: Axis | None = None
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class ColourScale:
    """How the numbers of all heatmaps of a figure become colours.

    Attributes:
        unit: What the numbers are, beside the scale.
        name: ``"sequential"``, ``"diverging"`` (white in the middle) or ``"weights"`` (from 0, with
            most colours near it).
        limits: Numbers at the ends.
    """

    unit: str
    name: Literal["sequential", "diverging", "weights"] = "sequential"
    limits: tuple[Number, Number] = (0.0, 1.0)

    def ink(self, value: float, dark: bool) -> str:
        """Black or white: what is read on the colour of a finite value, on a dark page or not."""
        low, high = self.limits
        stops = (ON_DARK if dark else SCALES)[self.name]
        return ink_on(stops, float((value - low) / ((high - low) or 1.0)))

    @classmethod
    def of(
        cls,
        values: np.ndarray,
        unit: str,
        name: Literal["sequential", "diverging"] = "sequential",
        limits: tuple[Number, Number] | None = None,
    ) -> "ColourScale":
        """A scale for some numbers; a diverging one is symmetric about 0."""
        if limits is not None:
            return cls(unit, name, finite_limits(limits))
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        if name == "diverging":
            reach = max(abs(low), abs(high)) or 1.0
            return cls(unit, name, (-reach, reach))
        return cls(unit, name, (low, high if high > low else low + 1.0))


@dataclass(frozen=True)
class Figure:
    """Panels under one title.

    Attributes:
        title: What is shown.
        subtitle: Of which model, after how many iterations, on which prompts.
        panels: In reading order.
        columns: Panels in a row.
        panel_size: Width and height of a panel in pixels.
        colours: Scale of all heatmaps.
        legend: What the curves are; the legend's title.
        slider: What the panels run over, where a library that can move shows one at a time.
        footnotes: Short sentences under the subtitle.
        shared_x: Whether panels above each other have one x axis, written at the bottom.
        keeps_shape: Whether a panel that must be narrower gets lower too (matrices).
    """

    title: str
    subtitle: str
    panels: tuple[Panel, ...]
    columns: int = 1
    panel_size: tuple[int, int] = (640, 360)
    colours: ColourScale | None = None
    legend: str = ""
    slider: str = ""
    footnotes: tuple[str, ...] = field(default=())
    shared_x: bool = False
    keeps_shape: bool = False

    def at_bottom(self, place: int) -> bool:
        """Whether no panel stands below one, or the axis is its own."""
        below = place + self.columns
        return not self.shared_x or below >= len(self.panels) or bool(self.panels[below].note)

    @property
    def rows(self) -> int:
        """Rows of panels."""
        return math.ceil(len(self.panels) / self.columns)

    @property
    def names(self) -> list[str]:
        """What a legend names."""
        return list(
            dict.fromkeys(
                mark.name
                for panel in self.panels
                for mark in panel.marks
                if isinstance(mark, Bars) or (isinstance(mark, Line) and mark.in_legend)
            )
        )

    @property
    def named(self) -> bool:
        """Whether there is something for a legend to tell apart."""
        return len(self.names) > 1


def every_few(n: int, most: int = 10) -> Callable[[int], bool]:
    """Which of ``n`` ordered curves a legend names, so that it stays short."""
    step = max(1, math.ceil(n / most))
    return lambda i: i % step == 0 or i == n - 1


def _even(ticks: Ticks) -> bool:
    steps = [b - a for (a, _), (b, _) in pairwise(ticks)]
    return not steps or max(steps) - min(steps) < 1e-9


def as_array(values: Any) -> np.ndarray:
    """Numbers on the CPU, in float64 (also of bfloat16, also of integers and booleans)."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().double().numpy()
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"expected numbers to draw, got {shortened(values)}") from None
