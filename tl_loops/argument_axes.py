"""Axes of one name have one size: tensors among the arguments of a call, by their annotations."""

import inspect
import typing
from collections.abc import Mapping
from types import NoneType
from typing import Any

from torch import Tensor

from tl_loops.errors import ArgumentError


def annotated_axes(signature: inspect.Signature) -> dict[str, list[str]]:
    """The axes of each parameter whose annotation is that of one tensor, by the parameter."""
    found: dict[str, list[str]] = {}
    for name, parameter in signature.parameters.items():
        one = hasattr(parameter.annotation, "dim_str")
        parts = (parameter.annotation,) if one else typing.get_args(parameter.annotation)
        parts = [part for part in parts if part is not NoneType]
        if len(parts) == 1 and hasattr(parts[0], "dim_str"):
            found[name] = parts[0].dim_str.split()
    return found


def check_axes(axes: Mapping[str, list[str]], arguments: Mapping[str, Any]) -> None:
    """Raise where two arguments have an axis of one name and other sizes.

    Axes that broadcast (``#batch``), are computed or are called ``_`` are not compared.

    Raises:
        ArgumentError: A TypeError and a ValueError that names both arguments and the axis.
    """
    seen: dict[str, tuple[str, Any]] = {}
    for name, words in axes.items():
        value = arguments.get(name)
        if not isinstance(value, Tensor):
            continue
        for axis, size in _sizes(words, list(value.shape)):
            other, expected = seen.setdefault(axis, (name, size))
            if size != expected:
                raise ArgumentError(
                    f"{other} and {name} must agree in the axis {axis}, got {expected} and {size}"
                )


def _sizes(words: list[str], shape: list[int]) -> list[tuple[str, Any]]:
    """The size of each axis that is compared; the shape of those that are many (``*batch``)."""
    many = next((i for i, word in enumerate(words) if word == "..." or word[0] == "*"), None)
    if many is None:
        pairs: list[tuple[str, Any]] = list(zip(words, shape, strict=True))
    else:
        n_last = len(words) - many - 1
        middle = shape[many : len(shape) - n_last]
        pairs = [*zip(words[:many], shape[:many], strict=True), (words[many], middle)]
        pairs += zip(words[many + 1 :], shape[len(shape) - n_last :], strict=True)
    names = ((word.removeprefix("*"), size) for word, size in pairs)
    return [(name, size) for name, size in names if name.isidentifier() and name[0] != "_"]
