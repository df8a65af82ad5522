"""The looped models: built here, looped from a feedforward one, or unrolled over a bridge."""

from tl_loops.model.looped import LoopedTransformer

__all__ = ["LoopedTransformer"]
