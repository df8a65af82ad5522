"""The marks of a panel as traces and shapes of plotly."""

from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tl_loops.drawing.figure import Bars, Box, ColourScale, Figure, Heat, Line, Panel, Rule, Span
from tl_loops.drawing.fit import CELL_SIZE

_SYMBOLS = {"circle": "circle", "diamond": "diamond", "square": "square"}


def traces_of(panel: Panel, figure: Figure, named: set[str], dark: bool) -> list[Any]:
    """The traces of a panel of a figure; a name is in the legend once."""
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
            traces.append(_heatmap(mark, figure.colours, dark))
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


def written_cells(mark: Heat, colours: ColourScale | None, dark: bool) -> list[list[str]]:
    """The words in the cells of a heatmap as plotly's HTML, each black or white as its cell needs.

    Left to itself plotly writes in grey, which cannot be read on cells of medium lightness.
    """
    assert mark.text is not None and colours is not None, "a heatmap needs a colour scale"
    rows = []
    for texts, values in zip(mark.text.tolist(), mark.values.tolist(), strict=True):
        row = []
        for text, value in zip(texts, values, strict=True):
            written = escape(text)
            if text and np.isfinite(value):
                ink = colours.ink(value, dark)
                written = f'<span style="color:{ink}">{written}</span>'
            row.append(written)
        rows.append(row)
    return rows


def _heatmap(mark: Heat, colours: ColourScale | None, dark: bool) -> go.Heatmap:
    settings: dict[str, Any] = {"hovertemplate": "%{z:.4g}<extra></extra>"}
    if mark.hover is not None:
        texts = np.array([[escape(text) for text in row] for row in mark.hover.tolist()])
        settings = {"hovertext": texts, "hovertemplate": "%{hovertext}: %{z:.4g}<extra></extra>"}
    if mark.text is not None:
        written = written_cells(mark, colours, dark)
        settings |= {"text": written, "texttemplate": "%{text}", "textfont": {"size": CELL_SIZE}}
    values = mark.values.astype(np.float32)  # half the size of the page
    return go.Heatmap(z=values, coloraxis="coloraxis", hoverongaps=False, **settings)


def add_shape(drawn: go.Figure, mark: Any, panel: Panel, at: dict[str, Any]) -> None:
    """Add what is no trace: ranges, rules and boxes."""
    everywhere = {"exclude_empty_subplots": False}  # a layout for another width has no traces
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
            **everywhere,
            **at,
        )
    elif isinstance(mark, Rule):
        line = {"color": mark.colour, "width": 1, "dash": "dot" if mark.dashed else "solid"}
        place = {"x": mark.at} if mark.axis == "x" else {"y": mark.at}
        label = {"annotation_text": escape(mark.label)} if mark.label else {}
        (drawn.add_vline if mark.axis == "x" else drawn.add_hline)(
            **place, line=line, **label, **everywhere, **at
        )
    elif isinstance(mark, Box):
        drawn.add_shape(
            type="rect",
            x0=mark.x[0],
            x1=mark.x[1],
            y0=mark.y[0],
            y1=mark.y[1],
            line={"color": mark.colour, "width": 2},
            **everywhere,
            **at,
        )
        if mark.label:
            low, high = panel.x.limits or (-np.inf, np.inf)
            late = mark.x[0] + mark.x[1] > low + high  # or it would end beyond the figure
            drawn.add_annotation(
                x=mark.x[1] if late else mark.x[0],
                y=mark.y[0],
                text=escape(mark.label),
                showarrow=False,
                xanchor="right" if late else "left",
                yanchor="bottom",
                font={"size": 11, "color": mark.colour},
                **at,
            )


def _literal(text: str) -> str:
    """Text inside of a hover template."""
    return escape(text).replace("%{", "% {")


def _has_lonely_point(y: np.ndarray) -> bool:
    real = np.isfinite(y)
    padded = np.concatenate([[False], real, [False]])
    return bool((real & ~padded[:-2] & ~padded[2:]).any())
