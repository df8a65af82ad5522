"""Figures drawn by plotly: interactive, with hover; nothing is loaded from a network."""

import math
from dataclasses import replace
from html import escape
from typing import Any

import plotly.graph_objects as go

from tl_loops.drawing.colours import MUTED, ON_DARK, SCALES
from tl_loops.drawing.figure import Axis, ColourScale, Figure, Number, Panel
from tl_loops.drawing.fit import (
    BAR_LENGTH,
    COLOUR_BAR,
    Fit,
    arranged,
    fit,
    fitted,
    heading_lines,
    is_heat,
    wrapped,
)
from tl_loops.drawing.limits import whole_step
from tl_loops.drawing.plotly_sheet import Place, Sheet
from tl_loops.drawing.plotly_traces import add_shape, traces_of

USUAL_WIDTH = 760
"""Pixels that a figure is laid out for which takes the width of its page."""

_TOOLBAR = {"width": 150, "height": 30}
_SLIDER = 84
_EDGE = 12
_FEWER_TOOLS = [
    "select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d", "tableRotation",
    "resetCameraLastSave3d",
]  # fmt: skip


def render(
    figure: Figure,
    width: float | int | None = None,
    height: float | int | None = None,
    dark: bool = False,
    header: bool = True,
    **options: Any,
) -> go.Figure:
    """Draw a figure.

    Args:
        figure: What to draw.
        width: In pixels; ``None``: that of the page.
        height: In pixels.
        dark: Whether on a dark page.
        header: Whether title, subtitle and footnotes stand in the figure.
        **options: Of ``update_layout``.
    """
    sheet = laid_out(figure, width, height, dark, header)
    template = "plotly_dark" if dark else "plotly_white"
    drawn = go.Figure(sheet.data, sheet.layout | {"template": template}, sheet.frames or None)
    return drawn.set_subplots(**sheet.subplots).update_layout(**options)


def laid_out(
    figure: Figure,
    width: float | int | None = None,
    height: float | int | None = None,
    dark: bool = False,
    header: bool = True,
    traces: bool = True,
) -> Sheet:
    """Traces and layout of a figure as plain data.

    Args:
        figure: What to draw.
        width: In pixels; ``None``: that of the page.
        height: In pixels.
        dark: Whether on a dark page.
        header: Whether title, subtitle and footnotes stand in the figure.
        traces: Whether to draw the numbers, or only the layout.
    """
    moving = bool(figure.slider) and len(figure.panels) > 1
    whole, figure = figure, replace(figure, panels=figure.panels[:1]) if moving else figure
    sizes = fit(figure, round(width or USUAL_WIDTH))
    figure = fitted(figure, sizes)
    title, small = _header(figure, sizes.width) if header else ([], [])
    top = max(14 + 22 * len(title) + 17 * len(small), _TOOLBAR["height"]) + 8 + sizes.above
    bottom = sizes.below + sizes.under + _EDGE + (_SLIDER if moving else 0)
    between = sizes.above + 14 + (0 if figure.shared_x else sizes.below)
    inside = figure.rows * sizes.panel_height + (figure.rows - 1) * between
    across = sizes.columns * sizes.panel + (sizes.columns - 1) * sizes.gap
    gap = sizes.gap / across if sizes.columns > 1 else 0.0
    sheet = Sheet(
        _in_space(figure),
        across=min(gap, 0.9 / sizes.columns),
        between=min(between / inside, 0.9 / figure.rows) if figure.rows > 1 else 0.0,
    )
    named: set[str] | None = set() if traces else None
    for number, (panel, place) in enumerate(zip(figure.panels, sheet.places, strict=True)):
        row, column = divmod(number, sizes.columns)
        _draw_panel(sheet, panel, figure, sizes, place, named, dark)
        if not figure.at_bottom(number) and not panel.note and place.x:
            axis = sheet.x_axis(place)
            axis |= {"showticklabels": False, "title": axis.get("title", {}) | {"text": ""}}
        # Above the left edge of its own panel, whose share of the width is even.
        part = (1 - (sizes.columns - 1) * gap) / sizes.columns
        up = 1 - row * (sizes.panel_height + between) / inside
        _heading(sheet, panel, sizes, column * (part + gap), up)
    height = inside + top + bottom if height is None else height
    sheet.layout |= {
        "font": {"size": 12},
        "width": width,
        "height": height,
        "margin": {"l": sizes.left, "r": sizes.right, "t": top, "b": bottom},
        "title": _title(title, small),
        "showlegend": figure.named,
        "legend": _legend(figure, sizes, height),
        "hovermode": "closest",
        "barmode": "group",
        "modebar": {"remove": _FEWER_TOOLS, "bgcolor": "rgba(0,0,0,0)"},
    }
    if figure.colours is not None:
        sheet.layout["coloraxis"] = _colour_axis(figure.colours, dark, height)
    if moving:
        _animate(sheet, fitted(whole, sizes), sizes, dark)
    if figure.colours is not None:
        _write_unit(sheet, sizes, bottom)
    return sheet


