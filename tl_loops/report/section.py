"""Sections of the report: what they say, their figures, and what they need of the prompts."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
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


def plotly_figure(figure: Any) -> str:
    """A plotly figure as data, which the page's script draws in the page's colours.

    Numbers are stored in float32. Heading and subtitle become the caption.
    """
    content = figure.to_plotly_json()
    layout = content["layout"]
    layout.pop("template", None)
    heading = layout.pop("title", {}).get("text", "")
    n_lines = 1 + heading.count("<br>")
    height = int(layout.pop("height"))
    layout.pop("width", None)
    margin = layout["margin"]
    freed = min(margin["t"] - 14, 26 + 20 * n_lines)
    margin["t"] -= freed
    height -= freed
    # Text inside of a script element must not end it.
    data = json.dumps(_compact(content), separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<figure class="plot"><figcaption>{_caption(heading)}</figcaption><div class="scroll">'
        f'<div class="plotly" style="height:{height}px;min-width:{_least_width(content)}px">'
        "<noscript>This figure needs scripts, which this page holds itself.</noscript></div></div>"
        f'<script type="application/json">{data}</script></figure>'
    )


def _least_width(content: Any) -> int:
    """Pixels below which panels would overlap; a narrower page scrolls the figure."""
    axes = [axis for name, axis in content["layout"].items() if name.startswith("xaxis")]
    n_columns = len({tuple(axis.get("domain", (0,)))[:1] for axis in axes})
    wide = any(trace.get("type") == "heatmap" for trace in content["data"])
    return max(300 * n_columns + 80, 640 if wide else 0)


def _caption(heading: str) -> str:
    """The heading's lines: the bold ones first, then what the figure shows."""
    lines = [line for line in heading.split("<br>") if line]
    bold = [line[3:-4] for line in lines if line.startswith("<b>")]
    small = [line[line.index(">") + 1 : -7] for line in lines if line.startswith("<span")]
    return f"{' '.join(bold)}<small>{' '.join(small)}</small>"


def _compact(value: Any) -> Any:
    """Plain data: arrays as lists of numbers with five digits, undefined ones as null."""
    if isinstance(value, dict):
        return {key: _compact(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, np.ndarray):
        return _compact(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_compact(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    if isinstance(value, np.generic):
        return value.item()
    return value


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


def percent(share: Float[Tensor, ""] | float) -> str:
    """A share as text."""
    return f"{100 * float(share):.1f}%"
