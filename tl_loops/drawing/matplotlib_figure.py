"""Figures drawn by matplotlib: static, for papers and for pages that run no script."""

import io
from typing import Any

import numpy as np
from matplotlib import rc_context, rcParams
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatter, LogFormatterMathtext, MaxNLocator, NullFormatter

from tl_loops.drawing.colours import MUTED, ON_DARK, SCALES
from tl_loops.drawing.figure import (
    Axis,
    Bars,
    Box,
    ColourScale,
    Figure,
    Heat,
    Line,
    Mark,
    Panel,
    Rule,
    Span,
)
from tl_loops.drawing.fit import (
    Fit,
    arranged,
    fit,
    fitted,
    heading_lines,
    is_heat,
    text_width,
    wrapped,
)

_DPI = 100
_NARROWEST = 480
_SYMBOLS = {"circle": "o", "diamond": "D", "square": "s"}
_COLOURS: dict[bool, Any] = {
    dark: {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), ink),
        **dict.fromkeys(("xtick.color", "ytick.color", "axes.titlecolor"), ink),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper),
        "grid.color": grid,
    }
    for dark, ink, paper, grid in ((False, "#111111", "#ffffff", "#e6e8eb"),
                                   (True, "#f2f5fa", "#111111", "#30363d"))
}  # fmt: skip
_FONT = {"title": 11, "subtitle": 8.5, "panel": 9.5, "label": 9, "tick": 8, "note": 9}


