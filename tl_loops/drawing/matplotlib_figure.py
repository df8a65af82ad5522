"""Figures drawn by matplotlib: static, for papers and for pages that run no script."""

import io
import textwrap
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatter, LogFormatterMathtext, MaxNLocator, NullFormatter

from tl_loops.drawing.colours import SCALES
from tl_loops.drawing.figure import (
    Axis,
    Bars,
    Box,
    Figure,
    Heat,
    Line,
    Mark,
    Number,
    Panel,
    Rule,
    Span,
)

_DPI = 100
_NARROWEST = 480
_ROW, _SHARED_ROW = 40, 16
_SYMBOLS = {"circle": "o", "diamond": "D", "square": "s"}
_FONT = {"title": 11, "subtitle": 8.5, "panel": 9.5, "label": 9, "tick": 8, "note": 9}


class StaticFigure(MatplotlibFigure):
    """A matplotlib figure that a notebook shows by itself, without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def render(
    figure: Figure, width: int | None = None, height: int | None = None, **options: Any
) -> StaticFigure:
    """Draw a figure.

    Args:
        figure: What to draw.
        width: In pixels of 1/100 inch.
        height: In pixels of 1/100 inch.
        **options: Of ``matplotlib.figure.Figure``.
    """
    legend = _legend_width(figure)
    aside = legend + (90 if figure.colours else 20)
    if width is None:
        width = max(_NARROWEST, figure.columns * (figure.panel_size[0] + 20) + aside)
    lines = _header(figure, width)
    top = 14 + 19 * len(lines[0]) + 15 * len(lines[1])
    if height is None:
        around = _ROW if not figure.shared_x else _SHARED_ROW
        height = figure.rows * (figure.panel_size[1] + around) + (_ROW + 50 - around) + top
    settings = {"figsize": (width / _DPI, height / _DPI), "dpi": _DPI, "layout": "constrained"}
    drawn = StaticFigure(**{**settings, **options})
    engine = drawn.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0, 0, 1 - legend / width, 1 - top / height))
    _write_header(drawn, lines, height)

    axes = []
    for place, panel in enumerate(figure.panels, start=1):
        kind = {"projection": "3d"} if panel.z is not None and not panel.note else {}
        ax = drawn.add_subplot(figure.rows, figure.columns, place, **kind)
        _draw_panel(ax, panel, figure)
        if not figure.at_bottom(place - 1):
            ax.set_xlabel("")
            ax.tick_params(axis="x", labelbottom=False)
        axes.append(ax)
    if figure.colours is not None and any(panel.marks for panel in figure.panels):
        scale = figure.colours
        mappable = ScalarMappable(Normalize(*scale.limits), _colormap(scale.name))
        bar = drawn.colorbar(mappable, ax=axes, shrink=0.9, aspect=30, pad=0.02)
        bar.set_label(_plain(scale.unit), fontsize=_FONT["label"])
        bar.ax.tick_params(labelsize=_FONT["tick"])
    if legend:
        _draw_legend(drawn, figure, axes, (1 - legend / width, 1 - top / height))
    return drawn


def _header(figure: Figure, width: int) -> tuple[list[str], list[str]]:
    title = textwrap.wrap(figure.title, max(20, int(width / 9.4)))
    small = [
        line
        for text in (figure.subtitle, *figure.footnotes)
        for line in textwrap.wrap(text, max(20, int(width / 6.8)))
    ]
    return title, small


def _write_header(drawn: MatplotlibFigure, lines: tuple[list[str], list[str]], height: int) -> None:
    y = 8.0
    for texts, step, size, weight in zip(
        lines, (19, 15), (_FONT["title"], _FONT["subtitle"]), ("bold", "normal"), strict=True
    ):
        for text in texts:
            drawn.text(
                0.012,
                1 - y / height,
                _plain(text),
                ha="left",
                va="top",
                fontsize=size,
                fontweight=weight,
                color="#111" if weight == "bold" else "#444",
            )
            y += step


def _draw_panel(ax: Any, panel: Panel, figure: Figure) -> None:
    pad = 18 if any(isinstance(mark, Span) for mark in panel.marks) else 6
    ax.set_title(_plain(panel.title), fontsize=_FONT["panel"], loc="left", pad=pad)
    if panel.note:
        ax.set_axis_off()
        text = "\n".join(textwrap.wrap(panel.note, max(20, figure.panel_size[0] // 8)))
        ax.text(
            0.5,
            0.5,
            _plain(text),
            ha="center",
            va="center",
            transform=ax.transAxes,
            fontsize=_FONT["note"],
            color="#444",
        )
        return
    ax.set_xlabel(_plain(panel.x.label), fontsize=_FONT["label"])
    ax.set_ylabel(_plain(panel.y.label), fontsize=_FONT["label"])
    ax.tick_params(which="both", labelsize=_FONT["tick"])
    if panel.z is not None:
        ax.set_zlabel(_plain(panel.z.label), fontsize=_FONT["label"])
        ax.set_box_aspect(None, zoom=0.82)  # or labels are cut off
    else:
        ax.spines[["top", "right"]].set_visible(False)
    if panel.x.log:
        ax.set_xscale("log")
    if panel.y.log:
        ax.set_yscale("log")
    n_bars = sum(isinstance(mark, Bars) for mark in panel.marks)
    bar = 0
    for mark in panel.marks:
        if isinstance(mark, Bars):
            width = 0.8 / n_bars
            offset = (bar - (n_bars - 1) / 2) * width
            ax.bar(mark.x + offset, mark.height, width, color=mark.colour, label=_plain(mark.name))
            bar += 1
        else:
            _draw_mark(ax, mark, figure)
    if not any(isinstance(mark, Heat) for mark in panel.marks) and panel.z is None:
        ax.grid(True, which="both", color="#e6e8eb", linewidth=0.6)
        ax.set_axisbelow(True)
    _set_axis(ax, "x", panel.x, figure.panel_size[0])
    _set_axis(ax, "y", panel.y, figure.panel_size[1])


def _draw_mark(ax: Any, mark: Mark, figure: Figure) -> None:
    if isinstance(mark, Line):
        points = (mark.x, mark.y) if mark.z is None else (mark.x, mark.y, mark.z)
        ax.plot(
            *points,
            color=mark.colour,
            linestyle=("--" if mark.dashed else "-") if mark.joined else "none",
            linewidth=0.75 * mark.width,
            marker=_SYMBOLS.get(mark.symbol or "", None),
            markersize=4,
            label=_plain(mark.name) if mark.in_legend else "_" + mark.name,
        )
        if mark.symbol is None and len(mark.x):
            lonely = _lonely(mark.y)
            ax.plot(mark.x[lonely], mark.y[lonely], "o", color=mark.colour, markersize=4)
        if mark.spread is not None:
            low, high = mark.y - mark.spread, mark.y + mark.spread
            ax.fill_between(mark.x, low, high, color=mark.colour, alpha=0.15, linewidth=0)
    elif isinstance(mark, Heat):
        assert figure.colours is not None, "a heatmap needs a colour scale"
        low, high = figure.colours.limits
        ax.set_facecolor("#ffffff" if mark.blank else "#d9dce0")
        ax.imshow(
            np.ma.masked_invalid(mark.values),
            cmap=_colormap(figure.colours.name),
            vmin=low,
            vmax=high,
            aspect="auto",
            interpolation="nearest",
        )
    elif isinstance(mark, Span):
        ax.axvspan(mark.start, mark.stop, color=mark.colour, alpha=0.1, linewidth=0)
        ax.text(
            (mark.start + mark.stop) / 2,
            1.01,
            _plain(mark.label),
            ha="center",
            va="bottom",
            transform=ax.get_xaxis_transform(),
            fontsize=_FONT["tick"],
            color=mark.colour,
        )
    elif isinstance(mark, Rule):
        style = {"color": mark.colour, "linestyle": ":" if mark.dashed else "-", "linewidth": 1}
        (ax.axvline if mark.axis == "x" else ax.axhline)(mark.at, **style)
        if mark.label:
            ax.text(
                mark.at,
                0.985,
                _plain(" " + mark.label),
                ha="left",
                va="top",
                transform=ax.get_xaxis_transform(),
                fontsize=_FONT["tick"],
                color=mark.colour,
            )
    elif isinstance(mark, Box):
        ax.add_patch(
            Rectangle(
                (mark.x[0], mark.y[0]),
                mark.x[1] - mark.x[0],
                mark.y[1] - mark.y[0],
                fill=False,
                edgecolor=mark.colour,
                linewidth=1.5,
                clip_on=False,
            )
        )
        if mark.label:
            ax.text(
                mark.x[0],
                mark.y[0],
                _plain(mark.label),
                ha="left",
                va="bottom",
                fontsize=_FONT["tick"],
                color=mark.colour,
            )


def _set_axis(ax: Any, which: str, axis: Axis, pixels: int) -> None:
    own = ax.xaxis if which == "x" else ax.yaxis
    if axis.ticks is not None:
        ticks = axis.shown_ticks(pixels)
        places, labels = [place for place, _ in ticks], [_plain(text) for _, text in ticks]
        own.set_ticks(places, labels)
        if which == "x" and _would_overlap(places, labels, axis, pixels):
            ax.tick_params(axis="x", labelrotation=90)
    elif axis.log:
        low, high = sorted(own.get_view_interval())
        wide = high > 1e4 * low
        own.set_major_formatter(LogFormatterMathtext() if wide else LogFormatter())
        own.set_minor_formatter(
            NullFormatter() if wide else LogFormatter(minor_thresholds=(1.5, 0.6))
        )
    elif axis.whole:
        own.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if axis.limits is not None:
        (ax.set_xlim if which == "x" else ax.set_ylim)(*axis.limits)
    if axis.reversed and not own.get_inverted():
        own.set_inverted(True)


def _would_overlap(places: list[Number], labels: list[str], axis: Axis, pixels: int) -> bool:
    """Whether labels beside each other would run into each other."""
    if len(places) < 2:
        return False
    low, high = axis.limits or (places[0] - 0.5, places[-1] + 0.5)
    nearest = min(b - a for a, b in pairwise(places)) * pixels / (abs(high - low) or 1.0)
    return max(len(label) for label in labels) * 6.2 > nearest


def _legend_width(figure: Figure) -> int:
    """Pixels at the right that the legend takes; 0 without one."""
    if not figure.named:
        return 0
    return round(max(6.5 * len(text) for text in (*figure.names, figure.legend))) + 56


def _draw_legend(
    drawn: MatplotlibFigure, figure: Figure, axes: list[Any], corner: tuple[float, float]
) -> None:
    """The legend, with its upper left corner at a place in the figure."""
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        drawn.legend(
            list(entries.values()),
            list(entries),
            title=_plain(figure.legend) or None,
            loc="upper left",
            bbox_to_anchor=corner,
            alignment="left",
            fontsize=_FONT["tick"],
            title_fontsize=_FONT["tick"],
            frameon=False,
        )


def _colormap(name: str) -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list(name, list(SCALES[name]))


def _lonely(y: np.ndarray) -> np.ndarray:
    """Points without a neighbour, which a line does not show."""
    real = np.isfinite(y)
    padded = np.concatenate([[False], real, [False]])
    return real & ~padded[:-2] & ~padded[2:]


def _plain(text: str) -> str:
    """Text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")
