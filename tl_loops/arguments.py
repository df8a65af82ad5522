"""Arguments of public functions, checked by their annotations: one sentence for a wrong kind.

What an annotation cannot say (a range, shapes that must agree) each function checks itself.
"""

import inspect
import operator
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from numbers import Real
from types import UnionType
from typing import Any, Literal, ParamSpec, SupportsIndex, TypeVar, Union

import numpy as np
import torch
from torch import Tensor

from tl_loops.argument_axes import annotated_axes, check_axes
from tl_loops.errors import ArgumentError, shortened

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Record = TypeVar("Record")
_EXPECTED: dict[Any, tuple[Callable[[Any], bool], str, str]] = {}


class _Wrong(Exception):
    """A value is not of the kind; the message is what is expected instead, where that is known."""


@dataclass(frozen=True)
class Kind:
    """What an annotation takes.

    Attributes:
        read: Gives the value as the function is to get it, or raises ``_Wrong``.
        words: What it takes, for a message.
        lacks: What another value lacks, for the end of a message.
        strict: As ``read``, for values that need no conversion; ``None``: ``read`` converts none.
    """

    read: Callable[[Any], Any]
    words: str
    lacks: str = ""
    strict: Callable[[Any], Any] | None = None


def expect(annotation: Any, accepts: Callable[[Any], bool], words: str, lacks: str) -> None:
    """Say what a class that stands in annotations takes, where ``isinstance`` does not say it."""
    _EXPECTED[annotation] = accepts, words, lacks


def checked(
    function: Callable[Arguments, Result], integers_as_floats: bool = True
) -> Callable[Arguments, Result]:
    """Check the arguments of a public function by its annotations, before it does anything.

    Integers and numbers of numpy and of tensors without axes become Python's; arrays and lists
    become tensors where the annotation is a tensor's, whose integers become int64. Tensors with an
    axis of one name must agree in it. Annotations that say nothing (``Any``) are
    not checked.

    Args:
        function: Raises ``ArgumentError`` from now on: a TypeError and a ValueError.
        integers_as_floats: Whether a tensor of integers becomes one of float64 where the annotation
            holds floating point numbers.
    """
    signature = inspect.signature(function)
    kinds: dict[str, Kind] = {}
    axes = annotated_axes(signature)

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if not kinds:
            kinds.update(_kinds_of(function, signature, not integers_as_floats))
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python's own message names the function.
        for name, value in bound.arguments.items():
            if name in kinds:
                bound.arguments[name] = _read(name, value, kinds[name])
        if len(axes) > 1:
            check_axes(axes, bound.arguments)
        return function(*bound.args, **bound.kwargs)

    return call


def checked_fields(record: type[Record]) -> type[Record]:
    """Check the fields of a dataclass as :func:`checked` checks arguments, when one is made."""
    record.__init__ = checked(record.__init__)
    return record


def argument(name: str, value: Any, annotation: Any) -> Any:
    """One argument as an annotation takes it, for those that come by ``**``.

    Raises:
        ArgumentError: It is of another kind.
    """
    kind = _kind(annotation)
    return value if kind is None else _read(name, value, kind)


def check_at_least(least: float | int, /, **numbers: float | int | None) -> None:
    """Raise on numbers below a bound, by name; ``None`` was left out.

    Raises:
        ValueError: There is one, or one that is NaN.
    """
    for name, number in numbers.items():
        if number is not None and not number >= least:
            raise ValueError(f"{name} must be at least {least}, got {number}")


def is_index(value: Any) -> bool:
    """Whether a value is one index: an integer of any type (numpy, 0-d tensor), but no bool."""
    return _index_of(value) is not None


def as_index(what: str, value: Any) -> int:
    """One integer of any integer type.

    Args:
        what: What it counts, for the message.
        value: An int, a numpy integer, an integer tensor without axes, ...

    Raises:
        TypeError: It is not an integer, or it is a bool.
    """
    if (index := _index_of(value)) is None:
        raise TypeError(f"{what} must be an integer, got {shortened(value)}")
    return index


