"""The looped models: built here, looped from a feedforward one, or unrolled over a bridge."""

from tl_loops.model.looped import LoopedTransformer
from tl_loops.model.registration import register, unregister

__all__ = ["LoopedTransformer", "register", "unregister"]
