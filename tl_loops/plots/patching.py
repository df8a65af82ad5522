"""Patching effects as heatmaps: facets or frames over iterations, tokens on the axis."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.drawing.draw import draw
from tl_loops.drawing.figure import ColourScale, Figure, Heat, Panel, as_array
from tl_loops.drawing.subject import subject_of
from tl_loops.layout.model import Model
from tl_loops.plots.pairs import named_axis
from tl_loops.runs.grid import axis_labels
from tl_loops.upstream import PromptsShown

_SYNONYMS = {"head_index": "head", "dest_pos": "pos"}
_NAMES = {
    "pos": "position",
    "src_pos": "source position",
    "head": "head",
    "layer": "layer",
    "block": "unrolled block",
    "iteration": "iteration",
}
_ACROSS = ("src_pos", "pos", "head", "layer", "block", "iteration")
"""Which axis runs along x, if it is there: the first of these."""


@checked
def plot_patching(
    effect: Float[Tensor, "..."],
    axes: Sequence[str],
    *,
    model: Model | str | None = None,
    tokens: Int[Tensor, "*batch pos"] | None = None,
    labels: Sequence[Sequence[str]] | None = None,
    facet: str | None = None,
    animate: bool = False,
    unit: str = "effect on the metric",
    limits: tuple[float | int, float | int] | None = None,
    prompts: PromptsShown | None = None,
    title: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """What patching each cell does, red below 0 and blue above, white at 0.

    Positions run along x with their tokens, or else heads, then layers. One more axis runs along y.
    Where there are three or more axes, one panel per iteration (or layer, or block) shows the rest;
    a fourth axis makes one panel for each pair.

    Args:
        effect: From :func:`tl_loops.patching.activation_patch`, one axis a name.
        axes: The names, as given there.
        model: The model: for labels, and for the line under the title. A name gives only the
            latter.
        tokens: The prompt that was patched, [batch, pos] or [pos]; its tokens label positions.
        labels: Labels of every axis, in place of those from the model and the tokens; needed where
            ``where`` or ``window`` was given (``tl_loops.patching.axis_labels`` makes them).
        facet: The axis that the panels run over; ``None``: the first of iteration, layer, block and
            head that is left.
        animate: Whether plotly shows one panel at a time, with a slider and a button that plays
            them; matplotlib, which cannot move, draws all.
        unit: What the numbers are.
        limits: Numbers at the ends of the colour scale; ``None``: the largest effect to both sides.
        prompts: Their number or text; ``None``: the tokens.
        title: In place of the general one.
        backend: See :func:`tl_loops.plots.draw`.
        **options: ``width``, ``height``, and what the library takes.

    Returns:
        A figure of the library.

    Raises:
        ValueError: Axes, labels and effect do not fit, or an unknown facet.
        ImportError: The library is missing.
    """
    names = [_SYNONYMS.get(axis, axis) for axis in axes]
    values = as_array(effect)
    if values.ndim != len(names) or not names:
        raise ValueError(
            f"effect has shape {list(values.shape)}, but axes names {len(names)}: {list(axes)}"
        )
    if len(set(names)) != len(names) or set(names) - set(_NAMES):
        raise ValueError(f"axes={list(axes)}, expected different ones of {', '.join(_NAMES)}")
    texts = _labels(values, axes, names, model, tokens, labels)

    across = next(name for name in _ACROSS if name in names)
    if facet is not None:
        facet = _SYNONYMS.get(facet, facet)
        if facet not in names or facet == across:
            free = [name for name in names if name != across]
            raise ValueError(f"facet={facet!r}, expected one of {free}")
    rest = [name for name in names if name != across and name != facet]
    facets = [] if facet is None else [facet]
    order = ("iteration", "layer", "block", "head", "pos")
    while len(rest) > 1:
        chosen = next(name for name in order if name in rest)
        rest.remove(chosen)
        facets.append(chosen)
    down = rest[0] if rest else None

    arranged = np.moveaxis(
        values,
        [names.index(name) for name in (*facets, *([down] if down else []), across)],
        range(values.ndim),
    )
    columns, rows = texts[across], texts[down] if down else [""]
    x = named_axis(_NAMES[across], columns)
    y = named_axis(_NAMES[down] if down else "", rows)
    panels = []
    for cell in itertools.product(*(range(len(texts[name])) for name in facets)):
        matrix = arranged[cell].reshape(len(rows), len(columns))
        heading = ", ".join(
            f"{_NAMES[name]} {_bare(texts[name][i])}" for name, i in zip(facets, cell, strict=True)
        )
        where = [heading] if heading else []
        hover = np.array(
            [[", ".join([*where, *([r] if r else []), c]) for c in columns] for r in rows],
            dtype=object,
        ).reshape(matrix.shape)
        panels.append(Panel((Heat(matrix, hover=hover),), x, y, title=heading))
    subject = subject_of(model=model, prompts=tokens if prompts is None else prompts)
    if "iteration" in names:
        n_iterations = len(texts["iteration"])
        subject = subject_of(
            model=model,
            prompts=tokens if prompts is None else prompts,
            n_iterations=n_iterations,
        )
    width = max(200, min(900, 15 * len(columns)))
    most = max(1, 1100 // (width + 30))
    # One panel alone has room; of many each is low.
    alone = len(panels) == 1 or animate
    height = max(150, min(460, 34 * len(rows))) if alone else max(50, min(420, 22 * len(rows)))
    figure = Figure(
        title or "Activation patching: effect by " + ", ".join(_NAMES[name] for name in names),
        subject.line(complete=title is None),
        tuple(panels),
        columns=max(1, min(len(panels), most, 4)),
        panel_size=(width, height),
        colours=ColourScale.of(values, unit, "diverging", limits),
        slider=_NAMES[facets[0]] if animate and facets else "",
        shared_x=True,
    )
    return draw(figure, backend, **options)


def _labels(
    values: np.ndarray,
    axes: Sequence[str],
    names: Sequence[str],
    model: Model | str | None,
    tokens: Tensor | None,
    labels: Sequence[Sequence[str]] | None,
) -> dict[str, list[str]]:
    """Labels by axis name."""
    if labels is None:
        positions = {"pos", "src_pos"} & set(names)
        if model is None or isinstance(model, str) or (positions and tokens is None):
            labels = [[str(i) for i in range(n)] for n in values.shape]
        else:
            labels = axis_labels(model, axes, tokens, activation=_activation_with(names))
    found = {name: list(texts) for name, texts in zip(names, labels, strict=False)}
    sizes = tuple(len(found.get(name, ())) for name in names)
    if sizes != values.shape:
        raise ValueError(
            f"labels are for a grid {list(sizes)}, but effect has shape {list(values.shape)}: "
            "where a part was patched, or windows, pass labels=tl_loops.patching.axis_labels("
            "model, axes, tokens, window=..., where=...)"
        )
    return found


def _activation_with(names: Sequence[str]) -> str:
    """Some activation that has the named axes; labels are the same for all that have."""
    if "src_pos" in names:
        return "pattern"
    if "head" in names:
        return "z"
    return "resid_pre"


def _bare(label: str) -> str:
    """``3`` of ``r3`` or ``l3``, which follow the word that the letter stands for."""
    return label[1:] if label[:1] in "rlH" and label[1:].isdigit() else label
