"""The activation cache of a looped model, and its decompositions."""

from tl_loops.cache.cache import LoopedActivationCache

__all__ = ["LoopedActivationCache"]
