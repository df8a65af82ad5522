"""Measurements by name: what each reads, how it is reduced to one number per prompt, and where."""

from tl_loops.measurements.find import DEFAULT_METRICS, find_measurement
from tl_loops.measurements.measurement import (
    Activation,
    Measurement,
    core_calls,
    resolve_options,
    why_not,
)
from tl_loops.measurements.registry import MEASUREMENTS

__all__ = [
    "DEFAULT_METRICS",
    "MEASUREMENTS",
    "Activation",
    "Measurement",
    "core_calls",
    "find_measurement",
    "resolve_options",
    "why_not",
]