class StaticFigure(MatplotlibFigure):
    """A matplotlib figure that a notebook shows by itself, without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def render(
    figure: Figure,
    width: float | int | None = None,
    height: float | int | None = None,
    dark: bool = False,
    **options: Any,
) -> StaticFigure:
    """Draw a figure.

    Args:
        figure: What to draw.
        width: In pixels of 1/100 inch.
        height: In pixels of 1/100 inch.
        dark: Whether on a dark page.
        **options: Of ``matplotlib.figure.Figure``.
    """
    if width is None:
        legend = _legend_width(figure) if figure.named else 0
        aside = legend + (90 if figure.colours else 20)
        width = max(_NARROWEST, figure.columns * (figure.panel_size[0] + 20) + aside)
    with rc_context(_COLOURS[dark]):
        return _rendered(figure, width, height, dark, options)


def _rendered(
    figure: Figure,
    width: float | int,
    height: float | int | None,
    dark: bool,
    options: dict[str, Any],
) -> StaticFigure:
    sizes = fit(figure, round(width))
    figure = fitted(figure, sizes)
    lines = _header(figure, width)
    top = 14 + 19 * len(lines[0]) + 15 * len(lines[1])
    beside = _legend_width(figure) if sizes.legend == "beside" else 0
    under = sizes.under - sizes.bar
    if height is None:
        around = sizes.above + (16 if figure.shared_x else sizes.below)
        height = figure.rows * (sizes.panel_height + around) + sizes.below + 20 + top + under
    settings = {"figsize": (width / _DPI, height / _DPI), "dpi": _DPI, "layout": "constrained"}
    drawn = StaticFigure(**{**settings, **options})
    engine = drawn.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        share = 1 - (top + under) / height
        engine.set(rect=(0, under / height, 1 - beside / width, share))
    _write_header(drawn, lines, height)

    axes = []
    for place, panel in enumerate(figure.panels, start=1):
        kind = {"projection": "3d"} if panel.z is not None and not panel.note else {}
        ax = drawn.add_subplot(figure.rows, figure.columns, place, **kind)
        _draw_panel(ax, panel, figure, sizes, dark)
        if not figure.at_bottom(place - 1):
            ax.set_xlabel("")
            ax.tick_params(axis="x", labelbottom=False)
        axes.append(ax)
    if figure.colours is not None and any(panel.marks for panel in figure.panels):
        scale = figure.colours
        mappable = ScalarMappable(Normalize(*scale.limits), _colormap(scale.name, dark))
        bar = drawn.colorbar(mappable, ax=axes, shrink=0.9, aspect=30, pad=0.02)
        tall = sizes.panel_height * figure.rows
        bar.set_label(_plain("\n".join(wrapped(scale.unit, tall))), fontsize=_FONT["label"])
        bar.ax.tick_params(labelsize=_FONT["tick"])
    if beside:
        _draw_legend(drawn, figure, axes, (1 - beside / width, 1 - top / height), 1)
    elif sizes.legend == "below":
        across = max(1, int((width - 20) // _legend_width(figure)))
        _draw_legend(drawn, figure, axes, (0.0, under / height), across)
    return drawn


def _header(figure: Figure, width: float | int) -> tuple[list[str], list[str]]:
    title = wrapped(figure.title, width - 12, 15)
    small = [
        line
        for text in (figure.subtitle, *figure.footnotes)
        for line in wrapped(text, width - 12, 11)
    ]
    return title, small


def _write_header(
    drawn: MatplotlibFigure, lines: tuple[list[str], list[str]], height: float | int
) -> None:
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
                color=rcParams["text.color"] if weight == "bold" else MUTED,
            )
            y += step


def _draw_panel(ax: Any, panel: Panel, figure: Figure, sizes: Fit, dark: bool) -> None:
    title = "\n".join(heading_lines(panel.title, sizes.panel))
    ax.set_title(_plain(title), fontsize=_FONT["panel"], loc="left", pad=6 + 0.7 * sizes.labels)
    if panel.note:
        ax.set_axis_off()
        text = "\n".join(wrapped(panel.note, sizes.panel))
        ax.text(
            0.5,
            0.5,
            _plain(text),
            ha="center",
            va="center",
            transform=ax.transAxes,
            fontsize=_FONT["note"],
            color=MUTED,
        )
        return
    across, upright = (
        "\n".join(wrapped(axis.label, 0.95 * pixels))
        for axis, pixels in ((panel.x, sizes.panel), (panel.y, sizes.panel_height))
    )
    ax.set_xlabel(_plain(across), fontsize=_FONT["label"])
    ax.set_ylabel(_plain(upright), fontsize=_FONT["label"])
    ax.tick_params(which="both", labelsize=_FONT["tick"])
    if panel.z is not None:
        ax.set_zlabel(_plain(panel.z.label), fontsize=_FONT["label"])
        ax.set_box_aspect(None, zoom=0.88)  # or labels are cut off
        # Numbers along axes in space would cross each other.
        ax.tick_params(labelcolor="none")
        for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
            axis.labelpad = -10
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
            _draw_mark(ax, mark, panel, figure, dark)
    if panel.z is not None:
        return
    if not is_heat(panel.marks):
        ax.grid(True, which="both", linewidth=0.6)
        ax.set_axisbelow(True)
    _set_axis(ax, "x", panel.x, sizes.panel)
    _set_axis(ax, "y", panel.y, sizes.panel_height)


def _write_in_cells(ax: Any, mark: Heat, colours: ColourScale, dark: bool) -> None:
    """Short text in the middle of each cell, light on dark ones."""
    assert mark.text is not None
    for (i, j), text in np.ndenumerate(mark.text):
        value = mark.values[i, j]
        if text and np.isfinite(value):
            ink = colours.ink(float(value), dark)
            ax.text(j, i, _plain(text), ha="center", va="center", fontsize=7, color=ink)


def _draw_mark(ax: Any, mark: Mark, panel: Panel, figure: Figure, dark: bool) -> None:
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
        if not mark.blank:
            ax.set_facecolor("#4a5058" if dark else "#d9dce0")
        ax.imshow(
            np.ma.masked_invalid(mark.values),
            cmap=_colormap(figure.colours.name, dark),
            vmin=low,
            vmax=high,
            aspect="auto",
            interpolation="nearest",
        )
        if mark.text is not None:
            _write_in_cells(ax, mark, figure.colours, dark)
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
            low, high = panel.x.limits or (mark.x[0], np.inf)
            late = mark.x[0] + mark.x[1] > low + high  # or it would end beyond the figure
            ax.text(
                mark.x[1] if late else mark.x[0],
                mark.y[0],
                _plain(mark.label),
                ha="right" if late else "left",
                va="bottom",
                fontsize=_FONT["tick"],
                color=mark.colour,
            )


def _set_axis(ax: Any, which: str, axis: Axis, pixels: int) -> None:
    own = ax.xaxis if which == "x" else ax.yaxis
    if axis.ticks is not None:
        ticks, turned = (
            arranged(axis, pixels, 11) if which == "x" else (axis.shown_ticks(pixels), False)
        )
        own.set_ticks([place for place, _ in ticks], [_plain(text) for _, text in ticks])
        if turned:
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


def _legend_width(figure: Figure) -> int:
    """Pixels that an entry of the legend takes."""
    return round(max(text_width(text, 10.5) for text in (*figure.names, figure.legend))) + 56


def _draw_legend(
    drawn: MatplotlibFigure,
    figure: Figure,
    axes: list[Any],
    corner: tuple[float, float],
    columns: int,
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
            ncols=columns,
            fontsize=_FONT["tick"],
            title_fontsize=_FONT["tick"],
            frameon=False,
        )


def _colormap(name: str, dark: bool) -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list(name, list((ON_DARK if dark else SCALES)[name]))


def _lonely(y: np.ndarray) -> np.ndarray:
    """Points without a neighbour, which a line does not show."""
    real = np.isfinite(y)
    padded = np.concatenate([[False], real, [False]])
    return real & ~padded[:-2] & ~padded[2:]


def _plain(text: str) -> str:
    """Text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")
