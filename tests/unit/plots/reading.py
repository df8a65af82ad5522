"""What a figure shows, read back from either library."""

import re
from typing import Any

import numpy as np
from matplotlib.figure import Figure as MatplotlibFigure

BACKENDS = ("plotly", "matplotlib")


def curves(figure: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Named curves as (x, y); bands and markers of lonely points are left out."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if isinstance(figure, MatplotlibFigure):
        for ax in figure.get_axes():
            for line in ax.get_lines():
                name = str(line.get_label()).removeprefix("_")
                if not name.startswith("child") and len(line.get_xdata()):
                    x, y = (np.asarray(v, dtype=float) for v in line.get_data())
                    found.setdefault(name, (x, y))
        return found
    for trace in figure.data:
        if trace.type in ("scatter", "scatter3d", "bar") and trace.name:
            x, y = (np.asarray(v, dtype=float) for v in (trace.x, trace.y))
            found.setdefault(trace.name, (x, y))
    return found


def heights(figure: Any) -> list[list[float]]:
    """Heights of the bars, one list a name."""
    if isinstance(figure, MatplotlibFigure):
        ax = figure.get_axes()[0]
        return [[bar.get_height() for bar in group] for group in ax.containers]
    return [np.asarray(trace.y).tolist() for trace in figure.data]


def matrices(figure: Any) -> list[np.ndarray]:
    """Values of the heatmaps in order, undefined ones as NaN."""
    if isinstance(figure, MatplotlibFigure):
        images = [image for ax in figure.get_axes() for image in ax.get_images()]
        return [np.ma.filled(image.get_array().astype(float), np.nan) for image in images]
    return [np.asarray(t.z, dtype=float) for t in figure.data if t.type == "heatmap"]


def words(figure: Any) -> str:
    """All text of a figure on one line: titles, labels, ticks, notes."""
    if isinstance(figure, MatplotlibFigure):
        from matplotlib.text import Text

        figure.canvas.draw()  # which makes ticks
        shown = " ".join(text.get_text() for text in figure.findobj(Text))
    else:
        shown = re.sub(r"<[^<>]*>", " ", str(figure.to_dict()))  # of line breaks and sizes
    return " ".join(shown.split())


def colours(figure: Any) -> dict[str, str]:
    """Colour of each named curve."""
    if isinstance(figure, MatplotlibFigure):
        return {
            str(line.get_label()).removeprefix("_"): str(line.get_color())
            for ax in figure.get_axes()
            for line in ax.get_lines()
        }
    return {trace.name: trace.line.color for trace in figure.data if trace.type == "scatter"}
