"""Labels of heads and neurons by their coordinate."""

from collections.abc import Iterable

from tl_loops.layout.layout import LoopLayout


def part_labels(layout: LoopLayout, block: int, part: str, numbers: Iterable[int]) -> list[str]:
    """Labels of heads (part ``"H"``) or neurons (``"N"``): ``"r3.L1H4"``, ``"p.L0H2"``."""
    at = layout.coordinate(block)
    return [f"{at.place}.L{at.layer}{part}{number}" for number in numbers]


def part_label(layout: LoopLayout, block: int, part: str, number: int) -> str:
    """One of :func:`part_labels`."""
    return part_labels(layout, block, part, [number])[0]
