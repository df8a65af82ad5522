"""Attention patterns by iteration, layer and head, drawn by circuitsvis side by side."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.drawing.depth import block_values
from tl_loops.drawing.sizes import decimals
from tl_loops.drawing.subject import subject_of
from tl_loops.drawing.views import CircuitsView, Component, ViewPart
from tl_loops.errors import shortened
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.layout.selection import Selection, chosen_indices, one_index
from tl_loops.upstream import Cache, TextOrTokens
from tl_loops.upstream.inputs import token_ids


@checked
def attention_view(
    tokens: Sequence[str],
    attention: Float[Tensor, "head dest src"],
    head_names: Sequence[str] | None = None,
    height: int | None = None,
    width: int = 460,
    digits: int = 3,
    title: str = "",
) -> CircuitsView:
    """Attention patterns of any heads of one prompt: small multiples, one enlarged on click.

    Args:
        tokens: The prompt's tokens as text (``model.to_str_tokens``).
        attention: Patterns of one prompt, e.g. ``cache["pattern", 3, 0][0]``; values in [0, 1].
        head_names: One name per head; ``None``: H0, H1, ...
        height: Height in CSS pixels, within which it scrolls; ``None``: all of it is shown.
        width: Width in CSS pixels, on a narrower page the page's.
        digits: Decimals that are kept.
        title: Above the view.

    Returns:
        A view that a notebook shows.

    Raises:
        ValueError: Numbers of tokens, names and rows do not agree.
    """
    heads = attention.shape[0]
    names = [f"H{h}" for h in range(heads)] if head_names is None else list(head_names)
    if len(names) != heads:
        raise ValueError(f"got {len(names)} head names for {heads} heads")
    part, note = _part("", "AttentionHeads", list(tokens), attention, names, digits)
    return CircuitsView((part,), title, note, height, width)


@checked
def attention_heads(
    source: Cache | Tensor,
    tokens: TextOrTokens | None = None,
    *,
    iterations: Selection | None = None,
    layers: Selection | None = None,
    heads: Selection | None = None,
    row: int = 0,
    model: Model | None = None,
    layout: LoopLayout | None = None,
    title: str | None = None,
    height: int | None = None,
    width: int = 380,
    digits: int = 3,
) -> CircuitsView:
    """All heads of some core layers, one column per iteration, side by side.

    Heads are named as they are addressed: ``r3.0H2`` is iteration 3, layer 0, head 2. Click one to
    enlarge it; point at a token to see where it looks.

    Args:
        source: An activation cache with ``pattern``; or patterns [block, head, dest, src], with a
            model or a layout.
        tokens: The prompt: text, tokens [pos] or [1, pos], or its tokens as text; ``None``: those
            of the run that filled the cache.
        iterations: Which ones, negative from the last; ``None``: all.
        layers: Which core layers; ``None``: all.
        heads: Which heads; ``None``: all.
        row: Which prompt of a cache.
        model: The model, where the source is a tensor; it also reads the tokens.
        layout: Of the patterns, where the source is a tensor and the model is not at hand.
        title: In place of the general one.
        height: Of each column in CSS pixels, within which it scrolls; ``None``: all is shown.
        width: Of each column in CSS pixels.
        digits: Decimals that are kept.

    Returns:
        A view that a notebook shows.

    Raises:
        ValueError: No layout, no pattern, or tokens of another number.
        IndexError: An iteration, layer or head that does not exist.
    """
    patterns, layout = _patterns(source, model, layout, row)
    n_heads = patterns.shape[1]
    words = _texts_of(source, model, tokens, row)
    chosen = chosen_indices("head", n_heads, heads)
    parts, notes = [], []
    for t in chosen_indices("iteration", layout.n_iterations, iterations):
        blocks = [
            layout.index(iteration=t, layer=layer)
            for layer in chosen_indices("core layer", layout.n_core, layers)
        ]
        shown = patterns[blocks][:, chosen].flatten(0, 1)
        names = [f"{layout.label(block)}H{head}" for block in blocks for head in chosen]
        part, note = _part(f"iteration {t}", "AttentionHeads", words, shown, names, digits)
        parts.append(part)
        notes.append(note)
    return _side_by_side(
        source, model, words, parts, notes, title or "Attention heads by iteration", height, width
    )


@checked
def attention_patterns(
    source: Cache | Tensor,
    tokens: TextOrTokens | None = None,
    *,
    layer: int = 0,
    head: int = 0,
    iterations: Selection | None = None,
    layers: Selection | None = None,
    heads: Selection | None = None,
    row: int = 0,
    model: Model | None = None,
    layout: LoopLayout | None = None,
    title: str | None = None,
    height: int | None = None,
    width: int = 380,
    digits: int = 3,
) -> CircuitsView:
    """The pattern of one head, large, in one iteration beside the other.

    With ``layers`` (or ``heads``) all heads of these layers, as :func:`attention_heads` shows them.

    Args:
        source: As in :func:`attention_heads`.
        tokens: As in :func:`attention_heads`.
        layer: Core layer.
        head: Head.
        iterations: Which ones, negative from the last; ``None``: all.
        layers: Core layers whose heads are all shown, in place of one ``layer`` and one ``head``.
        heads: Heads that are shown of these layers; ``None``: all.
        row: Which prompt of a cache.
        model: The model, where the source is a tensor; it also reads the tokens.
        layout: Of the patterns, where the source is a tensor and the model is not at hand.
        title: In place of the general one.
        height: Of each column in CSS pixels, within which it scrolls; ``None``: all is shown.
        width: Of each column in CSS pixels.
        digits: Decimals that are kept.

    Returns:
        A view that a notebook shows.

    Raises:
        ValueError: As :func:`attention_heads`.
        IndexError: As :func:`attention_heads`.
    """
    if layers is not None or heads is not None:
        return attention_heads(
            source,
            tokens,
            iterations=iterations,
            layers=layer if layers is None else layers,
            heads=heads,
            row=row,
            model=model,
            layout=layout,
            title=title,
            height=height,
            width=width,
            digits=digits,
        )
    patterns, layout = _patterns(source, model, layout, row)
    words = _texts_of(source, model, tokens, row)
    head = one_index("head", head, patterns.shape[1])
    parts, notes = [], []
    for t in chosen_indices("iteration", layout.n_iterations, iterations):
        block = layout.index(iteration=t, layer=layer)
        name = f"{layout.label(block)}H{head}"
        shown = patterns[block, head : head + 1]
        part, note = _part(f"iteration {t}: {name}", "AttentionPattern", words, shown, [], digits)
        parts.append(part)
        notes.append(note)
    heading = title or f"Attention pattern of layer {layer}, head {head} by iteration"
    return _side_by_side(source, model, words, parts, notes, heading, height, width)


def _texts_of(source: Any, model: Model | None, tokens: TextOrTokens | None, row: int) -> list[str]:
    """Tokens as text; without tokens those of the run that filled the cache."""
    if tokens is not None:
        return token_texts(source if model is None else model, tokens)
    known = getattr(source, "tokens", None)
    if known is None:
        raise ValueError(
            "the source does not know its tokens: pass them as text, or as tokens [pos]"
        )
    known = known.reshape(-1, known.shape[-1])
    chosen = known[one_index("prompt", row, len(known))]
    if getattr(source.model, "tokenizer", None) is None:
        return [str(token) for token in chosen.tolist()]
    return token_texts(source, chosen)


def token_texts(source: Any, tokens: TextOrTokens) -> list[str]:
    """Tokens as text.

    Args:
        source: An activation cache or a model, whose tokenizer is asked; not needed for text that
            is cut into tokens already.
        tokens: Text, tokens [pos] or [1, pos], or a list of texts.

    Raises:
        ValueError: Several prompts, or no tokenizer to ask.
    """
    if isinstance(tokens, Tensor):
        if tokens.ndim == 2 and tokens.shape[0] == 1:
            tokens = tokens[0]
        if tokens.ndim != 1:
            raise ValueError(f"tokens has shape {list(tokens.shape)}, expected one prompt, [pos]")
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    elif not isinstance(tokens, str):
        if isinstance(tokens, bytes) or not hasattr(tokens, "__iter__"):
            raise TypeError(
                f"tokens must be text, token ids or a list of texts, got {shortened(tokens)}"
            )
        return [str(token) for token in tokens]
    model = getattr(source, "model", source)
    if getattr(model, "tokenizer", None) is None:
        raise ValueError("there is no tokenizer to ask: pass the tokens as a list of texts")
    if isinstance(tokens, Tensor) and tokens.numel():
        tokens = token_ids(model, tokens)[0]
    return [str(token) for token in model.to_str_tokens(tokens)]


def prompt_text(words: list[str]) -> str:
    """The prompt that tokens make up; words that bring no spaces of their own get them."""
    return ("" if any(" " in word for word in words) else " ").join(words)


def _side_by_side(
    source: Any,
    model: Model | None,
    words: list[str],
    parts: list[ViewPart],
    notes: list[str],
    title: str,
    height: int | None,
    width: int,
) -> CircuitsView:
    subject = subject_of(source, model=model, prompts=prompt_text(words))
    line = [subject.line(complete=False), *dict.fromkeys(note for note in notes if note)]
    if not parts:
        line.append("there is no iteration to show")
    return CircuitsView(tuple(parts), title, " · ".join(line), height, width)


def _patterns(
    source: Any, model: Model | None, layout: LoopLayout | None, row: int
) -> tuple[Float[Tensor, "block head dest src"], LoopLayout]:
    if hasattr(source, "cache_dict"):
        layout = getattr(source, "layout", None)
        if layout is None:
            raise ValueError("the cache is of a model without a loop: use attention_view")
        return block_values(source, "pattern", row), layout
    layout = getattr(model, "layout", None) if layout is None else layout
    if layout is None:
        raise ValueError("patterns without a cache need model=..., or layout=model.layout")
    if source.ndim != 4 or source.shape[0] != layout.n_layers:
        raise ValueError(
            f"patterns has shape {list(source.shape)}, expected [block, head, dest, src] with "
            f"{layout.n_layers} blocks"
        )
    return source, layout


def _part(
    heading: str,
    component: Component,
    tokens: list[str],
    attention: Tensor,
    names: list[str],
    digits: int,
) -> tuple[ViewPart, str]:
    """A component, and words about weights that are undefined."""
    digits = decimals(digits)
    dest, src = attention.shape[-2:]
    if (dest, src) != (len(tokens), len(tokens)):
        raise ValueError(
            f"attention must be [head, dest, src] with dest = src = {len(tokens)} tokens, "
            f"got {tuple(attention.shape)}"
        )
    undefined = 0
    rounded: list[list[list[float]]] = []
    for rows in attention.detach().float().cpu().tolist():
        undefined += sum(not math.isfinite(x) for row in rows for x in row)
        rounded.append(
            [[round(x, digits) if math.isfinite(x) else 0.0 for x in row] for row in rows]
        )
    note = "undefined (NaN) weights are shown as 0" if undefined else ""
    if component == "AttentionPattern":
        return ViewPart(heading, component, {"tokens": tokens, "attention": rounded[0]}), note
    props = {"tokens": tokens, "attention": rounded, "attentionHeadNames": names}
    return ViewPart(heading, component, props), note
