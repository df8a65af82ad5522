"""Stages of inference: the curves of a looped block over those of a feedforward model."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.drawing.colours import REFERENCE, iteration_colours
from tl_loops.drawing.draw import draw
from tl_loops.drawing.figure import Axis, Figure, Line, Mark, Panel, as_array, every_few
from tl_loops.drawing.quantities import RELATIVE_DEPTH, relative_depth_limits
from tl_loops.drawing.subject import subject_of
from tl_loops.layout.model import Model
from tl_loops.measurements.figure import pass_spans
from tl_loops.measurements.labels import metric_axis, metric_title
from tl_loops.measurements.profile import LoopProfile
from tl_loops.metrics.stages import StageAlignment, align_stages
from tl_loops.upstream import PromptsShown

Curves = Float[Tensor, "depth"] | Float[Tensor, "iteration depth"]


@checked
def plot_stages(
    profile: LoopProfile | Curves,
    reference: LoopProfile | Float[Tensor, "depth_ref"],
    metric: str | None = None,
    alignment: StageAlignment | None = None,
    *,
    outer: bool = True,
    model: Model | str | None = None,
    prompts: PromptsShown | None = None,
    title: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """Each iteration's depth profile over a feedforward model's (arXiv 2604.11791, Fig. 8).

    Both run from 0 to 100% of their depth. The hover and, for the last iteration, the line under
    the title give the numbers of :func:`tl_loops.metrics.align_stages`.

    Args:
        profile: The looped model's, or its values [iteration, depth].
        reference: The feedforward model's (or any other) profile, or its values [depth].
        metric: Name of the metric, for profiles; ``None``: the first one that both have.
        alignment: Of these curves; ``None``: computed where every value is defined.
        outer: Whether each curve includes prelude and coda (of a profile).
        model: Model or its name, where the curves are tensors.
        prompts: Their number or text, where the curves are tensors.
        title: In place of the general one.
        backend: See :func:`tl_loops.plots.draw`.
        **options: ``width``, ``height``, and what the library takes.

    Returns:
        A figure of the library.

    Raises:
        ValueError: The profiles share no metric, or the alignment is of another number of curves.
        ImportError: The library is missing.
    """
    subject = subject_of(profile, model=model, prompts=prompts)
    layout = profile.layout if isinstance(profile, LoopProfile) else None
    if metric is None:
        metric = _shared(profile, reference)
    curves = profile
    if isinstance(profile, LoopProfile):
        assert metric is not None
        looped = profile.layout is not None
        curves = profile.by_iteration(metric, outer=outer) if looped else profile.unrolled(metric)
    target = reference
    name = "reference"
    if isinstance(reference, LoopProfile):
        assert metric is not None
        target, name = reference.unrolled(metric), reference.provenance.model
    assert isinstance(curves, Tensor) and isinstance(target, Tensor)
    curves = curves[None] if curves.ndim == 1 else curves
    if alignment is None and target.numel() and curves.numel():
        if curves.isfinite().all() and target.isfinite().all():
            alignment = align_stages(curves, target)
    elif alignment is not None and alignment.pearson.reshape(-1).shape[0] != len(curves):
        raise ValueError(
            f"alignment has {alignment.pearson.numel()} curves, but there are {len(curves)}"
        )

    depth = _relative(curves.shape[1])
    marks: list[Mark] = []
    if layout is not None and outer:
        marks += pass_spans(layout, depth)
    marks.append(
        Line(_relative(len(target)), as_array(target), name, REFERENCE, width=3, symbol=None)
    )
    named = every_few(len(curves))
    for t, colour in enumerate(iteration_colours(len(curves))):
        values = as_array(curves[t])
        numbers = _numbers(alignment, t)
        hover = [f"iteration {t}: {value:.4g}{numbers}" for value in values]
        label = f"iteration {t}"
        marks.append(Line(depth, values, label, colour, hover=hover, in_legend=named(t)))
    if subject.n_iterations is None and subject.looped:
        subject = subject_of(profile, model=model, prompts=prompts, n_iterations=len(curves))
    notes = []
    if alignment is not None and len(curves):
        notes.append(f"Last iteration{_numbers(alignment, len(curves) - 1)}.")
    x = replace(RELATIVE_DEPTH, limits=relative_depth_limits(len(depth)))
    y = Axis("value") if metric is None else metric_axis(metric)
    figure = Figure(
        title or f"{'Stages' if metric is None else metric_title(metric)}: iterations over {name}",
        subject.line(complete=title is None),
        (Panel(tuple(marks), x, y),),
        legend="curve",
        footnotes=tuple(notes),
    )
    return draw(figure, backend, **options)


def _relative(n: int) -> np.ndarray:
    return np.arange(n) * (100.0 / max(n - 1, 1))


def _shared(profile: Any, reference: Any) -> str | None:
    of_profiles = [p.metrics for p in (profile, reference) if isinstance(p, LoopProfile)]
    if not of_profiles:
        return None
    shared = [name for name in of_profiles[0] if all(name in names for names in of_profiles)]
    if not shared:
        raise ValueError(f"the profiles share no metric: {of_profiles[0]} and {of_profiles[1]}")
    return shared[0]


def _numbers(alignment: StageAlignment | None, t: int) -> str:
    if alignment is None:
        return ""
    r, rmse = (float(torch.atleast_1d(v)[t]) for v in (alignment.pearson, alignment.rmse))
    start = int(torch.atleast_1d(alignment.window_start)[t])
    window = f"layers {start} to {start + alignment.window_length - 1}"
    return f" (r = {r:.2f}, RMSE = {rmse:.3g}, best window: {window})"
