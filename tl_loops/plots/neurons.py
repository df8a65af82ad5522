"""Prediction and suppression neurons by depth: from the weights, the same in every iteration."""

from dataclasses import replace
from typing import Any

import numpy as np

from tl_loops.arguments import checked
from tl_loops.drawing.colours import CODA, DISTINCT, PRELUDE
from tl_loops.drawing.draw import draw
from tl_loops.drawing.figure import Axis, Figure, Line, Mark, Panel, Span, as_array
from tl_loops.drawing.quantities import RELATIVE_DEPTH, relative_depth_limits, share
from tl_loops.drawing.subject import subject_of
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.metrics.neurons import PredictionSuppression

_KINDS = ("prediction", "suppression")


@checked
def plot_neurons(
    neurons: PredictionSuppression,
    reference: PredictionSuppression | None = None,
    *,
    partition: bool = False,
    model: Model | str | None = None,
    title: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """Share of prediction and suppression neurons in each physical layer (arXiv 2604.11791, E.1).

    Args:
        neurons: From :func:`tl_loops.metrics.prediction_suppression_neurons`.
        reference: Of a feedforward model, drawn dashed; both then run from 0 to 100% of their depth
            as in the paper.
        partition: Whether to show partition neurons too.
        model: Model or its name; a looped model also marks prelude, core and coda.
        title: In place of the general one.
        backend: See :func:`tl_loops.plots.draw`.
        **options: ``width``, ``height``, and what the library takes.

    Returns:
        A figure of the library.

    Raises:
        ImportError: The library is missing.
    """
    subject = subject_of(model=model)
    layout = subject.layout
    n_layers = len(neurons.prediction_fraction)
    relative = reference is not None
    marks: list[Mark] = []
    names = [f"layer {layer}" for layer in range(n_layers)]
    if layout is not None and layout.n_physical_layers == n_layers:
        marks += _spans(layout, n_layers, relative)
        names = layout.physical_names()
    for kind, colour in zip(
        (*_KINDS, "partition")[: 3 if partition else 2], DISTINCT, strict=False
    ):
        for label, found, dashed in (
            (kind, neurons, False),
            (f"{kind}, reference", reference, True),
        ):
            if found is None:
                continue
            part = as_array(getattr(found, f"{kind}_fraction"))
            count = getattr(found, f"{kind}_count").tolist()
            where = names if not dashed else [f"layer {layer}" for layer in range(len(part))]
            hover = [
                f"{place}: {n} {kind} neurons ({100 * s:.2g}%)"
                for place, n, s in zip(where, count, part, strict=True)
            ]
            x = _places(len(part), relative)
            marks.append(Line(x, part, label, colour, hover=hover, dashed=dashed))
    axis = replace(RELATIVE_DEPTH, limits=relative_depth_limits(n_layers))
    if not relative:
        ticks = tuple(enumerate(name.removeprefix("layer ") for name in names))
        axis = Axis("physical layer", ticks=ticks, limits=(-0.5, n_layers - 0.5))
    line = subject.line(complete=False) or ("" if title else "model not named")
    figure = Figure(
        title or "Prediction and suppression neurons by depth",
        " · ".join(part for part in (line, "weights only, no prompts") if part),
        (Panel(tuple(marks), axis, share("the layer's neurons")),),
        legend="kind",
    )
    return draw(figure, backend, **options)


def _places(n: int, relative: bool) -> np.ndarray:
    return np.arange(n) * (100.0 / max(n - 1, 1) if relative else 1.0)


def _spans(layout: LoopLayout, n_layers: int, relative: bool) -> list[Span]:
    step = 100.0 / max(n_layers - 1, 1) if relative else 1.0
    spans = []
    if layout.n_prelude:
        spans.append(Span(-0.5 * step, (layout.n_prelude - 0.5) * step, "prelude", PRELUDE))
    if layout.n_coda:
        first = n_layers - layout.n_coda
        spans.append(Span((first - 0.5) * step, (n_layers - 0.5) * step, "coda", CODA))
    return spans
