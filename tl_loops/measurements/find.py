"""Finding measurements by name, and those that are measured when none is named."""

from tl_loops.arguments import checked
from tl_loops.errors import did_you_mean
from tl_loops.measurements.measurement import Measurement
from tl_loops.measurements.registry import MEASUREMENTS

DEFAULT_METRICS = (
    "sink_rate",
    "mixing_score",
    "colsum_concentration",
    "residual_entropy",
    "residual_norm",
)
"""What arXiv 2604.11791 compares between looped and feedforward models."""


@checked
def find_measurement(name: str) -> Measurement:
    """The registry's entry.

    Raises:
        ValueError: There is none; near matches are suggested.
    """
    if name in MEASUREMENTS:
        return MEASUREMENTS[name]
    raise ValueError(f"unknown metric {name!r}: {did_you_mean(name, MEASUREMENTS, quoted=True)}")
