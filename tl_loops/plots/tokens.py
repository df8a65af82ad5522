"""Tokens coloured by a number each, and token log probabilities, one view per iteration."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.drawing.figure import as_array
from tl_loops.drawing.sizes import decimals, finite_limits
from tl_loops.drawing.subject import subject_of
from tl_loops.drawing.views import CircuitsView, ViewPart, as_text
from tl_loops.errors import shortened
from tl_loops.layout.model import Model
from tl_loops.layout.selection import Selection, chosen_indices, one_index
from tl_loops.lens.result import LensResult
from tl_loops.metrics.readout import token_rank
from tl_loops.plots.attention import prompt_text, token_texts
from tl_loops.upstream import TextOrTokens

_BLUE, _ORANGE = "#1f6fb4", "#d1642b"


@checked
def colored_tokens(
    tokens: TextOrTokens,
    values: Float[Tensor, "pos"] | Int[Tensor, "pos"] | Mapping[str, Tensor],
    title: str,
    *,
    unit: str = "",
    limits: tuple[float | int, float | int] | None = None,
    model: Model | str | None = None,
    height: int = 30,
    digits: int = 3,
) -> CircuitsView:
    """A prompt whose tokens are coloured by a number each; point at one to read it.

    Such as the convergence depth (:func:`tl_loops.metrics.convergence_depth`), the exit iteration
    (:func:`tl_loops.metrics.exit_iteration`), the loss, or the share of an attribution.

    Args:
        tokens: The prompt: its tokens as text, or text or tokens [pos] with a model.
        values: One per token; or several such by name, below each other on one scale. Blue above 0,
            orange below.
        title: What the numbers are.
        unit: Their unit.
        limits: Numbers of the palest and the fullest colour; ``None``: from the numbers, with 0.
        model: Model (or its name): for the line under the title, and for its tokenizer.
        height: Of each prompt in CSS pixels, at least.
        digits: Decimals that are kept.

    Returns:
        A view that a notebook shows.

    Raises:
        ValueError: Not one number per token.
    """
    words = token_texts(model, tokens)
    rows = dict(values) if isinstance(values, Mapping) else {"": values}
    numbers = {name: as_array(row).tolist() for name, row in rows.items()}
    for name, row in numbers.items():
        if not isinstance(row, list) or len(row) != len(words):
            shape = list(rows[name].shape)
            which = f" of {name!r}" if name else ""
            raise ValueError(f"values{which} has shape {shape}, expected [{len(words)}]")
    finite = [x for row in numbers.values() for x in row if math.isfinite(x)]
    low, high = finite_limits(limits or (min([0.0, *finite]), max([0.0, *finite])))
    high = high if high > low else low + 1.0
    shown = _spaced(words)
    parts = tuple(
        ViewPart(
            name,
            "ColoredTokens",
            {
                "tokens": shown,
                "values": [round(x, decimals(digits)) if math.isfinite(x) else 0.0 for x in row],
                "minValue": low,
                "maxValue": high,
                "positiveColor": _BLUE,
                "negativeColor": _ORANGE,
            },
        )
        for name, row in numbers.items()
        if words
    )
    line = [subject_of(model=model).line(complete=False)]
    line.append(f"{f'{unit} ' if unit else ''}{low:.4g} (pale) to {high:.4g} (full)")
    undefined = sum(not math.isfinite(x) for row in numbers.values() for x in row)
    if undefined:
        line.append(f"undefined (NaN) for {undefined} tokens, shown as 0")
    if not parts:
        line.append("there is no token to show")
    return CircuitsView(parts, title, " · ".join(part for part in line if part), height, room=60)


@checked
def token_log_probs(
    source: LensResult | Float[Tensor, "iteration pos d_vocab"],
    tokens: TextOrTokens,
    model: Model,
    *,
    iterations: Selection | None = None,
    row: int = 0,
    top_k: int = 10,
    title: str | None = None,
    height: int = 30,
    digits: int = 3,
) -> CircuitsView:
    """How well each token is predicted after each iteration, and what else was expected.

    Tokens are coloured by their log probability; point at one for the top tokens in its place.

    Args:
        source: Of a lens with ``keep_logits=True`` and all positions that reads one state an
            iteration, such as :func:`tl_loops.lens.coda_lens`; or logits of one prompt.
        tokens: The prompt: text, or tokens [pos] or [1, pos].
        model: The model, for its tokenizer and its vocabulary.
        iterations: Which ones, negative from the last; ``None``: all.
        row: Which prompt of a lens.
        top_k: How many top tokens the hover lists.
        title: In place of the general one.
        height: Of each iteration in CSS pixels, at least.
        digits: Decimals that are kept.

    Returns:
        A view that a notebook shows.

    Raises:
        ValueError: No logits, or not one per token.
        IndexError: An iteration that does not exist.
    """
    words = token_texts(model, tokens)
    if isinstance(tokens, str):
        tokens = model.to_tokens(tokens)
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens must be text or token ids [pos], got {shortened(tokens)}")
    ids = tokens.reshape(-1).cpu()
    logits = _logits(source, row) if isinstance(source, LensResult) else source
    size = getattr(model.cfg, "padded_vocab", None) or logits.shape[-1]
    if logits.ndim != 3 or logits.shape[1] != len(ids):
        raise ValueError(
            f"logits has shape {list(logits.shape)}, expected [iteration, {len(ids)}, d_vocab]"
        )
    if not 1 <= top_k <= size:
        raise ValueError(f"top_k={top_k}, expected 1 to {size}")
    # What follows the last token is not known; the first is predicted by nothing.
    targets = ids[1:]
    chosen = chosen_indices("iteration", logits.shape[0], iterations)
    parts, notes = [], []
    for t in chosen if len(targets) else ():
        read = logits[t, :-1, :size].detach().float().cpu()
        if not read.isfinite().all():
            notes.append(f"the logits of iteration {t} are not finite (NaN) and left out")
            continue
        log_p = read.log_softmax(-1)
        best = log_p.topk(top_k, dim=-1)
        props = {
            "prompt": _spaced(words),
            "topKLogProbs": _rounded(best.values, digits),
            "topKTokens": [
                [as_text(model.to_single_str_token(int(token))) for token in place]
                for place in best.indices
            ],
            "correctTokenRank": (token_rank(read, targets) - 1).tolist(),
            "correctTokenLogProb": _rounded(log_p.gather(-1, targets[:, None])[:, 0], digits),
        }
        mean = float(log_p.gather(-1, targets[:, None]).mean())
        heading = f"iteration {t} (mean log probability {mean:.3f} nats)"
        parts.append(ViewPart(heading, "TokenLogProbs", props))
    if not len(targets):
        notes.append("one token alone predicts nothing that is known")
    subject = subject_of(model=model, prompts=prompt_text(words))
    return CircuitsView(
        tuple(parts),
        title or "Log probability of each token by iteration",
        " · ".join([subject.line(complete=False), *notes]),
        height,
        room=110 + 24 * top_k,
    )


def _logits(result: LensResult, row: int) -> Float[Tensor, "iteration pos d_vocab"]:
    if result.logits is None:
        raise ValueError("the lens kept no logits: pass keep_logits=True to it")
    logits = result.by_iteration(result.logits)
    row = one_index("prompt", row, len(result.tokens))
    if logits.ndim != 4:
        raise ValueError(
            "token_log_probs needs one reading per iteration: read points='states', got "
            f"{', '.join(result.labels)}"
        )
    in_order = torch.arange(result.tokens.shape[1], device=result.positions.device)
    if result.positions.shape[1] != len(in_order) or not bool(
        (result.positions[row] == in_order).all()
    ):
        raise ValueError("token_log_probs needs every position: read positions='all'")
    return logits[:, row]


def _spaced(words: list[str]) -> list[str]:
    """Tokens to be read in a row: words that bring no spaces of their own get them."""
    gap = "" if any(" " in word for word in words) else " "
    return [as_text(word) + gap for word in words]


def _rounded(values: Tensor, digits: int) -> Any:
    return torch.round(values.double(), decimals=decimals(digits)).tolist()
