"""Odd values of arguments by kind, and what a call with each must end in."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch

from tests.fuzz.world import World

Ends = Literal["same", "near", "error", "either"]
"""With the plain call's result, near it, in an error of ours, or in one of these two: in numbers
that may be others, or in an error of ours."""
Odd = tuple[str, Any, Ends]
Kind = Callable[[Any, World], Iterator[Odd]]


class Strange:
    """An object that is nothing that a tool knows."""

    def __repr__(self) -> str:
        return "<strange>"


def integers(value: Any, where: World) -> Iterator[Odd]:
    """A count or an index."""
    if value is not None:
        yield "numpy integer", np.int64(value), "same"
        yield "tensor without axes", torch.tensor(value), "same"
        yield "float of the same value", float(value), "error"
        yield "text of digits", str(value), "error"
        yield "in a list", [value], "error"
    yield "half", 1.5, "error"
    yield "boolean", True, "error"
    yield "numpy boolean", np.bool_(True), "error"
    yield "NaN", math.nan, "error"
    yield "far too low", -99, "error"
    yield "bytes", b"1", "error"
    yield "strange", Strange(), "error"
    if value is not None:
        yield "None", None, "either"


def indices(value: Any, where: World) -> Iterator[Odd]:
    """One index: a count, and one beyond the end."""
    yield from integers(value, where)
    yield "far too high", 99, "error"
    yield "huge", 10**30, "error"


def selections(value: Any, where: World) -> Iterator[Odd]:
    """One or several indices."""
    yield "numpy integer", np.int64(0), "either"
    yield "numpy array", np.array([0]), "either"
    yield "tensor", torch.tensor([0]), "either"
    yield "range", range(1), "either"
    yield "slice", slice(0, 1), "either"
    yield "from the end", [-1], "either"
    yield "empty list", [], "either"
    yield "empty tensor", torch.zeros(0, dtype=torch.long), "either"
    yield "twice", [0, 0], "either"
    yield "beyond", 99, "error"
    yield "beyond below", [-99], "error"
    yield "huge", 10**30, "error"
    yield "float", 1.0, "error"
    yield "floats", [0.0], "error"
    yield "float tensor", torch.zeros(1), "error"
    yield "boolean", True, "error"
    yield "booleans", [False, True], "error"
    yield "boolean tensor", torch.tensor([True]), "error"
    yield "NaN", [math.nan], "error"
    yield "text", "0", "error"
    yield "list of lists", [[0]], "error"
    yield "list with None", [None], "error"
    yield "strange", Strange(), "error"


def slices(value: Any, where: World) -> Iterator[Odd]:
    """Indices, or a slice as TransformerLens writes one."""
    yield "pair", (0, 1), "either"
    yield "three", (0, 2, 2), "either"
    yield "no numbers", (None, None, None), "either"
    yield "four", (0, 1, 1, 1), "error"
    yield from (odd for odd in selections(value, where) if odd[0] != "list of lists")


def numbers(value: Any, where: World) -> Iterator[Odd]:
    """A number that may be broken."""
    if value is not None:
        yield "numpy number", np.float64(value), "same"
        yield "tensor without axes", torch.tensor(float(value)), "same"
    yield "text", "1", "error"
    yield "complex", 1j, "error"
    yield "in a list", [[1.0]], "error"
    yield "boolean", True, "error"
    yield "NaN", math.nan, "either"
    yield "infinity", math.inf, "either"
    yield "strange", Strange(), "error"


def flags(value: Any, where: World) -> Iterator[Odd]:
    """True or False."""
    if value is not None:
        yield "numpy boolean", np.bool_(value), "same"
    yield "text", "no", "error"
    yield "number", 0.5, "error"
    yield "strange", Strange(), "error"
    yield "several", np.array([True, False]), "error"


def choices(value: Any, where: World) -> Iterator[Odd]:
    """One of some words."""
    yield "unknown", "nope", "error"
    yield "empty", "", "either"
    yield "bytes", b"zero", "error"
    yield "number", 5, "error"
    yield "NaN", math.nan, "error"
    yield "in a list", [value], "either"
    yield "strange", Strange(), "error"


def seeds(value: Any, where: World) -> Iterator[Odd]:
    """A seed, of which any integer is one."""
    yield from (odd for odd in integers(value, where) if odd[0] != "far too low")


def words(value: Any, where: World) -> Iterator[Odd]:
    """Free text."""
    yield "empty", "", "either"
    yield "markup", "<script>\u2028&", "either"
    yield "half a surrogate pair", "\ud800", "either"
    yield "number", 5, "error"
    yield "bytes", b"x", "error"
    yield "strange", Strange(), "error"


def names(value: Any, where: World) -> Iterator[Odd]:
    """Names of axes, metrics, points, outputs of blocks."""
    if value is not None:
        listed = [value] if isinstance(value, str) else list(value)
        yield "tuple", tuple(listed), "either"
        yield "list", listed, "same" if not isinstance(value, str) else "either"
        yield "twice", listed * 2, "either"
    yield "none", (), "either"
    yield "unknown", ("nope",), "either"
    yield "text unknown", "nope", "either"
    yield "numbers", (0, 1), "error"
    yield "number", 5, "error"
    yield "with None", (None,), "error"
    yield "strange", Strange(), "error"


def mappings(value: Any, where: World) -> Iterator[Odd]:
    """By name."""
    yield "list", [1], "error"
    yield "text", "pos", "error"
    yield "number", 5, "error"
    yield "strange", Strange(), "error"


def places(value: Any, where: World) -> Iterator[Odd]:
    """Values to which axes are restricted."""
    yield "none", {}, "either"
    yield "unknown axis", {"nope": 0}, "error"
    yield "axis that is no text", {0: 0}, "error"
    yield from mappings(value, where)
    for name, odd, ends in selections(None, where):
        yield f"pos: {name}", {"pos": odd}, ends


def metrics(value: Any, where: World) -> Iterator[Odd]:
    """Functions of the logits."""
    yield "not callable", "mean", "error"
    yield "None", None, "error"
    yield "a vector", lambda logits: logits[0, 0], "error"
    yield "nothing", lambda logits: None, "error"
    yield "text", lambda logits: "1.0", "error"
    yield "one element", lambda logits: value(logits).reshape(1, 1), "same"
    yield "float64", lambda logits: value(logits).double(), "same"
    yield "NaN", lambda logits: value(logits) * math.nan, "either"
    yield "numpy number", lambda logits: np.float64(value(logits).item()), "either"
    yield "number", lambda logits: value(logits).item(), "either"
    yield "integer", lambda logits: logits.argmax(), "either"
    yield "complex", lambda logits: value(logits) * 1j, "error"


def objects(value: Any, where: World) -> Iterator[Odd]:
    """What only a tool gives, such as a profile or the result of a lens."""
    yield "None", None, "error"
    yield "number", 5, "error"
    yield "text", "x", "error"
    yield "list", [1], "error"
    yield "mapping", {"a": 1}, "error"
    yield "strange", Strange(), "error"


def optional_objects(value: Any, where: World) -> Iterator[Odd]:
    """The same, where it may be left out."""
    for odd in objects(value, where):
        if odd[0] != "None":
            yield odd


def limits(value: Any, where: World) -> Iterator[Odd]:
    """Ends of a scale."""
    yield "list", [0.0, 1.0], "either"
    yield "numpy", np.array([0.0, 1.0]), "either"
    yield "equal", (1.0, 1.0), "either"
    yield "swapped", (1.0, 0.0), "either"
    yield "NaN", (math.nan, 1.0), "error"
    yield "infinite", (0.0, math.inf), "error"
    yield "one", (0.0,), "error"
    yield "three", (0.0, 1.0, 2.0), "error"
    yield "text", "01", "error"
    yield "number", 1.0, "error"
    yield "words", ("a", "b"), "error"
    yield "strange", Strange(), "error"


def several(value: Any, where: World) -> Iterator[Odd]:
    """Lists of things that a tool joins with others."""
    yield "empty", [], "either"
    yield "numbers", [1, 2], "either"
    yield "texts", ["a"], "error"
    yield "number", 5, "error"
    yield "strange", Strange(), "error"
    yield "list of strange", [Strange()], "error"
    yield "list of None", [None], "error"


def functions(value: Any, where: World) -> Iterator[Odd]:
    """Something to call."""
    yield "number", 5, "error"
    yield "strange", Strange(), "error"


def paths(value: Any, where: World) -> Iterator[Odd]:
    """Where a file goes."""
    yield "number", 5, "error"
    yield "boolean", True, "error"
    yield "strange", Strange(), "error"
    yield "no directory", "/nowhere/at/all", "error"
    yield "null byte", "a\0b", "error"


def axis_values(value: Any, where: World) -> Iterator[Odd]:
    """Places along an axis."""
    yield "tensor", torch.arange(4), "same"
    yield "numpy", np.arange(4), "same"
    yield "range", range(4), "same"
    yield "bfloat16", torch.arange(4).bfloat16(), "same"
    yield "too few", [0, 1], "error"
    yield "NaN", [0.0, math.nan, 2.0, 3.0], "either"
    yield "text", "nope", "error"
    yield "texts", ["a", "b", "c", "d"], "error"
    yield "number", 5, "error"
    yield "strange", Strange(), "error"


def positions(value: Any, where: World) -> Iterator[Odd]:
    """Where a lens reads: words, indices, or [batch, read]."""
    yield "last", "last", "either"
    yield "for each prompt", torch.zeros(where.rows, 2, dtype=torch.long), "either"
    yield "for three prompts", torch.zeros(where.rows + 1, 2, dtype=torch.long), "error"
    yield "three axes", torch.zeros(1, 1, 1, dtype=torch.long), "error"
    yield from (odd for odd in selections(value, where) if odd[0] != "list of lists")


def unknown(value: Any, where: World) -> Iterator[Odd]:
    """An argument that there is not."""
    yield "any", 1, "error"


def shards(value: Any, where: World) -> Iterator[Odd]:
    """Which part of a run is done here."""
    yield "no file", (0, 2), "either"
    yield "one number", 1, "error"
    yield "three numbers", (0, 1, 2), "error"
    yield "out of range", (2, 2), "error"
    yield "floats", (0.0, 2.0), "error"
    yield "text", "nope", "error"
    yield "strange", Strange(), "error"


def counts(value: Any, where: World) -> Iterator[Odd]:
    """Several counts."""
    yield "numpy array", np.array([1, 2]), "either"
    yield "tensor", torch.tensor([1, 2]), "either"
    yield "tuple", (1, 2), "either"
    yield "empty", [], "either"
    yield "twice", [1, 1], "either"
    yield "floats", [1.5], "error"
    yield "booleans", [True], "error"
    yield "below 0", [-1], "error"
    yield "huge", [10**30], "error"
    yield "texts", ["1"], "error"
    yield "text", "12", "error"
    yield "number", 5, "error"
    yield "list with None", [None], "error"
    yield "strange", Strange(), "error"


def optional_choices(value: Any, where: World) -> Iterator[Odd]:
    """One of some words, or none of them."""
    yield from (odd for odd in choices(value, where) if odd[0] != "None")


def log_bases(value: Any, where: World) -> Iterator[Odd]:
    """The base of a logarithm: a number above 0, or "e"."""
    yield from (odd for odd in choices(value, where) if odd[0] not in ("number", "NaN"))
    yield "number", 5, "either"
    yield "one", 1, "error"
    yield "below 0", -2.0, "error"
    yield "NaN", math.nan, "error"


_RANGES = ("far too low", "far too high", "huge", "beyond", "beyond below", "too large ids")
_RANGES += ("negative ids",)


def unranged(kind: Kind) -> Kind:
    """The same, where nothing says yet how far an index may go."""

    def without_range(value: Any, where: World) -> Iterator[Odd]:
        for name, odd, ends in kind(value, where):
            yield name, odd, "either" if name in _RANGES else ends

    return without_range


def other_result(kind: Kind) -> Kind:
    """The same, where the result says that the argument was given."""

    def without_numbers(value: Any, where: World) -> Iterator[Odd]:
        for name, odd, ends in kind(value, where):
            yield name, odd, ends if ends == "error" else "either"

    return without_numbers


def ignored(value: Any, where: World) -> Iterator[Odd]:
    """A word that says nothing here, as in TransformerLens."""
    for name, odd, _ in choices(value, where):
        yield name, odd, "either"


def words_or_labels(value: Any, where: World) -> Iterator[Odd]:
    """One label for each of twelve prompts."""
    yield "texts", ["a", "b"] * 6, "either"
    yield "numpy", np.array([0, 1] * 6), "same"
    yield "tensor", torch.tensor([0, 1] * 6), "same"
    yield "booleans", [False, True] * 6, "either"
    yield "one class", [0] * 12, "error"
    yield "too few", [0, 1], "error"
    yield "empty", [], "error"
    yield "number", 5, "error"
    yield "None", None, "error"
    yield "strange", Strange(), "error"


def bounds(value: Any, where: World) -> Iterator[Odd]:
    """The least and the largest value that there can be, which may be infinite."""
    yield from (odd for odd in limits(value, where) if odd[0] != "infinite")
    yield "infinite", (0.0, math.inf), "either"
