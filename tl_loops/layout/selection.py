"""The one way to choose iterations, layers, positions and heads."""

from collections.abc import Sequence
from typing import Any, SupportsIndex

from tl_loops.arguments import as_index

Selection = SupportsIndex | slice | Sequence[SupportsIndex]
"""One index, a slice, or several indices; of any integer type, negative ones from the end."""


def one_index(what: str, value: Any, size: int, where: str = "") -> int:
    """One index along per axis, counted from 0.

    Args:
        what: What the axis counts, for the message.
        value: The index; negative counts from the last.
        size: Length of the axis.
        where: Words that say where the index was given, for the message.

    Raises:
        TypeError: It is not an integer.
        IndexError: It is out of range.
    """
    index = as_index(what, value)
    if not -size <= index < size:
        raise IndexError(f"there is no {what} {index}{where}: there are {size}, counted from 0")
    return index % size


def chosen_indices(what: str, size: int, selection: Any) -> tuple[int, ...]:
    """The indices that a selection names along an axis, counted from 0, in its order.

    Args:
        what: What the axis counts, for the message.
        size: Length of the axis.
        selection: One index, a slice, several indices (also an array or a tensor of them), or
            ``None`` for all.

    Raises:
        TypeError: It names something that is not an integer.
        IndexError: An index is out of range.
    """
    if selection is None:
        return tuple(range(size))
    if isinstance(selection, slice):
        return tuple(range(size)[selection])
    return tuple(one_index(what, value, size) for value in each_index(what, selection))


def each_index(what: str, selection: Any) -> tuple[int, ...]:
    """One or several indices as they were given, negative ones included.

    Raises:
        TypeError: It names something that is not an integer.
    """
    # An array or a tensor without axes has an iterator that raises: its axes tell.
    several = hasattr(selection, "__iter__") and getattr(selection, "ndim", 1) > 0
    return tuple(as_index(what, value) for value in (selection if several else [selection]))


def distinct_indices(what: str, size: int, selection: Any) -> tuple[int, ...]:
    """As :func:`chosen_indices`, for at least one index and each at most once.

    Raises:
        TypeError: It names something that is not an integer.
        ValueError: The selection is empty or names an index twice.
        IndexError: An index is out of range.
    """
    chosen = chosen_indices(what, size, selection)
    if not chosen and selection is not None:
        raise ValueError(
            f"the selection of {what} is empty: give at least one value, or leave it out"
        )
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"the selection of {what} names a value twice: {list(chosen)}")
    return chosen


def index_along(what: str, size: int, selection: Any) -> slice | list[int]:
    """What indexes an axis: a slice as it is, indices checked against the axis.

    Raises:
        TypeError: It names something that is not an integer.
        IndexError: An index is out of range.
    """
    if selection is None or isinstance(selection, slice):
        return slice(None) if selection is None else selection
    return list(chosen_indices(what, size, selection))


def contiguous_parts(values: Sequence[int]) -> tuple[slice, ...]:
    """The values as contiguous slices, in ascending order."""
    parts: list[slice] = []
    for value in sorted(values):
        if parts and parts[-1].stop == value:
            parts[-1] = slice(parts[-1].start, value + 1)
        else:
            parts.append(slice(value, value + 1))
    return tuple(parts)


def paired_parts(source: Sequence[int], target: Sequence[int]) -> tuple[tuple[slice, slice], ...]:
    """Two equally long lists of indices as pairs of slices, cut where either one jumps."""
    parts: list[tuple[slice, slice]] = []
    for a, b in zip(source, target, strict=True):
        if parts and (parts[-1][0].stop, parts[-1][1].stop) == (a, b):
            parts[-1] = (slice(parts[-1][0].start, a + 1), slice(parts[-1][1].start, b + 1))
        else:
            parts.append((slice(a, a + 1), slice(b, b + 1)))
    return tuple(parts)
