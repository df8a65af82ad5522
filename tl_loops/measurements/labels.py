"""Names and units of measured quantities, and numbers as drawn."""

import numpy as np

from tl_loops.drawing.figure import Axis
from tl_loops.measurements import MEASUREMENTS

_SPELLED = {"colsum": "ColSum"}


def metric_title(metric: str) -> str:
    """A metric's name as a heading."""
    words = _words(metric)
    return words[:1].upper() + words[1:]


def metric_label(metric: str) -> str:
    """A metric's name with its unit, for an axis."""
    if metric not in MEASUREMENTS:
        return _words(metric)
    measurement = MEASUREMENTS[metric]
    unit = measurement.unit
    if unit == "1":
        low, high = measurement.bounds
        unit = f"{low:g} to {high:g}" if np.isfinite([low, high]).all() else "ratio"
    return f"{_words(metric)} ({unit})"


def metric_axis(metric: str, log: bool = False) -> Axis:
    """The axis of a metric's values, which ends where the metric does."""
    if metric not in MEASUREMENTS:
        return Axis(metric_label(metric), log=log)
    return Axis(metric_label(metric), log=log, bounds=MEASUREMENTS[metric].bounds)


def spans_decades(metric: str) -> bool:
    """Whether a metric is a length that shrinks by factors, best seen on a logarithmic axis."""
    return any(word in metric for word in ("difference", "distance", "acceleration"))


def _words(metric: str) -> str:
    return " ".join(_SPELLED.get(word, word) for word in metric.split("_"))
