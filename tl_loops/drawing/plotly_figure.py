"""Figures drawn by plotly: interactive, with hover; nothing is loaded from a network."""

import textwrap
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tl_loops.drawing.colours import SCALES
from tl_loops.drawing.figure import Axis, Bars, Box, Figure, Heat, Line, Panel, Rule, Span

_BETWEEN = {"x": 76, "y": 92, "shared": 34}
_NARROWEST = 700
_MARGIN = {"l": 70, "r": 30, "b": 66}
_SYMBOLS = {"circle": "circle", "diamond": "diamond", "square": "square"}


def render(
    figure: Figure, width: int | None = None, height: int | None = None, **options: Any
) -> go.Figure:
    """Draw a figure.

    Args:
        figure: What to draw.
        width: In pixels; ``None``: that of the page.
        height: In pixels.
        **options: Of ``update_layout``.
    """
    moving = bool(figure.slider) and len(figure.panels) > 1
    shown = figure.panels[:1] if moving else figure.panels
    rows, columns = (1, 1) if moving else (figure.rows, figure.columns)
    header = _header(figure, width or max(_NARROWEST, columns * figure.panel_size[0]))
    top = 26 + 22 * len(header[0]) + 17 * len(header[1]) + _above(shown)
    bottom = _MARGIN["b"] + (80 if moving else 0)
    between = _BETWEEN["shared" if figure.shared_x else "y"]
    inside = rows * figure.panel_size[1] + (rows - 1) * between
    height = inside + top + bottom if height is None else height
    across = width or columns * figure.panel_size[0] + (columns - 1) * _BETWEEN["x"]
    across_gap = min(_BETWEEN["x"] / across, 0.9 / columns) if columns > 1 else 0.0
    drawn = make_subplots(
        rows,
        columns,
        subplot_titles=[escape(panel.title) for panel in shown],
        specs=_specs(shown, rows, columns),
        horizontal_spacing=across_gap,
        vertical_spacing=min(between / inside, 0.9 / rows),
    )
    drawn.update_annotations(font={"size": 13}, xanchor="left")
    titles: Any = drawn.layout["annotations"]
    heading = 0
    named: set[str] = set()
    for place, panel in enumerate(shown):
        row, column = divmod(place, columns)
        at: dict[str, Any] = {"row": row + 1, "col": column + 1}
        _draw_panel(drawn, panel, figure, at, named)
        if not moving and not figure.at_bottom(place) and not panel.note:
            drawn.update_xaxes(showticklabels=False, title_text="", **at)
        if panel.title:
            # Above the left edge of its own panel, whose share of the width is even.
            share = (1 - (columns - 1) * across_gap) / columns
            left = column * (share + across_gap)
            above = any(isinstance(mark, Span) for mark in panel.marks)
            titles[heading].update(x=left, yshift=16 if above else 0)
            heading += 1
    title = "<br>".join(f"<b>{escape(line)}</b>" for line in header[0])
    small = "".join(
        f'<br><span style="font-size:12px;color:#555">{escape(line)}</span>' for line in header[1]
    )
    drawn.update_layout(
        title={
            "text": title + small,
            "x": 0,
            "xref": "container",
            "y": 1,
            "yref": "container",
            "xanchor": "left",
            "yanchor": "top",
            "pad": {"t": 12, "l": 12},
            "font": {"size": 16},
        },
        template="plotly_white",
        font={"size": 12},
        width=width,
        height=height,
        margin={**_MARGIN, "t": top, "b": bottom},
        showlegend=figure.named,
        legend={"title": {"text": escape(figure.legend)}, "tracegroupgap": 0},
        hovermode="closest",
        barmode="group",
    )
    if figure.colours is not None:
        scale = figure.colours
        stops = SCALES[scale.name]
        drawn.update_layout(
            coloraxis={
                "colorscale": [[i / (len(stops) - 1), stop] for i, stop in enumerate(stops)],
                "cmin": scale.limits[0],
                "cmax": scale.limits[1],
                "colorbar": {
                    "title": {"text": escape(scale.unit), "side": "right"},
                    "thickness": 14,
                    "showticklabels": True,
                },
            }
        )
    if moving:
        _animate(drawn, figure)
    drawn.update_layout(**options)
    return drawn


def _header(figure: Figure, width: int) -> tuple[list[str], list[str]]:
    title = textwrap.wrap(figure.title, max(20, int(width / 8.5)))
    small = [
        line
        for text in (figure.subtitle, *figure.footnotes)
        for line in textwrap.wrap(text, max(20, int(width / 6.2)))
    ]
    return title, small


def _above(panels: tuple[Panel, ...]) -> int:
    """Pixels that titles of the first row and labels of shaded ranges take above it."""
    spans = any(isinstance(mark, Span) for panel in panels for mark in panel.marks)
    return (18 if any(panel.title for panel in panels) else 0) + (16 if spans else 0)


