"""Coordinates, names and choices: where a block stands, and what its hook points are called."""

from tl_loops.layout.layout import PHASES, BlockCoordinate, LoopLayout, Phase
from tl_loops.layout.names import HookSpec, activation_name

__all__ = [
    "PHASES",
    "BlockCoordinate",
    "HookSpec",
    "LoopLayout",
    "Phase",
    "activation_name",
]
