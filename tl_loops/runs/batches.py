"""Prompts as token tensors, each at its own length, in batches of equal length."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_loops.errors import shortened
from tl_loops.layout.model import Model
from tl_loops.upstream import model_input


def token_prompts(
    model: Model, prompts: Iterable[Any], at_least: int = 1
) -> list[Int[Tensor, "_"]]:
    """Tokenise prompts one by one: nothing is padded and nothing is cut off.

    Args:
        model: Its tokenizer reads strings, with BOS where ``cfg.default_prepend_bos`` says so.
        prompts: All strings, or all lists or 1-D integer tensors of token ids, which are taken as
            they are.
        at_least: Smallest number of tokens that can be used.

    Returns:
        One int64 tensor [pos] a prompt, on the CPU.

    Raises:
        TypeError: Something is neither text nor a tensor, or both kinds are mixed.
        ValueError: There is no prompt; one is too short, longer than the context, padded into a
            matrix, or holds an id that is none; text is given without a tokenizer. The message
            names the prompt.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is one string: pass a list of strings")
    if isinstance(prompts, Tensor):
        raise TypeError(
            f"prompts is one tensor of shape {list(prompts.shape)}: pass a list of 1-D tensors, "
            "each without padding"
        )
    listed = list(prompts)
    if not listed:
        raise ValueError("prompts is empty: there is nothing to measure")
    kinds = {_kind(prompt) for prompt in listed}
    if None in kinds:
        number = next(i for i, prompt in enumerate(listed) if _kind(prompt) is None)
        raise TypeError(
            f"prompt {number} is a {type(listed[number]).__name__}, expected a string, a list of "
            "token ids or a 1-D token tensor"
        )
    if len(kinds) > 1:
        raise TypeError("prompts mixes strings and token tensors: pass one kind")
    if kinds == {"tokens"}:
        listed = [_as_tensor(number, prompt) for number, prompt in enumerate(listed)]
    return [_checked(model, number, prompt, at_least) for number, prompt in enumerate(listed)]


def tokens_alone(
    model: Model, what: str, text: str | Tensor, prepend_bos: bool | None = None
) -> Int[Tensor, "pos"]:
    """Tokens of one text, or of 1-D tokens, without padding and not cut off.

    Args:
        model: As for :func:`token_prompts`.
        what: What it is called in an error, such as ``"prompt 3"``.
        text: Text or tokens.
        prepend_bos: As for :func:`tl_loops.upstream.inputs.model_input`.

    Returns:
        int64 [pos], on the CPU.

    Raises:
        ValueError: It cannot be fed to the model.
    """
    # No token is padding, whatever its id.
    real = None if isinstance(text, str) else torch.ones_like(text)
    try:
        fed = model_input(model, text, real, prepend_bos=prepend_bos, truncate=False)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    return fed.tokens[0].cpu()


def longest_first(keys: Sequence[Hashable], lengths: Sequence[int]) -> list[int]:
    """An order of prompts in which those that can share a batch stand together.

    The longest come first, so that what does not fit into memory fails at once; among equals the
    given order is kept. The order does not depend on the batch size.

    Args:
        keys: Prompts with equal keys can share a batch.
        lengths: Length of each prompt; equal where the keys are.

    Returns:
        Indices into the prompts.
    """
    first: dict[Hashable, int] = {}
    for number, key in enumerate(keys):
        first.setdefault(key, number)
    return sorted(range(len(keys)), key=lambda i: (-lengths[i], first[keys[i]], i))


def batches(
    order: Sequence[int], key: Callable[[int], Hashable], batch_size: int
) -> Iterator[list[int]]:
    """Cut an order of prompts into batches of equal keys.

    Args:
        order: Indices of prompts, for example from :func:`longest_first`.
        key: Key of a prompt.
        batch_size: Prompts in a batch at most.
    """
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) == batch_size or key(index) != key(batch[0])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def equal_batches(
    keys: Sequence[Hashable], lengths: Sequence[int], batch_size: int
) -> list[list[int]]:
    """All batches of a run in its order, each of prompts with equal keys; see the two above."""
    return list(batches(longest_first(keys, lengths), keys.__getitem__, batch_size))


def bos_rule(model: Model, prompts: Sequence[Any] | Tensor) -> str:
    """How the prompts of a run begin.

    Returns:
        ``"prepended"``: text after BOS, by the rule of the model's authors
        (``cfg.default_prepend_bos``). ``"none"``: text without BOS. ``"given"``: tokens as they
        are.
    """
    if not isinstance(prompts[0], str):
        return "given"
    return "prepended" if getattr(model.cfg, "default_prepend_bos", True) else "none"


def check_batch_size(batch_size: int | None, or_none: bool = False) -> None:
    """Check that a batch size is an integer of at least 1.

    Args:
        batch_size: What was given.
        or_none: Whether ``None``, an automatic choice, is allowed too.

    Raises:
        ValueError: It is none.
    """
    if batch_size is None and or_none:
        return
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        allowed = "1 or None" if or_none else "1"
        raise ValueError(f"batch_size must be at least {allowed}, got {batch_size!r}")


def _kind(prompt: Any) -> str | None:
    if isinstance(prompt, str):
        return "text"
    return "tokens" if isinstance(prompt, (Tensor, list, tuple, np.ndarray)) else None


def _as_tensor(number: int, prompt: Any) -> Tensor:
    if isinstance(prompt, Tensor):
        return prompt
    try:
        tokens = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"prompt {number} is {shortened(prompt)}, expected a flat list of token ids"
        ) from error
    # An empty list is one of floating point numbers to torch.
    return tokens.long() if not tokens.numel() else tokens


def _checked(model: Model, number: int, prompt: str | Tensor, at_least: int) -> Int[Tensor, "pos"]:
    if isinstance(prompt, Tensor) and prompt.ndim != 1:
        raise ValueError(
            f"prompt {number} has shape {list(prompt.shape)}, expected [pos]: one prompt a "
            "tensor, without padding"
        )
    tokens = tokens_alone(model, f"prompt {number}", prompt)
    n_tokens, cfg = tokens.shape[0], model.cfg
    if n_tokens < at_least:
        raise ValueError(
            f"prompt {number} has {n_tokens} token(s), expected at least {at_least}"
            + (f": {prompt!r}" if isinstance(prompt, str) else "")
        )
    if n_tokens > cfg.n_ctx:
        raise ValueError(
            f"prompt {number} has {n_tokens} tokens, but the context is cfg.n_ctx={cfg.n_ctx}; "
            "shorten it"
        )
    return tokens
