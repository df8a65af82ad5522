"""The architecture of a looped transformer as data."""

from tl_loops.config.config import LoopedTransformerConfig

__all__ = ["LoopedTransformerConfig"]
