"""A lens over tokens and iterations: the top token in each cell, a number as its colour."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_loops.arguments import check_at_least, checked
from tl_loops.drawing.draw import draw
from tl_loops.drawing.figure import ColourScale, Figure, Heat, Panel, as_array
from tl_loops.drawing.subject import shown_text, subject_of
from tl_loops.layout.model import Model
from tl_loops.layout.selection import one_index
from tl_loops.lens.result import LensResult
from tl_loops.plots.pairs import named_axis
from tl_loops.upstream import PromptsShown

_VALUES = {
    "probability": "probability of the top token (0 to 1)",
    "entropy": "entropy (nats)",
    "kl_to_final": "KL(model's output || readout) (nats)",
}
_LONGEST = 9


@checked
def plot_lens(
    result: LensResult,
    value: str = "probability",
    *,
    row: int = 0,
    facet: str | None = None,
    most_hovered: int = 5,
    model: Model | str | None = None,
    prompts: PromptsShown | None = None,
    limits: tuple[float | int, float | int] | None = None,
    title: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """What a lens reads at each token and each iteration (and layer).

    Tokens run along x, points of the stream down. Each cell shows its top token; point at one for
    the best five with their probabilities.

    Args:
        result: From :func:`tl_loops.lens.logit_lens`, :func:`tl_loops.lens.coda_lens` or another.
        value: The colour: ``"probability"`` of the top token, ``"entropy"``, or
            ``"kl_to_final"``.
        row: Which prompt.
        facet: ``"layer"``: one panel per layer, with iterations down (points in core blocks or
            states); ``None``: all points in one panel.
        most_hovered: How many tokens the hover lists, at most as many as the lens kept.
        model: Model or its name, for the line under the title.
        prompts: Their number or text; ``None``: the prompt that the lens read.
        limits: Numbers at the ends of the colour scale; ``None``: 0 to 1 for probabilities, else
            from the numbers.
        title: In place of the general one.
        backend: See :func:`tl_loops.plots.draw`.
        **options: ``width``, ``height``, and what the library takes. Tokens are written in the
            cells where they fit into ``width``, without it into a page of 700 pixels.

    Returns:
        A figure of the library.

    Raises:
        ValueError: Unknown value or facet, or points that are no grid of iterations and layers.
        IndexError: There is no such prompt.
        ImportError: The library is missing.
    """
    if value not in _VALUES:
        raise ValueError(f"value must be one of {', '.join(_VALUES)}, got {value!r}")
    if facet not in (None, "layer"):
        raise ValueError(f"facet must be 'layer' or None, got {facet!r}")
    row = one_index("prompt", row, result.tokens.shape[0])
    numbers = result.top_probabilities[..., 0] if value == "probability" else getattr(result, value)
    numbers = torch.where(result.real[row], numbers[:, row].double(), torch.nan)
    words = _words(result, row)
    columns = named_axis("token", words)
    check_at_least(0, most_hovered=most_hovered)
    width = max(300, min(1600, 62 * len(words)))
    panels = []
    for heading, points in _groups(result, facet):
        labels = [result.points[point].label for point in points]
        cells, hover = _texts(result, row, points, words, most_hovered)
        heat = Heat(as_array(numbers[points]), hover=hover, text=cells, blank=True)
        axis = named_axis("iteration" if facet else "point of the stream", labels)
        panels.append(Panel((heat,), columns, axis, title=heading))
    if limits is None and value == "probability":
        limits = (0.0, 1.0)
    iterations = {p.iteration for p in result.points if p.iteration is not None}
    subject = subject_of(
        model=model,
        prompts=_prompt(result, row) if prompts is None else prompts,
        n_iterations=max(iterations, default=-1) + 1 or None,
    )
    n_rows = max((len(panel.y.ticks or ()) for panel in panels), default=1)
    figure = Figure(
        title or f"{result.lens} lens: top token of each readout",
        subject.line(complete=title is None),
        tuple(panels),
        columns=1,
        panel_size=(width, max(120, min(900, 24 * n_rows))),
        colours=ColourScale.of(as_array(numbers), _VALUES[value], limits=limits),
        shared_x=len(panels) > 1,
    )
    return draw(figure, backend, **options)


def _groups(result: LensResult, facet: str | None) -> list[tuple[str, list[int]]]:
    """Headings and points of each panel."""
    every = torch.arange(len(result.points))
    if facet is None:
        return [("", every.tolist())]
    grid = result.by_iteration(every)
    if grid.ndim == 1:
        return [("", grid.tolist())]
    return [(f"layer {layer}", points.tolist()) for layer, points in enumerate(grid.unbind(1))]


def _words(result: LensResult, row: int) -> list[str]:
    """The tokens that are read, with their positions, which tell equal ones apart."""
    positions = result.positions[row]
    texts = result.text(result.tokens[row][positions])
    real = result.real[row].tolist()
    return [
        f"{shown_text(text) if there else ''}_{position}"
        for text, position, there in zip(texts, positions.tolist(), real, strict=True)
    ]


def _prompt(result: LensResult, row: int) -> Tensor | str:
    if result.tokenizer is None:
        return result.tokens[row][None]
    return " ".join(text.strip() for text in result.text(result.tokens[row]))


def _texts(
    result: LensResult, row: int, points: Sequence[int], words: list[str], most: int
) -> tuple[np.ndarray, np.ndarray]:
    """What is written in each cell, and what it says when it is pointed at; [point, read]."""
    tokens = result.top_tokens[:, row, :, :most]
    chances = result.top_probabilities[:, row, :, :most].tolist()
    entropy = result.entropy[:, row].tolist()
    real = result.real[row].tolist()
    texts = iter(result.text(tokens[list(points)].flatten()))
    cells = np.full((len(points), len(words)), "", dtype=object)
    hover = cells.copy()
    for i, point in enumerate(points):
        for j, word in enumerate(words):
            best = [shown_text(next(texts)) for _ in range(tokens.shape[-1])]
            if not real[j]:
                continue
            cells[i, j] = best[0].strip()[:_LONGEST] or best[0]
            listed = " · ".join(
                f"{text!r} {p:.3f}" for text, p in zip(best, chances[point][j], strict=True)
            )
            hover[i, j] = (
                f"{result.points[point].label}, {word} | {listed} | "
                f"entropy {entropy[point][j]:.3f} nats"
            )
    return cells, hover
