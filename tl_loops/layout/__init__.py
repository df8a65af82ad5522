"""Coordinates, names and choices: where a block stands, and what its hook points are called."""

from tl_loops.layout.coordinate import PHASES, BlockCoordinate, Phase
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.names import activation_name

__all__ = [
    "PHASES",
    "BlockCoordinate",
    "LoopLayout",
    "Phase",
    "activation_name",
]
