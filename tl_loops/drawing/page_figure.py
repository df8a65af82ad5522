"""Figures for a page of its own: numbers once, with a layout for each of several widths."""

import json
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np

from tl_loops.drawing.figure import Figure, Heat
from tl_loops.drawing.fit import fit
from tl_loops.drawing.plotly_figure import colour_scale, laid_out
from tl_loops.drawing.plotly_traces import written_cells

WIDTHS = (310, 470, 900)
"""Pixels that there are layouts for; a page takes the widest that it has room for."""


@dataclass(frozen=True, repr=False)
class PageFigure:
    """A figure that the report's script draws.

    Attributes:
        title: What is shown.
        details: The line under it, and remarks.
        remarks: Words of panels that show nothing.
        content: Data, layouts by width, and colours of a dark page; ``None``: nothing to draw.
        heights: Height of each layout in pixels.
    """

    title: str
    details: str
    remarks: tuple[str, ...]
    content: dict[str, Any] | None
    heights: dict[int, int]

    def element(self) -> str:
        """HTML of the figure, its data in a script element."""
        caption = f"{escape(self.title)}<small>{escape(self.details)}</small>"
        remarks = "".join(f'<p class="soft">{escape(remark)}</p>' for remark in self.remarks)
        if self.content is None:
            return f"<figure><figcaption>{caption}</figcaption>{remarks}</figure>"
        # Text inside of a script element must not end it.
        data = json.dumps(self.content, separators=(",", ":")).replace("<", "\\u003c")
        return (
            f'<figure class="plot"><figcaption>{caption}</figcaption>{remarks}'
            f'<div class="plotly" style="height:{max(self.heights.values())}px">'
            "<noscript>This figure needs scripts, which this page holds itself.</noscript></div>"
            f'<script type="application/json">{data}</script></figure>'
        )


def render(figure: Figure) -> PageFigure:
    """Draw a figure; panels that show nothing become a line of words."""
    details = " · ".join(text for text in (figure.subtitle, *figure.footnotes) if text)
    shown = tuple(panel for panel in figure.panels if not panel.note)
    remarks = tuple(
        f"{panel.title}: {panel.note}" if panel.title and shown else panel.note
        for panel in figure.panels
        if panel.note
    )
    if not shown:
        return PageFigure(figure.title, details, tuple(dict.fromkeys(remarks)), None, {})
    figure = replace(figure, panels=shown, columns=min(figure.columns, len(shown)))
    layouts: dict[int, Any] = {}
    data: Any = None
    for width in WIDTHS:
        # Of the widest, whose cells have room for the most words.
        last = width == WIDTHS[-1]
        sheet = laid_out(figure, width, header=False, traces=last)
        layout = sheet.layout | {"meta": {"written": fit(figure, width).written}}
        for name in ("title", "width"):
            layout.pop(name)
        layouts[width] = compact(layout)
        data = compact(sheet.data) if last else data
    content = {"data": data, "layouts": _different(layouts)}
    if figure.colours is not None:
        content["dark"] = colour_scale(figure.colours, dark=True)
        if content["dark"] != colour_scale(figure.colours, dark=False):
            content["darkWords"] = _words_on_dark(figure, data)
    heights = {width: int(layout["height"]) for width, layout in layouts.items()}
    return PageFigure(figure.title, details, remarks, content, heights)


def _words_on_dark(figure: Figure, data: list[dict[str, Any]]) -> dict[int, list[list[str]]]:
    """The words of heatmaps in the colours of a dark page, by the number of their trace."""
    heats = [mark for panel in figure.panels for mark in panel.marks if isinstance(mark, Heat)]
    places = [place for place, trace in enumerate(data) if trace["type"] == "heatmap"]
    return {
        place: written_cells(mark, figure.colours, dark=True)
        for place, mark in zip(places, heats, strict=True)
        if mark.text is not None and "texttemplate" in data[place]
    }


def compact(value: Any) -> Any:
    """Plain data: arrays as lists of numbers with five digits, undefined ones as null."""
    if isinstance(value, dict):
        return {key: compact(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, np.ndarray):
        return compact(value.tolist())
    if isinstance(value, (list, tuple)):
        return [compact(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    if isinstance(value, np.generic):
        return value.item()
    return value


def _different(layouts: dict[int, Any]) -> dict[str, Any]:
    """Only what differs from the narrowest layout, which is complete."""
    narrowest, *wider = sorted(layouts)
    kept = {str(narrowest): layouts[narrowest]}
    for width in wider:
        entries = layouts[width]
        kept[str(width)] = {
            key: entries.get(key)
            for key in {**layouts[narrowest], **entries}
            if entries.get(key) != layouts[narrowest].get(key)
        }
    return kept