def _header(figure: Figure, width: int) -> tuple[list[str], list[str]]:
    """Title and small lines; the title leaves room for the toolbar."""
    title = wrapped(figure.title, width - _TOOLBAR["width"] - _EDGE, 17.5)  # bold
    small = [
        line
        for text in (figure.subtitle, *figure.footnotes)
        for line in wrapped(text, width - 2 * _EDGE, 11.5)
    ]
    return title, small


def _title(title: list[str], small: list[str]) -> dict[str, Any]:
    text = "<br>".join(f"<b>{escape(line)}</b>" for line in title)
    text += "".join(
        f'<br><span style="font-size:12px;color:{MUTED}">{escape(line)}</span>' for line in small
    )
    return {
        "text": text,
        "x": 0,
        "xref": "container",
        "y": 1,
        "yref": "container",
        "xanchor": "left",
        "yanchor": "top",
        "pad": {"t": 20, "l": _EDGE},
        "font": {"size": 16},
    }


def _legend(figure: Figure, sizes: Fit, height: float | int) -> dict[str, Any]:
    """The legend beside the panels, or a few lines under them."""
    title: dict[str, Any] = {"text": escape(figure.legend)}
    if sizes.legend != "below":
        return {"title": title, "tracegroupgap": 0}
    return {
        "title": {**title, "side": "top"},
        "orientation": "h",
        "xref": "container",
        "x": 0,
        "xanchor": "left",
        "yref": "container",
        "y": (_EDGE + sizes.under) / height,
        "yanchor": "top",
    }


def _colour_axis(scale: ColourScale, dark: bool, height: float | int) -> dict[str, Any]:
    """The colours of heatmaps, explained by a bar under all panels."""
    return {
        "colorscale": colour_scale(scale, dark),
        "cmin": scale.limits[0],
        "cmax": scale.limits[1],
        "colorbar": {
            "orientation": "h",
            "thickness": 12,
            "len": BAR_LENGTH,
            "lenmode": "pixels",
            "x": 0,
            "xanchor": "left",
            "xpad": 0,
            "yref": "container",
            "y": _EDGE / height,
            "yanchor": "bottom",
            "ypad": 0,
            "nticks": 5,
        },
    }


def _write_unit(sheet: Sheet, sizes: Fit, bottom: int) -> None:
    """What the colours are, beside their bar: plotly's own title would run over it."""
    up = COLOUR_BAR - 10 if sizes.unit_above else COLOUR_BAR / 2  # the bar ends below its room
    sheet.annotate(
        "<br>".join(map(escape, sizes.unit)),
        xref="paper",
        yref="paper",
        x=0,
        y=0,
        xanchor="left",
        yanchor="bottom" if sizes.unit_above else "middle",
        xshift=0 if sizes.unit_above else BAR_LENGTH + 16,
        yshift=_EDGE + up - bottom,
        align="left",
    )


def colour_scale(scale: ColourScale, dark: bool) -> list[list[Any]]:
    """Places and colours as plotly has them."""
    return [[place, colour] for place, colour in (ON_DARK if dark else SCALES)[scale.name]]


def _in_space(figure: Figure) -> list[list[bool | None]]:
    """Which panels are in space, by row and column; ``None``: there is no panel."""
    kinds: list[bool | None] = [panel.z is not None and not panel.note for panel in figure.panels]
    kinds += [None] * (figure.rows * figure.columns - len(kinds))
    columns = figure.columns
    return [kinds[row * columns : (row + 1) * columns] for row in range(figure.rows)]


def _heading(sheet: Sheet, panel: Panel, sizes: Fit, left: float, up: float) -> None:
    """The panel's title above its left edge, over the labels of shaded ranges."""
    if panel.title:
        sheet.annotate(
            "<br>".join(escape(line) for line in heading_lines(panel.title, sizes.panel)),
            x=left,
            y=up,
            xref="paper",
            yref="paper",
            xanchor="left",
            yanchor="bottom",
            align="left",
            yshift=sizes.labels,
            font={"size": 13},
        )


