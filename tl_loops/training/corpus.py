"""Contexts of a corpus of tokens: drawn for training, cut side by side for evaluation."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_loops.arguments import check_at_least, checked, checked_fields
from tl_loops.runs.identity import prompts_fingerprint
from tl_loops.training.data import TrainingBatch


@checked_fields
@dataclass(frozen=True, eq=False)
class Corpus:
    """A line of tokens as training data: contexts from random places predict their next tokens.

    Attributes:
        tokens: [token], at least one context of them.
        n_context: Tokens per context, at least 2; the loss reads all but the first.
        first_token: As in :func:`draw_contexts`.

    Raises:
        ValueError: The corpus is shorter than one context, or a number is out of its range.
    """

    tokens: Int[Tensor, "token"]
    n_context: int
    first_token: int | None = None

    def __post_init__(self) -> None:
        check_at_least(2, n_context=self.n_context)
        _check_context(self.tokens, self.n_context, self.first_token)
        object.__setattr__(self, "tokens", self.tokens.cpu())

    @checked
    def draw(self, n: int, generator: torch.Generator) -> TrainingBatch:
        """Contexts by :func:`draw_contexts`."""
        contexts = draw_contexts(self.tokens, n, self.n_context, generator, self.first_token)
        return TrainingBatch.next_tokens(contexts)

    def identity(self) -> dict[str, Any]:
        """Hash of the tokens, and how contexts are cut."""
        return {
            "corpus": prompts_fingerprint([self.tokens]),
            "n_context": self.n_context,
            "first_token": self.first_token,
        }


def check_corpus(corpus: Tensor, n_context: int, d_vocab: int, name: str = "corpus") -> None:
    """Raise where a corpus gives no context, or holds what is no token of the model.

    Raises:
        ValueError: It is not a line of integers, is shorter than one context, or holds a token
            that the vocabulary lacks.
    """
    if corpus.ndim != 1 or corpus.is_floating_point() or corpus.dtype == torch.bool:
        raise ValueError(
            f"{name} must be token ids in one line, an integer tensor [token], got "
            f"{list(corpus.shape)} of {corpus.dtype}"
        )
    _check_context(corpus, n_context, None, name)
    least, most = int(corpus.min()), int(corpus.max())
    if least < 0 or most >= d_vocab:
        raise ValueError(
            f"{name} holds token {least if least < 0 else most}, but the model's vocabulary has "
            f"ids from 0 to {d_vocab - 1}"
        )


@checked
def draw_contexts(
    corpus: Int[Tensor, "token"],
    n_contexts: int,
    n_context: int,
    generator: torch.Generator,
    first_token: int | None = None,
) -> Int[Tensor, "batch pos"]:
    """Contexts from random places, any place equally often.

    Args:
        corpus: The tokens, at least ``n_context`` of them.
        n_contexts: How many.
        n_context: Tokens per context.
        generator: On the CPU.
        first_token: Put before each context, whose last token falls away; ``None``: nothing is.

    Raises:
        ValueError: The corpus is shorter than one context, or a count is out of its range.
    """
    check_at_least(1, n_contexts=n_contexts)
    _check_context(corpus, n_context, first_token)
    starts = torch.randint(corpus.shape[0] - n_context + 1, (n_contexts,), generator=generator)
    return _after(first_token, corpus[starts[:, None] + torch.arange(n_context)].long())


@checked
def cut_contexts(
    corpus: Int[Tensor, "token"],
    n_context: int,
    most: int | None = None,
    first_token: int | None = None,
) -> Int[Tensor, "context pos"]:
    """Contexts side by side, evenly spread over the corpus; a rest at the end is left out.

    Args:
        corpus: The tokens, at least ``n_context`` of them.
        n_context: Tokens per context.
        most: At most this many; ``None``: all.
        first_token: As in :func:`draw_contexts`.

    Raises:
        ValueError: As :func:`draw_contexts`.
    """
    check_at_least(1, most=most)
    _check_context(corpus, n_context, first_token)
    n_all = corpus.shape[0] // n_context
    contexts = corpus[: n_all * n_context].view(n_all, n_context).long()
    if most is not None and most < n_all:
        contexts = contexts[torch.arange(most) * n_all // most]
    return _after(first_token, contexts)


def _check_context(
    corpus: Tensor, n_context: int, first_token: int | None, name: str = "corpus"
) -> None:
    check_at_least(1, n_context=n_context)
    check_at_least(0, first_token=first_token)
    if corpus.shape[0] < n_context:
        raise ValueError(
            f"{name} has {corpus.shape[0]} tokens, fewer than one context of {n_context}: give "
            "more text, or a smaller n_context"
        )


def _after(first_token: int | None, contexts: Tensor) -> Tensor:
    if first_token is None:
        return contexts
    return torch.cat([torch.full_like(contexts[:, :1], first_token), contexts[:, :-1]], dim=1)
