"""Probes and directions over iterations and layers: accuracy, transfer, separation, cosines."""

from typing import Any

import numpy as np
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.drawing.draw import draw
from tl_loops.drawing.figure import ColourScale, Figure, Heat, Panel, as_array
from tl_loops.drawing.subject import subject_of
from tl_loops.layout.model import Model
from tl_loops.plots.pairs import named_axis
from tl_loops.probes.directions import ConceptDirections
from tl_loops.probes.pairs import PairProbes
from tl_loops.probes.task import TaskProbes
from tl_loops.upstream import PromptsShown

_SHARE, _SIGNED = ("sequential", (0.0, 1.0)), ("diverging", (-1.0, 1.0))
_OF_PROBES: dict[str, tuple[str, str, Any]] = {
    "accuracy": ("Accuracy of the probes on held-out prompts", "share right", _SHARE),
    "selectivity": ("Accuracy of the probes minus control", "difference of shares", _SIGNED),
    "control": ("Accuracy of probes for shuffled labels", "share right", _SHARE),
    "transfer": (
        "Probes fitted at one iteration, tested at another",
        "share right",
        _SHARE,
    ),
}
_OF_DIRECTIONS: dict[str, tuple[str, str, Any]] = {
    "auc": ("Separation of held-out prompts", "area under the curve", _SHARE),
    "cosine": ("Cosine between the directions of iterations", "cosine", _SIGNED),
    "norm": ("Length of the directions", "L2 norm", ("sequential", None)),
}
_BETWEEN = ("transfer", "cosine")
"""What is a matrix of two iterations for each layer."""

_MOST_WRITTEN = 16
"""Columns up to which the numbers are written in the cells."""


@checked
def plot_probes(
    result: TaskProbes | PairProbes | ConceptDirections,
    what: str | None = None,
    *,
    model: Model | str | None = None,
    prompts: PromptsShown | None = None,
    limits: tuple[float | int, float | int] | None = None,
    title: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """What probes read, or directions part, at each iteration and layer.

    Iterations run along x and layers down; of transfer matrices and cosines there is one panel per
    layer, with the iteration that was fitted down and that which was tested along x.

    Args:
        result: Of :func:`tl_loops.probes.task_probes`, :func:`tl_loops.probes.pair_probes` or
            :func:`tl_loops.probes.concept_directions`.
        what: Of probes ``"accuracy"`` (the default), ``"selectivity"``, ``"control"`` or
            ``"transfer"``; of directions ``"auc"`` (the default), ``"cosine"`` or ``"norm"``.
        model: Model or its name, for the line under the title.
        prompts: Their number or text; ``None``: the number of those held out.
        limits: Numbers at the ends of the colour scale; ``None``: those of the quantity.
        title: In place of the general one.
        backend: See :func:`tl_loops.plots.draw`.
        **options: ``width``, ``height``, and what the library takes.

    Returns:
        A figure of the library.

    Raises:
        ValueError: Unknown ``what``.
        ImportError: The library is missing.
    """
    found = result.probes if isinstance(result, PairProbes) else result
    known = _OF_DIRECTIONS if isinstance(found, ConceptDirections) else _OF_PROBES
    what = next(iter(known)) if what is None else what
    if what not in known:
        raise ValueError(f"what must be one of {', '.join(known)}, got {what!r}")
    heading, unit, (scale, usual) = known[what]
    values: Tensor = getattr(found, what)
    if what == "transfer":
        values = values.permute(2, 0, 1)
    if what in _BETWEEN:
        panels = _pairs(found, values, what)
    else:
        panels = [_grid(found, values)]
    n_held_out = found.n_held_out if isinstance(found, ConceptDirections) else len(found.labels)
    subject = subject_of(
        model=model,
        prompts=n_held_out if prompts is None else prompts,
        n_iterations=len(found.iterations),
    )
    n_columns = len(found.iterations)
    n_rows = n_columns if what in _BETWEEN else len(found.layers)
    figure = Figure(
        title or f"{heading} ({found.activation})",
        subject.line(complete=title is None),
        tuple(panels),
        columns=min(len(panels), 3),
        panel_size=(max(220, min(760, 42 * n_columns)), max(70, min(520, 34 * n_rows))),
        colours=ColourScale.of(as_array(values), unit, scale, usual if limits is None else limits),
    )
    return draw(figure, backend, **options)


def _grid(found: TaskProbes | ConceptDirections, values: Tensor) -> Panel:
    """Iterations along x, layers down."""
    columns = [str(t) for t in found.iterations]
    rows = [str(layer) for layer in found.layers]
    matrix = as_array(values.T)
    points = np.array(found.points, dtype=object).reshape(len(columns), len(rows)).T
    hover = points
    if isinstance(found, TaskProbes):
        low, high = found.interval().unbind(-1)
        told = zip(
            points.flat, low.T.flatten().tolist(), high.T.flatten().tolist(),
            found.control.T.flatten().tolist(), strict=True,
        )  # fmt: skip
        texts = [
            f"{point} | accuracy 95% interval {a:.3f} to {b:.3f} | control {c:.3f}"
            for point, a, b, c in told
        ]
        hover = np.array(texts, dtype=object).reshape(points.shape)
    heat = Heat(matrix, hover=hover, text=_written(matrix))
    return Panel((heat,), named_axis("iteration", columns), named_axis("layer", rows))


def _pairs(found: TaskProbes | ConceptDirections, values: Tensor, what: str) -> list[Panel]:
    """A panel per layer: fitted at one iteration (down), tested at another (along x)."""
    names = [str(t) for t in found.iterations]
    transfer = what == "transfer"
    x = named_axis("tested at iteration" if transfer else "iteration", names)
    y = named_axis("fitted at iteration" if transfer else "iteration", names)
    panels = []
    for layer, matrix in zip(found.layers, values, strict=True):
        cells = as_array(matrix)
        hover = np.array([[f"{a}, {b}" for b in names] for a in names], dtype=object)
        heading = f"layer {layer}" if len(found.layers) > 1 else ""
        panels.append(Panel((Heat(cells, hover=hover, text=_written(cells)),), x, y, title=heading))
    return panels


def _written(matrix: np.ndarray) -> np.ndarray | None:
    """Numbers for the cells, where there is room for them."""
    if not matrix.size or matrix.shape[1] > _MOST_WRITTEN:
        return None
    texts = ["" if np.isnan(value) else f"{value:.2f}" for value in matrix.flat]
    return np.array(texts, dtype=object).reshape(matrix.shape)
