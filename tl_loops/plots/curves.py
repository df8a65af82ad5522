"""Any curves over iterations, layers or anything else, as a figure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.drawing.colours import DISTINCT, iteration_colours, layer_colours
from tl_loops.drawing.depth import depth_axis, iteration_rules, phase_spans
from tl_loops.drawing.draw import draw
from tl_loops.drawing.figure import Axis, Figure, Line, Mark, Panel, as_array, every_few
from tl_loops.drawing.quantities import ITERATION, named
from tl_loops.drawing.subject import line_of, subject_of
from tl_loops.layout.model import Model
from tl_loops.upstream import PromptsShown


@checked
def plot_curves(
    curves: Mapping[str, Float[Tensor, "point"]],
    title: str,
    *,
    x: Float[Tensor, "point"] | Sequence[float | int] | str | None = None,
    x_label: str | None = None,
    y_label: str = "value",
    bounds: tuple[float | int, float | int] | None = None,
    legend: str = "",
    colours: str = "distinct",
    log: bool = False,
    std: Mapping[str, Float[Tensor, "point"]] | None = None,
    model: Model | str | None = None,
    prompts: PromptsShown | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """Named curves over a common axis, for quantities that have no figure of their own.

    Args:
        curves: Values by name; NaN leaves a gap.
        title: What they are.
        x: Places of the values; ``None``: the iterations 0, 1, 2, ...; ``"blocks"``: the unrolled
            blocks of ``model``, with prelude and coda marked.
        x_label: Quantity and unit along x, where x holds numbers.
        y_label: Quantity and unit along y.
        bounds: The least and the largest value that the quantity can have, such as ``(0, 1)`` of a
            share; the axis does not go beyond. ``None``: there are none.
        legend: What the names are.
        colours: Green to yellow, blue to green, or colours without an order.
        log: Whether the values' axis is logarithmic.
        std: Half the height of a band, by name.
        model: Model or its name.
        prompts: Their number or text.
        backend: See :func:`tl_loops.plots.draw`.
        **options: ``width``, ``height``, and what the library takes.

    Returns:
        A figure of the library.

    Raises:
        ValueError: A curve has another number of points than x, or ``"blocks"`` without a model.
        ImportError: The library is missing.
    """
    palette = {
        "iterations": iteration_colours(len(curves)),
        "layers": layer_colours(len(curves)),
        "distinct": [DISTINCT[i % len(DISTINCT)] for i in range(len(curves))],
    }
    if colours not in palette:
        raise ValueError(f"colours={colours!r}, expected 'iterations', 'layers' or 'distinct'")
    subject = subject_of(model=model, prompts=prompts)
    marks: list[Mark] = []
    axis = named(ITERATION, x_label or "iteration") if x is None else Axis(x_label or "x")
    if isinstance(x, str):
        if x != "blocks" or model is None or isinstance(model, str):
            raise ValueError(f"x={x!r}, expected numbers, None, or 'blocks' with model=...")
        n_blocks, layout = model.cfg.n_layers, subject.layout
        axis, x = depth_axis(layout, n_blocks), list(range(n_blocks))
        marks += [*phase_spans(layout), *iteration_rules(layout)]
    elif x is not None:
        places = as_array(x)
        axis = replace(axis, whole=bool((places == places.round()).all()))
    in_legend = every_few(len(curves), most=20)
    for i, (name, values) in enumerate(curves.items()):
        y = as_array(values)
        places = np.arange(len(y), dtype=np.float64) if x is None else as_array(x)
        if y.shape != places.shape or y.ndim != 1:
            raise ValueError(
                f"curve {name!r} has shape {list(y.shape)}, expected [{places.size}], one value a "
                "place on x"
            )
        spread = as_array(std[name]) if std is not None and name in std else None
        colour = palette[colours][i]
        marks.append(Line(places, y, name, colour, spread=spread, in_legend=in_legend(i)))
    if bounds is not None and not bounds[0] <= bounds[1]:
        raise ValueError(f"bounds must be the least and the largest value, got {bounds}")
    y = Axis(y_label, log=log, bounds=bounds or (-math.inf, math.inf))
    figure = Figure(
        title,
        line_of(model, prompts),
        (Panel(tuple(marks), axis, y),),
        legend=legend,
    )
    return draw(figure, backend, **options)
