"""Looping a feedforward model: some of its blocks run several times, over its own weights."""

from tl_loops.model.repeated.loop import loop
from tl_loops.model.repeated.transformer import RepeatedTransformer

__all__ = ["RepeatedTransformer", "loop"]
