"""Sections of the report: what they say, their figures, and what they need of the prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.layout.model import Model
from tl_loops.tasks.prompts import PromptText

LONGEST = 64
"""Tokens of a prompt that figures of single prompts show: the last ones."""


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        id: Anchor.
        title: Heading.
        paragraphs: Plain text.
        figures: HTML, with all text from prompts escaped.
        code: Preformatted text.
        finding: One sentence with its numbers for the summary; empty: none.
    """

    id: str
    title: str
    paragraphs: list[str]
    figures: list[str] = field(default_factory=list)
    code: str = ""
    finding: str = ""


def html_figure(title: str, body: str) -> str:
    """A figure with a caption around HTML."""
    return f"<figure><figcaption>{escape(title)}</figcaption>{body}</figure>"


def page_figure(plot: Callable[..., Any], *data: Any, **options: Any) -> str:
    """What a function of ``tl_loops.plots`` draws, for the page's script."""
    return plot(*data, backend="page", **options).element()


def columns(figures: Sequence[str]) -> str:
    """Figures side by side where the page is wide enough."""
    return f'<div class="columns">{"".join(figures)}</div>'


def shortened(text: str, most: int = 160) -> str:
    """The end of a text that is too long."""
    return text if len(text) <= most else f"… {text[-most:].split(' ', 1)[-1]}"


def as_text(model: Model, tokens: Int[Tensor, "1 pos"]) -> str:
    """Tokens as a text of a readable length."""
    return shortened(model.to_string(tokens[0]), 240)


def last_tokens(model: Model, text: str) -> Int[Tensor, "1 pos"]:
    """The end of a prompt that figures show."""
    return model.to_tokens(text)[:1, -LONGEST:]


def answer_token(model: Model, answer: str | None) -> int | None:
    """The single token of an answer, with or without a space before it."""
    for text in () if answer is None else (f" {answer.strip()}", answer.strip()):
        tokens = model.to_tokens(text, prepend_bos=False)[0]
        if tokens.numel() == 1 and int(tokens[0]) != model.tokenizer.unk_token_id:
            return int(tokens[0])
    return None


def by_length(
    model: Model, prompts: Sequence[PromptText], answers: Sequence[int | None]
) -> list[tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch"]]]:
    """Prompts of one length together, so that nothing is padded; the largest group first."""
    groups: dict[int, list[tuple[Tensor, int]]] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = model.to_tokens(prompt.text)[0]
        groups.setdefault(len(tokens), []).append((tokens, int(answer or 0)))
    return [
        (torch.stack([t for t, _ in group]), torch.tensor([a for _, a in group]))
        for group in sorted(groups.values(), key=len, reverse=True)
    ]


def times(n: int) -> str:
    """How often, in words that fit one as well."""
    return "once" if n == 1 else f"{n} times"


def percent(share: Float[Tensor, ""] | float) -> str:
    """A share as text."""
    return f"{100 * float(share):.1f}%"
