"""TransformerLens's ``Slice`` with the one reading of indices that the whole package has."""

from typing import Any

import numpy as np
from torch import Tensor
from transformer_lens.utilities import Slice

from tl_loops.arguments import as_index, is_index
from tl_loops.errors import shortened

SliceLike = Slice | int | slice | tuple | list | Tensor | np.ndarray | None
"""What TransformerLens's ``Slice`` takes: an index drops its axis, a tuple is ``slice(*tuple)``."""


class NamedSlice(Slice):
    """A ``Slice`` that raises, with its argument's name, for indices that an axis does not have.

    Args:
        name: Of the argument.
        given: What it was given, see :data:`SliceLike`; integers are of any integer type.

    Raises:
        ValueError: It is none of these, or holds what is no integer.
    """

    def __init__(self, name: str, given: Any):
        self.name = name
        super().__init__(_read(name, given))

    def apply(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Cut one axis of a tensor.

        Raises:
            IndexError: The axis does not have an index that is asked for.
        """
        self._check(tensor.shape[dim])
        return super().apply(tensor, dim)

    def indices(self, max_ctx: int | None = None) -> Any:
        """The indices that are kept of an axis of ``max_ctx`` entries.

        Raises:
            IndexError: The axis does not have an index that is asked for.
        """
        if max_ctx is not None:
            self._check(max_ctx)
        return super().indices(max_ctx)

    def _check(self, length: int) -> None:
        if self.mode not in ("int", "array"):
            return
        asked = np.atleast_1d(np.asarray(self.slice))
        missing = asked[(asked < -length) | (asked >= length)]
        if len(missing):
            raise IndexError(
                f"{self.name} asks for index {missing[0]}, but the axis has {length} entries"
            )


def as_slice(name: str, given: Any, keep_axis: bool = False) -> NamedSlice:
    """The ``Slice`` that an argument means.

    Args:
        name: Of the argument, for messages.
        given: What it was given, see :data:`SliceLike`; what is something else is named below.
        keep_axis: Whether a single index keeps its axis, with one entry.

    Raises:
        ValueError: See :class:`NamedSlice`.
    """
    if keep_axis and is_index(given):
        given = [as_index(name, given)]
    return NamedSlice(name, given)


def _read(name: str, given: Any) -> Any:
    """What ``Slice`` reads as the argument's annotation says."""
    if isinstance(given, Slice):
        given = None if given.mode == "identity" else given.slice
    if given is None:
        return None
    if is_index(given):
        index = as_index(name, given)
        if abs(index) > np.iinfo(np.int64).max:
            raise IndexError(f"{name} asks for index {shortened(given)}, which no axis has")
        return index
    if isinstance(given, (slice, tuple)):
        parts = given if isinstance(given, tuple) else (given.start, given.stop, given.step)
        if 1 <= len(parts) <= 3 and all(part is None or is_index(part) for part in parts):
            return slice(*(None if part is None else as_index(name, part) for part in parts))
    elif isinstance(given, (list, range, Tensor, np.ndarray)):
        indices = given.detach().cpu().numpy() if isinstance(given, Tensor) else _array(given)
        if indices.size == 0 and indices.ndim == 1:
            return np.zeros(0, dtype=np.int64)
        if indices.ndim == 1 and indices.dtype.kind in "iu":
            return indices.astype(np.int64)
    raise ValueError(
        f"{name} must be an index, a list or 1-d tensor of indices, a slice, or up to three "
        f"numbers in a tuple that slice(*tuple) takes, got {shortened(given)}"
    )


def _array(given: Any) -> np.ndarray:
    try:
        return np.asarray(given)
    except ValueError:  # lists of several lengths
        return np.zeros((), dtype=object)
