"""Sizes, digits and limits that a caller may give a figure or a view, checked."""

import math
from typing import Any

from tl_loops.arguments import argument

Limits = tuple[float | int, float | int]
_LEAST, _MOST = 10, 100_000


def size_in_pixels(name: str, size: Any) -> float | int:
    """A width or a height in pixels.

    Raises:
        ValueError: It is no number, or one that nothing can be drawn at.
    """
    size = argument(name, size, float | int)
    if not _LEAST <= size <= _MOST:
        raise ValueError(f"{name} must be {_LEAST} to {_MOST} pixels, got {size}")
    return size


def decimals(digits: int) -> int:
    """How many decimals are kept.

    Raises:
        ValueError: They are fewer than none.
    """
    if not 0 <= digits <= 15:
        raise ValueError(f"digits must be 0 to 15 decimals, got {digits}")
    return digits


def finite_limits(limits: Limits) -> Limits:
    """The ends of a scale.

    Raises:
        ValueError: One is not finite.
    """
    if not all(math.isfinite(end) for end in limits):
        raise ValueError(f"limits must be two finite numbers, got {tuple(limits)}")
    return limits
