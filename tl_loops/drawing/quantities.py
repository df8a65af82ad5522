"""What axes measure: the name of each quantity, and the least and the largest it can be."""

import math
from dataclasses import replace

from tl_loops.drawing.figure import Axis

ITERATION = Axis("iteration", whole=True, bounds=(0, math.inf))
LAYER = Axis("layer", whole=True, bounds=(0, math.inf))
BLOCK = Axis("block", whole=True, bounds=(0, math.inf))
RELATIVE_DEPTH = Axis("relative depth (%)", bounds=(0, 100))
PROBABILITY = Axis("probability (0 to 1)", bounds=(0, 1))
COSINE = Axis("cosine", bounds=(-1, 1))
RANK = Axis("rank (1 is the top; geometric mean)", log=True, reversed=True, bounds=(1, math.inf))
LENGTH = Axis("L2 norm", log=True, bounds=(0, math.inf))
FREQUENCY = Axis("frequency (cycles per iteration)", bounds=(0, 0.5))
AMPLITUDE = Axis("amplitude", bounds=(0, math.inf))


def share(of: str) -> Axis:
    """A share of something, from 0 to 1."""
    return replace(PROBABILITY, label=f"share of {of} (0 to 1)")


def named(axis: Axis, label: str) -> Axis:
    """The same quantity under another name."""
    return replace(axis, label=label)


def relative_depth_limits(places: int) -> tuple[float, float]:
    """Ends of an axis of relative depth: room for half a block before the first and the last."""
    room = min(8.0, 50.0 / max(places - 1, 1))
    return -room, 100.0 + room
