"""Odd models, prompts, caches and tensors, and what a call with each must end in."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzz.odd_values import Odd, Strange, objects
from tests.fuzz.world import World, feedforward, feedforward_cache, gated, world


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


def single_prompts(value: Tensor, where: World) -> Iterator[Odd]:
    """Tokens [pos], or a text."""
    yield "int32", value.int(), "same"
    yield "not contiguous", torch.stack([value, value], 1)[:, 0], "same"
    yield "numpy", value.numpy(), "same"
    yield "list", value.tolist(), "same"
    yield "text", "Dan likes Hal", "either"
    yield "no text", "", "either"
    yield "one token", value[:1], "either"
    yield "float", value.float(), "error"
    yield "boolean", value > 5, "error"
    yield "no tokens", value[:0], "error"
    yield "two axes", value[None], "error"
    yield "one number", value[0], "error"
    yield "too large ids", value + 1000, "error"
    yield "negative ids", value - 1000, "error"
    yield "beyond the context", value[:1].repeat(200), "error"
    yield "texts", ["Dan", "Hal"], "error"
    yield "None", None, "error"
    yield "number", 5, "error"
    yield "strange", Strange(), "error"


def lines(value: Tensor, where: World) -> Iterator[Odd]:
    """A corpus: tokens in one line."""
    yield "int32", value.int(), "same"
    yield "uint8", value.to(torch.uint8), "same"
    yield "not contiguous", torch.stack([value, value], 1)[:, 0], "same"
    yield "numpy", value.numpy(), "same"
    yield "list", value.tolist(), "same"
    yield "float", value.float(), "error"
    yield "boolean", value > 5, "error"
    yield "no tokens", value[:0], "error"
    yield "one token", value[:1], "error"
    yield "two axes", value[None], "error"
    yield "text", "Dan likes Hal", "error"
    yield "number", 5, "error"
    yield "strange", Strange(), "error"


def conditions(value: Tensor, where: World) -> Iterator[Odd]:
    """Booleans."""
    yield "not contiguous", _strided(value), "same"
    yield "numpy", value.numpy(), "same"
    yield "lists", value.tolist(), "same"
    yield "integers", value.long(), "error"
    yield "floats", value.float(), "error"
    yield "none of the first axis", value[:0], "either"
    yield "one axis more", value[None], "either"
    yield "no axes", value.any(), "either"
    yield "None", None, "error"
    yield "text", "values", "error"
    yield "number", 5, "error"
    yield "strange", Strange(), "error"


def models_without_loop(value: Any, where: World) -> Iterator[Odd]:
    """The models above of which none is changed in place."""
    yield from (odd for odd in models(value, where) if not odd[0].startswith("other"))


def optional_models(value: Any, where: World) -> Iterator[Odd]:
    """Models, where one may be left out."""
    yield from (odd for odd in models(value, where) if odd[0] != "None")


def any_prompts(value: Any, where: World) -> Iterator[Odd]:
    """Prompts of any form that the caller's function takes."""
    yield "texts", ["a", "b"], "either"
    yield "numbers", [1, 2], "either"
    yield "empty", [], "error"
    yield "None", None, "error"
    yield "number", 5, "error"
    yield "strange", Strange(), "error"


def token_ids(value: Any, where: World) -> Iterator[Odd]:
    """One id, or one for each row of logits."""
    yield "numpy integer", np.int64(2), "either"
    yield "tensor", torch.tensor([2]), "either"
    yield "list", [2], "either"
    yield "far too low", -99, "error"
    yield "far too high", 99, "error"
    yield "huge", 10**30, "error"
    yield "float", 1.5, "error"
    yield "boolean", True, "error"
    yield "text", "2", "error"
    yield "strange", Strange(), "error"


def tokens_or_ids(value: Any, where: World) -> Iterator[Odd]:
    """The same, or the text of one token."""
    yield from (odd for odd in token_ids(value, where) if odd[0] != "text")
    yield "text of two tokens", "Dan likes", "error"