def _index_of(value: Any) -> int | None:
    """One integer, else ``None``: with no message, which would write out a whole tensor."""
    # A tensor of one element with axes would pass for an index, a bool tensor for 0 or 1.
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if is_bool or getattr(value, "ndim", 0) != 0:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _kinds_of(
    function: Callable[..., Any], signature: inspect.Signature, exact: bool
) -> dict[str, Kind]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = {
        name: _kind(_resolved(parameter.annotation, function), exact)
        for name, parameter in signature.parameters.items()
        if parameter.kind not in variadic and parameter.annotation is not parameter.empty
    }
    return {name: kind for name, kind in found.items() if kind is not None}


def _resolved(annotation: Any, function: Callable[..., Any]) -> Any:
    """What an annotation in quotes names; ``Any`` where it names what only type checkers see."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, getattr(inspect.unwrap(function), "__globals__", {}))
    except NameError:
        return Any


def _read(name: str, value: Any, kind: Kind) -> Any:
    try:
        return kind.read(value)
    except _Wrong as wrong:
        expected = str(wrong) or kind.words
    lacks = f", which has {kind.lacks}" if kind.lacks else ""
    raise ArgumentError(f"{name} must be {expected}, got {described(value)}{lacks}")


def described(value: Any) -> str:
    """A value for a message: numbers and axes of a tensor or an array, else the value itself."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return f"a {str(value.dtype).removeprefix('torch.')} {kind} of shape {list(value.shape)}"
    return shortened(value)


@cache
def _kind(annotation: Any, exact: bool = False) -> Kind | None:
    """What an annotation takes; ``None`` where it takes everything.

    Args:
        annotation: A type.
        exact: Whether a tensor of integers is none of floating point numbers.
    """
    if annotation in (Any, object):  # From Python 3.11 on Any is a class, too.
        return None
    if annotation in _EXPECTED:
        return _instance(*_EXPECTED[annotation])
    if annotation in (int, SupportsIndex):
        return Kind(_integer, "an integer")
    if annotation is float:
        return Kind(_number, "a number")
    if annotation is bool:
        return Kind(_flag, "True or False")
    if annotation is None or annotation is type(None):
        return _instance(lambda value: value is None, "None")
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, UnionType):
        return _union([_kind(part, exact) for part in parts])
    if origin is Literal:
        return _choice(parts)
    if origin is not None and isinstance(origin, type):
        if issubclass(origin, Mapping):
            values = _kind(parts[1], exact) if len(parts) == 2 else None
            return _mapping(values, parts[:1] == (str,))
        if origin is tuple:
            repeated = parts[-1:] == (Ellipsis,)
            listed = parts[:1] if repeated else parts
            return _tuple([_kind(part, exact) for part in listed], repeated)
        if origin in (list, Sequence, Iterable):
            return _sequence(_kind(parts[0], exact), origin is Iterable, parts[0] is str)
        if issubclass(origin, Callable):
            return _instance(callable, "a function")
        return _instance(lambda value: isinstance(value, origin), f"a {origin.__name__}")
    if hasattr(annotation, "dim_str") and hasattr(annotation, "dtypes"):
        return Kind(
            lambda value: _tensor(value, annotation, exact),
            _tensor_words(annotation),
            strict=lambda value: _tensor(value, annotation, convert=False),
        )
    if annotation is str:
        return _instance(lambda value: isinstance(value, str), "text")
    if isinstance(annotation, type):
        protocol = getattr(annotation, "_is_protocol", False)
        if not protocol or getattr(annotation, "_is_runtime_protocol", False):
            name = annotation.__name__
            article = "an" if name[0] in "AEIOU" else "a"
            return _instance(lambda value: isinstance(value, annotation), f"{article} {name}")
    return None


def _instance(accepts: Callable[[Any], bool], words: str, lacks: str = "") -> Kind:
    def read(value: Any) -> Any:
        if not accepts(value):
            raise _Wrong
        return value

    return Kind(read, words, lacks)


def _choice(options: tuple[Any, ...]) -> Kind:
    shown = [repr(option) for option in options]
    words = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
    return _instance(lambda value: isinstance(value, str) and value in options, words)


def _integer(value: Any) -> int:
    if (index := _index_of(value)) is None:
        raise _Wrong
    return index


def _number(value: Any) -> Any:
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise _Wrong
    return value


def _flag(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, bool):
        raise _Wrong
    return value


