"""Results print short in a notebook: what they hold, and of tensors the shape."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

Class = TypeVar("Class", bound=type)

MOST_NUMBERS = 8
"""Of a tensor that is shown itself."""

MOST_CHARACTERS = 60
"""Of any other value."""


def prints_short(cls: Class) -> Class:
    """A class decorator above ``@dataclass``: ``repr`` has one line for each field."""
    type.__setattr__(cls, "__repr__", _repr)
    return cls


def in_short(value: Any) -> str:
    """A value in a few words: a tensor by its shape, unless it has a few numbers only."""
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, Mapping):
        names = ", ".join(map(str, value))
        return _cut(f"{len(value)} by name: {names}" if value else "{}")
    if isinstance(value, tuple | list) and len(repr(value)) > MOST_CHARACTERS:
        return f"{len(value)}, from {in_short(value[0])} to {in_short(value[-1])}"
    if dataclasses.is_dataclass(value) and len(repr(value)) > MOST_CHARACTERS:
        label = getattr(value, "label", None)
        return type(value).__name__ if label is None else str(label)
    return _cut(repr(value))


def _tensor(value: Tensor) -> str:
    dtype = str(value.dtype).removeprefix("torch.")
    if value.ndim > 1 or value.numel() > MOST_NUMBERS or value.is_meta:
        return f"{list(value.shape)} {dtype}"
    if value.ndim == 0:
        return f"{value.item():.4g}" if value.is_floating_point() else str(value.item())
    texts = [f"{x:.4g}" if isinstance(x, float) else str(x) for x in value.tolist()]
    return f"[{', '.join(texts)}] {dtype}"


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}..."


def _repr(self: Any) -> str:
    shown = [field.name for field in dataclasses.fields(self) if field.repr]
    lines = [f"  {name}: {in_short(getattr(self, name))}" for name in shown]
    return "\n".join([type(self).__name__, *lines])