def _draw_panel(
    sheet: Sheet,
    panel: Panel,
    figure: Figure,
    sizes: Fit,
    place: Place,
    named: set[str] | None,
    dark: bool,
) -> None:
    if panel.note:
        nothing = {"type": "scatter", "x": [], "y": [], "showlegend": False}
        sheet.data.append(place.trace(nothing))
        sheet.annotate(
            "<br>".join(escape(line) for line in wrapped(panel.note, sizes.panel, 13)),
            x=0.5,
            y=0.5,
            xref=f"{place.x} domain",
            yref=f"{place.y} domain",
            font={"size": 13, "color": MUTED},
        )
        for axis in (sheet.x_axis(place), sheet.y_axis(place)):
            axis["visible"] = False
        return
    if named is not None:
        sheet.data += map(place.trace, traces_of(panel, figure, named, dark))
    for mark in panel.marks:
        add_shape(sheet, mark, panel, place)
    if panel.z is not None:
        # Numbers along axes in space would cross each other; the hover tells them.
        for name, axis in zip("xyz", (panel.x, panel.y, panel.z), strict=True):
            title = {"text": escape(axis.label), "font": {"size": 11}}
            sheet.layout[place.scene][f"{name}axis"] = {"title": title, "showticklabels": False}
        camera = {"eye": {"x": 1.7, "y": 1.7, "z": 1.1}}
        sheet.layout[place.scene] |= {"camera": camera, "aspectmode": "cube"}
        return
    heat = is_heat(panel.marks)
    sheet.x_axis(place).update(_axis(panel.x, sizes.panel, heat, upright=False))
    sheet.y_axis(place).update(_axis(panel.y, sizes.panel_height, heat, upright=True))


def _axis(axis: Axis, pixels: int, heat: bool, upright: bool) -> dict[str, Any]:
    label = "<br>".join(escape(line) for line in wrapped(axis.label, 0.95 * pixels))
    settings: dict[str, Any] = {"title": {"text": label, "standoff": 6}, "automargin": True}
    if axis.log:
        settings |= {"type": "log"}
    if axis.ticks is not None:
        ticks, turned = (axis.shown_ticks(pixels), False) if upright else arranged(axis, pixels)
        settings |= {
            "tickmode": "array",
            "tickvals": [place for place, _ in ticks],
            "ticktext": [escape(text) for _, text in ticks],
            "tickangle": 90 if turned else 0,
        }
    elif axis.limits is not None and axis.log:
        settings |= _log_ticks(axis.limits, pixels, 18 if upright else 44)
    elif axis.limits is not None and axis.whole:
        most = max(2, min(12, pixels // (20 if upright else 32)))
        settings |= {"tickformat": "d", "tick0": 0, "dtick": whole_step(axis.limits, most)}
    elif not upright:
        settings |= {"nticks": max(3, min(9, pixels // 55)), "tickangle": 0}
    if axis.limits is not None:
        low, high = (math.log10(v) if axis.log else v for v in axis.limits)
        settings["range"] = [high, low] if axis.reversed else [low, high]
    elif axis.reversed:
        settings["autorange"] = "reversed"
    if heat:
        settings |= {"showgrid": False, "zeroline": False}
    return settings


def _log_ticks(limits: tuple[Number, Number], pixels: int, apart: int) -> dict[str, Any]:
    """Ticks of a logarithmic axis: even numbers within a decade, else 1, 2, 5, or powers of ten."""
    low, high = sorted(math.log10(v) for v in limits)
    decade = pixels / (high - low)
    settings: dict[str, Any] = {"tickformat": ".4~g"}
    if high - low < 0.9:
        step = 10 ** math.floor(high - 1)
        while decade * (high - math.log10(10**high - step)) < apart:
            step *= 2 if f"{step:e}"[0] != "2" else 2.5
        return settings | {"dtick": f"L{step:.10g}", "tick0": 0}
    if decade * math.log10(2) >= apart:
        return settings | {"dtick": "D2"}
    powers = {"exponentformat": "power"} if high - low > 6 else settings
    return powers | {"dtick": math.ceil(apart / decade), "tick0": 0}


def _animate(sheet: Sheet, figure: Figure, sizes: Fit, dark: bool) -> None:
    """One frame a panel, a slider over them, and a button that plays them."""
    instant = {"frame": {"duration": 0, "redraw": True}, "mode": "immediate"}
    steps = []
    sheet.frames = [
        {"name": panel.title, "data": traces_of(panel, figure, set(), dark)}
        for panel in figure.panels
    ]
    for panel in figure.panels:
        steps.append({"label": panel.title, "method": "animate", "args": [[panel.title], instant]})
    play = {"frame": {"duration": 700, "redraw": True}, "fromcurrent": True}
    sheet.layout |= {
        "sliders": [
            {
                "steps": steps,
                "currentvalue": {"prefix": "", "font": {"size": 12, "color": MUTED}},
                "pad": {"t": sizes.below, "l": 90},
                "x": 0,
                "len": 1,
                # The title of the panel that is shown stands above; all at once would collide.
                "font": {"color": "rgba(0,0,0,0)", "size": 1},
            }
        ],
        "updatemenus": [
            {
                "type": "buttons",
                "direction": "left",
                "x": 0,
                "y": 0,
                "xanchor": "left",
                "yanchor": "top",
                "pad": {"t": sizes.below + 12, "r": 10},
                "showactive": False,
                "buttons": [
                    {"label": "▶", "method": "animate", "args": [None, play]},
                    {"label": "❚❚", "method": "animate", "args": [[None], instant]},
                ],
            }
        ],
        "annotations": [],
    }
