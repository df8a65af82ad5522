"""How the state settles: steps and distances to the last state, over the iterations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import argument, checked
from tl_loops.drawing.colours import layer_colours
from tl_loops.drawing.depth import iteration_values
from tl_loops.drawing.draw import draw
from tl_loops.drawing.figure import Figure, Line, Panel, as_array, every_few
from tl_loops.drawing.quantities import ITERATION
from tl_loops.drawing.subject import subject_of
from tl_loops.layout.model import Model
from tl_loops.measurements.figure import profile_panel
from tl_loops.measurements.labels import metric_axis, metric_title, spans_decades
from tl_loops.measurements.profile import LoopProfile
from tl_loops.metrics.dynamics import fixed_point_distance, successive_difference
from tl_loops.upstream import PromptsShown

_DEFAULT = ("successive_difference", "fixed_point_distance")


@checked
def plot_fixed_points(
    source: LoopProfile | Float[Tensor, "..."] | Any,
    metrics: Sequence[str] | None = None,
    *,
    std: bool = False,
    model: Model | str | None = None,
    prompts: PromptsShown | None = None,
    title: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """Successive differences and distances to the last iteration, one curve per core layer.

    arXiv 2604.11791, Fig. 3 and 4 (and 22 to 25 for the metrics of cosine and attention). On
    logarithmic axes a contraction is a straight line that falls; a drift is a flat one. The
    distance at the last iteration is 0 by construction and left out.

    Args:
        source: A profile with such metrics; an activation cache with ``resid_post`` of the core,
            without padding; or states [iteration, layer, ..., d_model] of one trajectory
            ([iteration, d_model] for one layer and token). Tokens are averaged.
        metrics: Which metrics of a profile, one panel each; ``None``: the successive difference
            and the fixed-point distance, or their relative versions.
        std: Whether bands show one standard deviation over prompts (of a profile).
        model: Model or its name, where the source is a tensor.
        prompts: Their number or text, where the source is no profile.
        title: In place of the general one.
        backend: See :func:`tl_loops.plots.draw`.
        **options: ``width``, ``height``, and what the library takes.

    Returns:
        A figure of the library.

    Raises:
        ValueError: The profile has no such metric, or the cache lacks the stream.
        ImportError: The library is missing.
    """
    given, source = source, iteration_values(source, "resid_post")
    if isinstance(source, LoopProfile):
        names = _available(source) if metrics is None else tuple(metrics)
        panels = tuple(
            profile_panel(source, name, "layer", std, spans_decades(name), metric_title(name))
            for name in names
        )
    else:
        source = argument("source", source, Float[Tensor, "..."])
        panels = _of_states(source)
    n_iterations = None if isinstance(source, LoopProfile) else source.shape[0]
    subject = subject_of(given, model=model, prompts=prompts, n_iterations=n_iterations)
    if subject.n_iterations == 1:
        note = "Nothing to draw: with one iteration only there is no step and no distance."
        panels = tuple(
            Panel((), panel.x, panel.y, title=panel.title, note=note) for panel in panels
        )
    figure = Figure(
        title or "Convergence over iterations, one curve per core layer",
        subject.line(complete=title is None),
        panels,
        columns=min(2, len(panels)),
        panel_size=(430, 330),
        legend="core layer",
    )
    return draw(figure, backend, **options)


def _available(profile: LoopProfile) -> tuple[str, ...]:
    for suffix in ("", "_relative"):
        names = tuple(name + suffix for name in _DEFAULT if name + suffix in profile.metrics)
        if names:
            return names
    raise ValueError(
        f"this profile has neither {' nor '.join(_DEFAULT)}: name others of its metrics "
        f"({', '.join(profile.metrics)}), or measure(model, prompts, metrics={_DEFAULT!r})"
    )


def _of_states(states: Any) -> tuple[Panel, ...]:
    if states.ndim < 2:
        raise ValueError(
            f"states has shape {list(states.shape)}, expected [iteration, layer, ..., d_model]"
        )
    if states.ndim == 2:
        states = states[:, None]
    # The metrics average over the axis before the last, so a layer of one token needs one.
    states = states.unsqueeze(-2) if states.ndim == 3 else states
    panels = []
    for name, function in zip(_DEFAULT, (successive_difference, fixed_point_distance), strict=True):
        values = function(states) if states.shape[0] else states.new_zeros(0, states.shape[1])
        values = as_array(values.mean(tuple(range(2, values.ndim))) if values.ndim > 2 else values)
        first, values = (1, values) if name == _DEFAULT[0] else (0, values[:-1])
        steps = np.arange(first, first + len(values), dtype=np.float64)
        n_layers = values.shape[1]
        named = every_few(n_layers)
        marks = tuple(
            Line(steps, values[:, layer], f"layer {layer}", colour, in_legend=named(layer))
            for layer, colour in enumerate(layer_colours(n_layers))
        )
        y = metric_axis(name, log=True)
        panels.append(Panel(marks, ITERATION, y, title=metric_title(name)))
    return tuple(panels)
