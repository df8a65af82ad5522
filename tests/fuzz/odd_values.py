"""Odd values of arguments by kind, and what a call with each must end in."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.world import World, feedforward, feedforward_cache, gated, world

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


def models(value: Any, where: World) -> Iterator[Odd]:
    """Models of other kinds, widths, depths."""
    yield "None", None, "error"
    yield "text", "tl-loops-tiny", "either"
    yield "number", 5, "error"
    yield "module", torch.nn.Linear(2, 2), "error"
    yield "strange", Strange(), "error"
    yield "feedforward", feedforward(), "either"
    yield "other width", gated(where.n_iterations, where.dtype), "either"
    yield "other depth", world(n_iterations=where.n_iterations + 1).model, "either"


def prompts(value: Tensor, where: World) -> Iterator[Odd]:
    """Tokens [batch, pos]."""
    yield "not contiguous", value.mT.contiguous().mT, "same"
    yield "int32", value.int(), "same"
    yield "uint8", value.to(torch.uint8), "same"
    yield "numpy", value.numpy(), "either"
    yield "lists", value.tolist(), "either"
    yield "float", value.float(), "error"
    yield "boolean", value > 5, "error"
    yield "complex", value.to(torch.complex64), "error"
    yield "no rows", value[:0], "error"
    yield "no positions", value[:, :0], "error"
    yield "one position", value[:, :1], "either"
    yield "one row", value[:1], "either"
    yield "[pos]", value[0], "either"
    yield "one number", value[0, 0], "error"
    yield "three axes", value[None], "error"
    yield "more rows", value[[0, 0, 0]], "either"
    yield "too large ids", value + 1000, "error"
    yield "negative ids", value - 1000, "error"
    yield "beyond the context", value[:, :1].repeat(1, 200), "error"
    yield "None", None, "error"
    yield "number", 5, "error"
    yield "no text", "", "either"
    yield "empty list", [], "error"
    yield "list of None", [None], "error"
    yield "strange", Strange(), "error"


def prompt_lists(value: list[Tensor], where: World) -> Iterator[Odd]:
    """Lists of prompts."""
    yield "generator", (x for x in value), "same"
    yield "int32", [x.int() for x in value], "same"
    yield "not contiguous", [torch.stack([x, x], 1)[:, 0] for x in value], "same"
    yield "numpy", [x.numpy() for x in value], "either"
    yield "one token each", [x[:1] for x in value], "either"
    yield "other lengths", [value[0], value[0][:2]], "either"
    yield "no tokens", [value[0][:0]], "error"
    yield "floats", [x.float() for x in value], "error"
    yield "booleans", [x > 5 for x in value], "error"
    yield "two axes", [x[None] for x in value], "error"
    yield "too large ids", [x + 1000 for x in value], "error"
    yield "one tensor", torch.stack(value), "either"
    yield "numbers", [3, 4], "error"
    yield "mixed", [value[0], "Dan"], "error"
    yield "empty", [], "error"
    yield "text", "Dan", "error"
    yield "None", None, "error"
    yield "number", 5, "error"
    yield "strange", Strange(), "error"


def caches(value: Any, where: World) -> Iterator[Odd]:
    """Caches of other runs, and what is no cache."""
    tensors = dict(value.items())
    yield "dictionary", tensors, "either"
    yield "not contiguous", {k: _strided(v) for k, v in tensors.items()}, "either"
    yield "float64", {k: v.double() for k, v in tensors.items()}, "either"
    yield "bfloat16", {k: v.bfloat16() for k, v in tensors.items()}, "either"
    yield "NaN", {k: v * math.nan for k, v in tensors.items()}, "either"
    yield "integers", {k: v.long() for k, v in tensors.items()}, "either"
    yield "without axes", {k: v.sum() for k, v in tensors.items()}, "error"
    yield "two axes", {k: v[0, 0] for k, v in tensors.items()}, "error"
    yield "lists", {k: v.tolist() for k, v in tensors.items()}, "error"
    yield "empty", {}, "error"
    yield "None", None, "error"
    yield "list", [1], "error"
    yield "text", "cache", "error"
    yield "strange", Strange(), "error"
    shape = dict(rows=where.rows, n_pos=where.n_pos, n_iterations=where.n_iterations)
    yield "one prompt", world(**{**shape, "rows": 1}).cache, "either"
    yield "three prompts", world(**{**shape, "rows": where.rows + 1}).cache, "either"
    yield "other length", world(**{**shape, "n_pos": where.n_pos + 1}).cache, "either"
    yield "other depth", world(**{**shape, "n_iterations": where.n_iterations + 1}).cache, "either"
    yield "other model", world(**shape).gated_cache, "either"
    yield "feedforward", feedforward_cache(where.rows, where.n_pos), "either"
    single = world(**{**shape, "rows": 1})
    yield "without a batch axis", single.cache_without_batch, "either"


def _strided(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.ndim > 1 else x


def tensors(value: Tensor, where: World) -> Iterator[Odd]:
    """Numbers to draw or to reduce."""
    if value.is_floating_point():
        yield "float64", value.double(), "same"
        yield "bfloat16", value.bfloat16(), "near"
        yield "float16", value.half(), "near"
        yield "NaN", value * math.nan, "either"
        yield "infinity", value + math.inf, "either"
        yield "needs gradients", value.clone().requires_grad_(), "same"
    else:
        yield "int32", value.int(), "same"
        yield "float", value.float(), "either"
    yield "not contiguous", _strided(value), "same"
    yield "complex", value.to(torch.complex64), "either"
    yield "booleans", value > 0, "either"
    yield "integers", value.long(), "either"
    yield "numpy", value.detach().numpy(), "either"
    yield "lists", value.tolist(), "either"
    yield "none of the first axis", value[:0], "either"
    yield "none of the last axis", value[..., :0], "either"
    yield "one of the first axis", value[:1], "either"
    yield "one axis more", value[None], "either"
    yield "one axis less", value[0], "either"
    yield "no axes", value.sum(), "either"
    yield "None", None, "error"
    yield "text", "values", "error"
    yield "number", 5, "error"
    yield "strange", Strange(), "error"


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


def sources(value: Any, where: World) -> Iterator[Odd]:
    """A cache, a profile or a tensor."""
    if isinstance(value, Tensor):
        yield from tensors(value, where)
        return
    yield from (odd for odd in objects(value, where) if odd[0] != "list")
    yield "list", [1], "either"
    yield "numbers without axes", torch.tensor(1.0), "error"
    yield "empty", torch.zeros(0), "either"
    yield "a vector", torch.ones(3), "either"
    yield "a matrix", torch.ones(3, 3), "either"
    if hasattr(value, "cache_dict"):
        yield "other depth", world(n_iterations=where.n_iterations + 1).cache, "either"
        yield "feedforward", feedforward_cache(where.rows, where.n_pos), "either"
        kept = {"names_filter": lambda name: name == "hook_embed"}
        yield "embedding alone", where.model.run_with_cache(where.clean, **kept)[1], "error"


def masks(value: Any, where: World) -> Iterator[Odd]:
    """Masks [batch, pos]."""
    ones = torch.ones(where.rows, where.n_pos, dtype=torch.long)
    yield "ones", ones, "same"
    yield "booleans", ones.bool(), "same"
    yield "floats", ones.float(), "either"
    yield "numpy", ones.numpy(), "either"
    yield "lists", ones.tolist(), "either"
    yield "zeros", 0 * ones, "error"
    yield "NaN", ones * math.nan, "error"
    yield "other numbers", 2 * ones, "either"
    yield "other shape", ones[:, :-1], "error"
    yield "one row", ones[0], "either"
    yield "no rows", ones[:0], "error"
    yield "text", "mask", "error"
    yield "number", 5, "error"
    yield "strange", Strange(), "error"


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


def token_texts(value: Any, where: World) -> Iterator[Odd]:
    """A prompt whose tokens are shown."""
    yield "text", "Dan likes Hal", "either"
    yield "one token", torch.tensor([3]), "either"
    yield "no tokens", torch.zeros(0, dtype=torch.long), "either"
    yield "too large ids", torch.full((where.n_pos,), 10**6), "error"
    yield "floats", torch.zeros(where.n_pos), "error"
    yield "several prompts", where.clean[[0, 0, 0]], "either"
    yield "numbers", list(range(where.n_pos)), "either"
    yield "empty", [], "either"
    yield "number", 5, "error"
    yield "strange", Strange(), "error"


def about(value: Any, where: World) -> Iterator[Odd]:
    """What prompts a figure is about."""
    yield "numpy integer", np.int64(3), "either"
    yield "tokens", where.clean, "either"
    yield "texts", ["a", "b"], "either"
    yield "text", "a\nb", "either"
    yield "boolean", True, "error"
    yield "float", 1.5, "error"
    yield "below 0", -1, "error"
    yield "floats", torch.zeros(2, 3), "error"
    yield "without axes", torch.tensor(3), "either"
    yield "empty", [], "either"
    yield "strange", Strange(), "error"


def models_or_names(value: Any, where: World) -> Iterator[Odd]:
    """A model, or its name, that a figure is about."""
    yield "name", "my model", "either"
    yield "number", 5, "error"
    yield "module", torch.nn.Linear(2, 2), "error"
    yield "strange", Strange(), "error"
    yield "feedforward", feedforward(), "either"
    yield "other depth", world(n_iterations=where.n_iterations + 1).model, "either"


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