def _specs(panels: tuple[Panel, ...], rows: int, columns: int) -> list[list[Any]]:
    kinds: list[Any] = [
        {"type": "scene" if panel.z is not None and not panel.note else "xy"} for panel in panels
    ]
    kinds += [None] * (rows * columns - len(kinds))
    return [kinds[row * columns : (row + 1) * columns] for row in range(rows)]


def _draw_panel(
    drawn: go.Figure, panel: Panel, figure: Figure, at: dict[str, Any], named: set[str]
) -> None:
    if panel.note:
        width = max(20, figure.panel_size[0] // 8)
        drawn.add_trace(go.Scatter(x=[], y=[], showlegend=False), **at)
        drawn.add_annotation(
            text="<br>".join(escape(line) for line in textwrap.wrap(panel.note, width)),
            x=0.5,
            y=0.5,
            xref="x domain",
            yref="y domain",
            showarrow=False,
            font={"size": 13, "color": "#444"},
            **at,
        )
        drawn.update_xaxes(visible=False, **at)
        drawn.update_yaxes(visible=False, **at)
        return
    for trace in _traces(panel, named):
        drawn.add_trace(trace, **at)
    for mark in panel.marks:
        _add_shape(drawn, mark, at)
    if panel.z is not None:
        drawn.update_scenes(
            xaxis_title_text=escape(panel.x.label),
            yaxis_title_text=escape(panel.y.label),
            zaxis_title_text=escape(panel.z.label),
            camera_eye={"x": 2.0, "y": 2.0, "z": 1.3},
            aspectmode="cube",
            **at,
        )
        return
    heat = any(isinstance(mark, Heat) for mark in panel.marks)
    drawn.update_xaxes(**_axis(panel.x, figure.panel_size[0], heat), **at)
    drawn.update_yaxes(**_axis(panel.y, figure.panel_size[1], heat), **at)
    if heat:
        drawn.update_yaxes(autorange="reversed", **at)


def _traces(panel: Panel, named: set[str]) -> list[Any]:
    """The traces of a panel; a name is in the legend once."""
    traces: list[Any] = []
    for mark in panel.marks:
        if isinstance(mark, Line):
            traces += _line(mark, panel, mark.in_legend and mark.name not in named)
            if mark.in_legend:
                named.add(mark.name)
        elif isinstance(mark, Bars):
            traces.append(
                go.Bar(
                    x=mark.x,
                    y=mark.height,
                    name=escape(mark.name),
                    marker={"color": mark.colour},
                    legendgroup=mark.name,
                    showlegend=mark.name not in named,
                    **_hover(mark.hover, panel),
                )
            )
            named.add(mark.name)
        elif isinstance(mark, Heat):
            traces.append(_heatmap(mark, panel))
    return traces


def _line(mark: Line, panel: Panel, in_legend: bool) -> list[Any]:
    marker = mark.symbol is not None or _has_lonely_point(mark.y)
    settings: dict[str, Any] = {
        "x": mark.x,
        "y": mark.y,
        "name": escape(mark.name),
        "legendgroup": mark.name,
        "showlegend": in_legend,
        "mode": "+".join(["lines"] * mark.joined + ["markers"] * marker) or "markers",
        "line": {
            "color": mark.colour,
            "width": mark.width,
            "dash": "dash" if mark.dashed else "solid",
        },
        **_hover(mark.hover, panel),
    }
    symbol = _SYMBOLS[mark.symbol or "circle"]
    if mark.z is not None:
        size = {"color": mark.colour, "size": 4, "symbol": symbol}
        return [go.Scatter3d(z=mark.z, marker=size, **settings)]
    traces: list[Any] = []
    if mark.spread is not None:
        real = np.isfinite(mark.y) & np.isfinite(mark.spread)
        x, low, high = (v[real] for v in (mark.x, mark.y - mark.spread, mark.y + mark.spread))
        red, green, blue = (int(mark.colour[i : i + 2], 16) for i in (1, 3, 5))
        traces.append(
            go.Scatter(
                x=np.concatenate([x, x[::-1]]),
                y=np.concatenate([high, low[::-1]]),
                fill="toself",
                fillcolor=f"rgba({red},{green},{blue},0.15)",
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                legendgroup=mark.name,
                showlegend=False,
            )
        )
    marks = {"color": mark.colour, "size": 6, "symbol": symbol}
    return [*traces, go.Scatter(marker=marks, **settings)]


def _hover(texts: Any, panel: Panel) -> dict[str, Any]:
    if len(texts):
        return {"text": [escape(text) for text in texts], "hovertemplate": "%{text}<extra></extra>"}
    third = "" if panel.z is None else f"<br>{_literal(panel.z.label)}: %{{z:.4g}}"
    return {
        "hovertemplate": f"{_literal(panel.x.label)}: %{{x}}<br>"
        f"{_literal(panel.y.label)}: %{{y:.4g}}{third}"
    }


def _heatmap(mark: Heat, panel: Panel) -> go.Heatmap:
    settings: dict[str, Any] = {"hovertemplate": "%{z:.4g}<extra></extra>"}
    if mark.hover is not None:
        texts = np.array([[escape(text) for text in row] for row in mark.hover.tolist()])
        settings = {"text": texts, "hovertemplate": "%{text}: %{z:.4g}<extra></extra>"}
    values = mark.values.astype(np.float32)  # half the size of the page
    return go.Heatmap(z=values, coloraxis="coloraxis", hoverongaps=False, **settings)


def _add_shape(drawn: go.Figure, mark: Any, at: dict[str, Any]) -> None:
    if isinstance(mark, Span):
        drawn.add_vrect(
            x0=mark.start,
            x1=mark.stop,
            fillcolor=mark.colour,
            opacity=0.1,
            line_width=0,
            layer="below",
            annotation={
                "text": escape(mark.label),
                "font": {"size": 11, "color": mark.colour},
                "yanchor": "bottom",
            },
            annotation_position="top",
            **at,
        )
    elif isinstance(mark, Rule):
        line = {"color": mark.colour, "width": 1, "dash": "dot" if mark.dashed else "solid"}
        place = {"x": mark.at} if mark.axis == "x" else {"y": mark.at}
        label = {"annotation_text": escape(mark.label)} if mark.label else {}
        (drawn.add_vline if mark.axis == "x" else drawn.add_hline)(
            **place, line=line, **label, **at
        )
    elif isinstance(mark, Box):
        drawn.add_shape(
            type="rect",
            x0=mark.x[0],
            x1=mark.x[1],
            y0=mark.y[0],
            y1=mark.y[1],
            line={"color": mark.colour, "width": 2},
            **at,
        )
        if mark.label:
            drawn.add_annotation(
                x=mark.x[0],
                y=mark.y[0],
                text=escape(mark.label),
                showarrow=False,
                xanchor="left",
                yanchor="bottom",
                font={"size": 11, "color": mark.colour},
                **at,
            )


def _axis(axis: Axis, pixels: int, heat: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"title": {"text": escape(axis.label), "standoff": 8}}
    if axis.log:
        settings |= {"type": "log", "exponentformat": "power"}
    if axis.ticks is not None:
        ticks = axis.shown_ticks(pixels)
        settings |= {
            "tickmode": "array",
            "tickvals": [place for place, _ in ticks],
            "ticktext": [escape(text) for _, text in ticks],
        }
    elif axis.whole:
        settings |= {"tickformat": ",d", "nticks": 12}
    if axis.limits is not None:
        low, high = (np.log10(v) if axis.log else v for v in axis.limits)
        settings["range"] = [high, low] if axis.reversed else [low, high]
    elif axis.reversed:
        settings["autorange"] = "reversed"
    if heat:
        settings |= {"showgrid": False, "zeroline": False}
    return settings


def _animate(drawn: go.Figure, figure: Figure) -> None:
    """One frame a panel, a slider over them, and a button that plays them."""
    instant = {"frame": {"duration": 0, "redraw": True}, "mode": "immediate"}
    steps = []
    drawn.frames = [
        go.Frame(name=panel.title, data=_traces(panel, set())) for panel in figure.panels
    ]
    for panel in figure.panels:
        steps.append({"label": panel.title, "method": "animate", "args": [[panel.title], instant]})
    play = {"frame": {"duration": 700, "redraw": True}, "fromcurrent": True}
    drawn.update_layout(
        sliders=[
            {
                "steps": steps,
                "currentvalue": {"prefix": ""},
                "pad": {"t": 50, "l": 110},
                "x": 0,
                "len": 1,
            }
        ],
        updatemenus=[
            {
                "type": "buttons",
                "direction": "left",
                "x": 0,
                "y": 0,
                "xanchor": "left",
                "yanchor": "top",
                "pad": {"t": 62, "r": 10},
                "showactive": False,
                "buttons": [
                    {"label": "▶", "method": "animate", "args": [None, play]},
                    {"label": "❚❚", "method": "animate", "args": [[None], instant]},
                ],
            }
        ],
    )
    drawn.layout.annotations = ()


def _literal(text: str) -> str:
    """Text inside of a hover template."""
    return escape(text).replace("%{", "% {")


def _has_lonely_point(y: np.ndarray) -> bool:
    real = np.isfinite(y)
    padded = np.concatenate([[False], real, [False]])
    return bool((real & ~padded[:-2] & ~padded[2:]).any())
