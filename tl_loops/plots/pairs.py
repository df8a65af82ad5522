"""All pairs of blocks: cosine of the residual stream, distance of the attention patterns."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.drawing.depth import block_ticks, block_values, matrix_marks
from tl_loops.drawing.draw import draw
from tl_loops.drawing.figure import Axis, ColourScale, Figure, Heat, Panel, as_array
from tl_loops.drawing.quantities import BLOCK
from tl_loops.drawing.subject import line_of, shown_text, subject_of
from tl_loops.layout.model import Model
from tl_loops.metrics.pairwise import pairwise_cosine, pairwise_pattern_distance
from tl_loops.upstream import Cache, PromptsShown

_WHAT = {
    "cosine": ("Residual stream: cosine between all pairs of blocks", "cosine, mean over tokens"),
    "attention": (
        "Attention: distance between the patterns of all pairs of blocks",
        "Frobenius norm, mean over heads",
    ),
}
_MOST_HOVERS = 6_000


@checked
def plot_pairs(
    source: Cache | Tensor,
    what: str = "cosine",
    *,
    model: Model | str | None = None,
    prompts: PromptsShown | None = None,
    title: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """A matrix over all pairs of unrolled blocks (arXiv 2604.11791, Fig. 2, 19 to 21).

    A loop that has settled into a cycle shows stripes along the diagonals, one every core layer.

    Args:
        source: An activation cache with ``resid_post`` (for the cosine) or ``pattern`` of all
            blocks, averaged over its prompts, which must not be padded; or a matrix [block, block],
            for instance of :func:`tl_loops.metrics.pairwise_cosine`.
        what: ``"cosine"`` of residual streams, or ``"attention"`` for Frobenius distances.
        model: Model or its name, where the source is a matrix; a model also labels the blocks.
        prompts: Their number or text.
        title: In place of the general one.
        backend: See :func:`tl_loops.plots.draw`.
        **options: ``width``, ``height``, and what the library takes.

    Returns:
        A figure of the library.

    Raises:
        ValueError: Unknown ``what``, no square matrix, or a cache that lacks the activation.
        ImportError: The library is missing.
    """
    if what not in _WHAT:
        raise ValueError(f"what={what!r}, expected 'cosine' or 'attention'")
    subject = subject_of(source, model=model, prompts=prompts)
    if hasattr(source, "cache_dict"):
        if what == "cosine":
            pairs = pairwise_cosine(block_values(source, "resid_post"))
        else:
            pairs = pairwise_pattern_distance(block_values(source, "pattern"))
        matrix = as_array(pairs.mean(-1))
    else:
        matrix = as_array(source)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"source has shape {list(matrix.shape)}, expected [block, block]")
    heading, unit = _WHAT[what]
    layout = subject.layout
    if layout is not None and layout.n_layers != len(matrix):
        layout = None
    axis = BLOCK
    if layout is not None:
        axis = Axis("unrolled block", ticks=block_ticks(layout, range(len(matrix))))
    names = list(map(str, range(len(matrix)))) if layout is None else layout.labels()
    panel = Panel(
        (Heat(matrix, hover=_pair_names(names, names)), *matrix_marks(layout)), axis, axis
    )
    figure = Figure(
        title or heading,
        subject.line(complete=title is None),
        (panel,),
        panel_size=(480, 440),
        colours=ColourScale.of(matrix, unit),
        keeps_shape=True,
    )
    return draw(figure, backend, **options)


@checked
def plot_matrix(
    values: Float[Tensor, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    *,
    row_label: str = "",
    column_label: str = "",
    unit: str = "",
    scale: Literal["sequential", "diverging"] = "sequential",
    limits: tuple[float | int, float | int] | None = None,
    model: Model | str | None = None,
    prompts: PromptsShown | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """Any matrix with named rows and columns as a heatmap.

    Args:
        values: [row, column]; NaN is left grey.
        rows: One name per row.
        columns: One name a column.
        title: What it shows, and of which model and on which prompts where these are not given.
        row_label: What the rows are.
        column_label: What the columns are.
        unit: What the numbers are.
        scale: ``"sequential"``, or ``"diverging"`` (white at 0).
        limits: Numbers at the ends of the scale; ``None``: from the data.
        model: Model or its name.
        prompts: Their number or text.
        backend: See :func:`tl_loops.plots.draw`.
        **options: ``width``, ``height``, and what the library takes.

    Returns:
        A figure of the library.

    Raises:
        ValueError: Names and values do not fit.
        ImportError: The library is missing.
    """
    matrix = as_array(values)
    if matrix.shape != (len(rows), len(columns)):
        raise ValueError(
            f"values {list(matrix.shape)} do not fit {len(rows)} rows and {len(columns)} columns"
        )
    panel = Panel(
        (Heat(matrix, hover=_pair_names(rows, columns)),),
        named_axis(column_label, columns),
        named_axis(row_label, rows),
    )
    size = (max(220, min(760, 26 * len(columns))), max(160, min(600, 22 * len(rows))))
    colours = ColourScale.of(matrix, unit, scale, limits)
    figure = Figure(title, line_of(model, prompts), (panel,), panel_size=size, colours=colours)
    return draw(figure, backend, **options)


def named_axis(label: str, names: Sequence[str]) -> Axis:
    """An axis of named places 0, 1, 2, ..."""
    return Axis(label, ticks=tuple((i, shown_text(name)) for i, name in enumerate(names)))


def _pair_names(rows: Sequence[str], columns: Sequence[str]) -> np.ndarray | None:
    """Texts for the hover; none where they would outweigh the figure."""
    if len(rows) * len(columns) > _MOST_HOVERS:
        return None
    return np.array([[f"{row}, {column}" for column in columns] for row in rows], dtype=object)
