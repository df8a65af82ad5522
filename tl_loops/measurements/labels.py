"""Names and units of measured quantities, and numbers as drawn."""

import numpy as np

from tl_loops.measurements import MEASUREMENTS


def metric_title(metric: str) -> str:
    """A metric's name as a heading."""
    words = metric.replace("_", " ")
    return words[:1].upper() + words[1:]


def metric_label(metric: str) -> str:
    """A metric's name with its unit, for an axis."""
    if metric not in MEASUREMENTS:
        return metric.replace("_", " ")
    measurement = MEASUREMENTS[metric]
    unit = measurement.unit
    if unit == "1":
        low, high = measurement.bounds
        unit = f"{low:g} to {high:g}" if np.isfinite([low, high]).all() else "ratio"
    return f"{metric.replace('_', ' ')} ({unit})"


def spans_decades(metric: str) -> bool:
    """Whether a metric is a length that shrinks by factors, best seen on a logarithmic axis."""
    return any(word in metric for word in ("difference", "distance", "acceleration"))