def _union(kinds: list[Kind | None]) -> Kind | None:
    """Any of several; nothing is known of it where one of them takes everything."""
    known = [kind for kind in kinds if kind is not None]
    if len(known) < len(kinds):
        return None
    words = list(dict.fromkeys(kind.words for kind in known))
    if words[:2] == ["a number", "an integer"]:
        words.pop(1)  # which is a number

    def read(value: Any) -> Any:
        # What one of them takes as it is, no other converts.
        for read in (*(kind.strict or kind.read for kind in known), *(k.read for k in known)):
            try:
                return read(value)
            except _Wrong:
                continue
        raise _Wrong

    return Kind(read, ", ".join(words[:-1]) + f" or {words[-1]}" if words[1:] else words[0])


def _mapping(values: Kind | None, by_name: bool) -> Kind:
    words = "a mapping by name" if by_name else "a mapping"
    words += f", each value {values.words}" if values is not None else ""

    def read(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise _Wrong
        if by_name and not all(isinstance(key, str) for key in value):
            raise _Wrong
        return {k: v if values is None else values.read(v) for k, v in value.items()}

    return Kind(read, words)


def _sequence(parts: Kind | None, once: bool, of_text: bool) -> Kind:
    """A list or another sequence; one text stands for itself where texts are listed."""
    words = "a list" if parts is None else f"a list, each entry {parts.words}"

    def read(value: Any) -> Any:
        if isinstance(value, str) and of_text:
            value = (value,)
        if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
            raise _Wrong
        if getattr(value, "ndim", 1) == 0 or not (once or hasattr(value, "__len__")):
            raise _Wrong
        if parts is None or once:
            return value
        read_parts = [parts.read(part) for part in value]
        return tuple(read_parts) if isinstance(value, tuple) else read_parts

    return Kind(read, words)


def _tuple(parts: list[Kind | None], repeated: bool) -> Kind:
    """Each value of its kind; with ``repeated`` any number of values of one kind."""
    each = ", ".join("any" if p is None else p.words for p in parts)
    words = f"values, each {each}" if repeated else f"{len(parts)} values, {each}"

    def read(value: Any) -> Any:
        if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
            raise _Wrong
        listed = list(value) if getattr(value, "ndim", 1) else []
        kinds = parts * len(listed) if repeated else parts
        if len(listed) != len(kinds):
            raise _Wrong
        pairs = zip(listed, kinds, strict=True)
        return tuple(one if part is None else part.read(one) for one, part in pairs)

    def strict(value: Any) -> Any:
        # Where lists are taken as well, they may mean something else: positions, not a slice.
        if not isinstance(value, tuple):
            raise _Wrong
        return read(value)

    return Kind(read, words, strict=strict)


def _tensor(value: Any, annotation: Any, exact: bool = False, convert: bool = True) -> Tensor:
    """A tensor of the annotation's kind of numbers and number of axes."""
    if convert and isinstance(value, (list, tuple, np.ndarray)):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise _Wrong from None
    if not isinstance(value, Tensor):
        raise _Wrong
    known = annotation.dtypes
    if isinstance(known, (list, tuple)):
        dtype = str(value.dtype).removeprefix("torch.")
        whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        if convert and not exact and "float32" in known and whole:
            value, dtype = value.double(), "float64"
        if "int64" in known and whole:
            value, dtype = value.long(), "int64"
        if dtype not in known:
            raise _Wrong
    named, any_more = _axes(annotation)
    if value.ndim != len(named) and not (any_more and value.ndim >= len(named)):
        raise _Wrong
    return value


def _axes(annotation: Any) -> tuple[list[str], bool]:
    """Names of the axes that there must be, and whether there may be more."""
    words = annotation.dim_str.split()
    named = [word for word in words if word != "..." and not word.startswith("*")]
    return named, len(named) < len(words)


def _tensor_words(annotation: Any) -> str:
    axes = ["..." if word.startswith("*") else word for word in annotation.dim_str.split()]
    known = annotation.dtypes
    numbers = ""
    if isinstance(known, (list, tuple)):
        numbers = " of booleans" if "bool" in known else " of integers"
        numbers = " of floating point numbers" if "float32" in known else numbers
    return f"a tensor [{', '.join(axes)}]{numbers}" if axes else f"a tensor without axes{numbers}"
