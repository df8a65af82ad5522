"""The marks of a panel as traces and shapes of plotly, in plain data."""

from html import escape
from typing import Any

import numpy as np

from tl_loops.drawing.figure import Bars, Box, ColourScale, Figure, Heat, Line, Panel, Rule, Span
from tl_loops.drawing.fit import CELL_SIZE
from tl_loops.drawing.plotly_sheet import Place, Sheet

_SYMBOLS = {"circle": "circle", "diamond": "diamond", "square": "square"}


def traces_of(panel: Panel, figure: Figure, named: set[str], dark: bool) -> list[dict[str, Any]]:
    """The traces of a panel of a figure; a name is in the legend once."""
    traces: list[dict[str, Any]] = []
    for mark in panel.marks:
        if isinstance(mark, Line):
            traces += _line(mark, panel, mark.in_legend and mark.name not in named)
            if mark.in_legend:
                named.add(mark.name)
        elif isinstance(mark, Bars):
            traces.append(
                {
                    "type": "bar",
                    "x": mark.x,
                    "y": mark.height,
                    "name": escape(mark.name),
                    "marker": {"color": mark.colour},
                    "legendgroup": mark.name,
                    "showlegend": mark.name not in named,
                    **_hover(mark.hover, panel),
                }
            )
            named.add(mark.name)
        elif isinstance(mark, Heat):
            traces.append(_heatmap(mark, figure.colours, dark))
    return traces


def _line(mark: Line, panel: Panel, in_legend: bool) -> list[dict[str, Any]]:
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
        return [{"type": "scatter3d", "z": mark.z, "marker": size, **settings}]
    traces: list[dict[str, Any]] = []
    if mark.spread is not None:
        real = np.isfinite(mark.y) & np.isfinite(mark.spread)
        x, low, high = (v[real] for v in (mark.x, mark.y - mark.spread, mark.y + mark.spread))
        red, green, blue = (int(mark.colour[i : i + 2], 16) for i in (1, 3, 5))
        traces.append(
            {
                "type": "scatter",
                "x": np.concatenate([x, x[::-1]]),
                "y": np.concatenate([high, low[::-1]]),
                "fill": "toself",
                "fillcolor": f"rgba({red},{green},{blue},0.15)",
                "line": {"width": 0},
                "mode": "lines",
                "hoverinfo": "skip",
                "legendgroup": mark.name,
                "showlegend": False,
            }
        )
    marks = {"color": mark.colour, "size": 6, "symbol": symbol}
    return [*traces, {"type": "scatter", "marker": marks, **settings}]


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


def _heatmap(mark: Heat, colours: ColourScale | None, dark: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"hovertemplate": "%{z:.4g}<extra></extra>"}
    if mark.hover is not None:
        texts = np.array([[escape(text) for text in row] for row in mark.hover.tolist()])
        settings = {"hovertext": texts, "hovertemplate": "%{hovertext}: %{z:.4g}<extra></extra>"}
    if mark.text is not None:
        written = written_cells(mark, colours, dark)
        settings |= {"text": written, "texttemplate": "%{text}", "textfont": {"size": CELL_SIZE}}
    values = mark.values.astype(np.float32)  # half the size of the page
    return {
        "type": "heatmap", "z": values, "coloraxis": "coloraxis", "hoverongaps": False, **settings
    }  # fmt: skip


def add_shape(sheet: Sheet, mark: Any, panel: Panel, place: Place) -> None:
    """Add what is no trace: ranges, rules and boxes."""
    on_axes = {"xref": place.x, "yref": place.y}
    if isinstance(mark, Span):
        upright = {"xref": place.x, "yref": f"{place.y} domain"}  # over the whole height
        sheet.shape(
            "rect",
            x0=mark.start,
            x1=mark.stop,
            y0=0,
            y1=1,
            fillcolor=mark.colour,
            opacity=0.1,
            line={"width": 0},
            layer="below",
            **upright,
        )
        sheet.annotate(
            escape(mark.label),
            x=(mark.start + mark.stop) / 2,
            y=1,
            xanchor="center",
            yanchor="bottom",
            font={"size": 11, "color": mark.colour},
            **upright,
        )
    elif isinstance(mark, Rule):
        on, across = ("x", "y") if mark.axis == "x" else ("y", "x")
        refs = on_axes | {f"{across}ref": f"{on_axes[f'{across}ref']} domain"}
        line = {"color": mark.colour, "width": 1, "dash": "dot" if mark.dashed else "solid"}
        ends = {f"{on}0": mark.at, f"{on}1": mark.at, f"{across}0": 0, f"{across}1": 1}
        sheet.shape("line", line=line, **ends, **refs)
        if mark.label:
            at = {on: mark.at, across: 1}
            anchors = ("left", "top") if on == "x" else ("right", "bottom")
            sheet.annotate(escape(mark.label), **at, xanchor=anchors[0], yanchor=anchors[1], **refs)
    elif isinstance(mark, Box):
        sheet.shape(
            "rect",
            x0=mark.x[0],
            x1=mark.x[1],
            y0=mark.y[0],
            y1=mark.y[1],
            line={"color": mark.colour, "width": 2},
            **on_axes,
        )
        if mark.label:
            low, high = panel.x.limits or (-np.inf, np.inf)
            late = mark.x[0] + mark.x[1] > low + high  # or it would end beyond the figure
            sheet.annotate(
                escape(mark.label),
                x=mark.x[1] if late else mark.x[0],
                y=mark.y[0],
                xanchor="right" if late else "left",
                yanchor="bottom",
                font={"size": 11, "color": mark.colour},
                **on_axes,
            )


def _literal(text: str) -> str:
    """Text inside of a hover template."""
    return escape(text).replace("%{", "% {")


def _has_lonely_point(y: np.ndarray) -> bool:
    real = np.isfinite(y)
    padded = np.concatenate([[False], real, [False]])
    return bool((real & ~padded[:-2] & ~padded[2:]).any())
