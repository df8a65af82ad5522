"""Choosing iterations, layers, positions and heads."""

from collections.abc import Sequence

Selection = int | Sequence[int]


def chosen_values(axis: str, size: int, selection: Selection | None) -> tuple[int, ...]:
    """The index values along an axis, counted from 0.

    Raises:
        ValueError: The selection is empty or names a value twice.
        IndexError: A value is out of range.
    """
    if selection is None:
        return tuple(range(size))
    chosen = [selection] if isinstance(selection, int) else list(selection)
    if not chosen:
        raise ValueError(
            f"the selection of {axis} is empty: give at least one value, or leave it out"
        )
    for value in chosen:
        if not -size <= value < size:
            raise IndexError(f"there is no {axis} {value}: there are {size}, counted from 0")
    positive = [value % size for value in chosen]
    if len(set(positive)) != len(positive):
        raise ValueError(f"the selection of {axis} names a value twice: {chosen}")
    return tuple(positive)


def contiguous_parts(values: Sequence[int]) -> tuple[slice, ...]:
    """The values as contiguous slices, in ascending order."""
    parts: list[slice] = []
    for value in sorted(values):
        if parts and parts[-1].stop == value:
            parts[-1] = slice(parts[-1].start, value + 1)
        else:
            parts.append(slice(value, value + 1))
    return tuple(parts)
