"""Examples of trajectory classes: the cosine to the last state, and its spectrum."""

from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.drawing.colours import DISTINCT
from tl_loops.drawing.depth import iteration_values
from tl_loops.drawing.draw import draw
from tl_loops.drawing.figure import Figure, Line, Panel, as_array
from tl_loops.drawing.quantities import AMPLITUDE, COSINE, FREQUENCY, ITERATION, named
from tl_loops.drawing.subject import subject_of
from tl_loops.layout.model import Model
from tl_loops.metrics.trajectories import (
    TRAJECTORY_LABELS,
    TrajectoryClassification,
    classify_trajectory,
)
from tl_loops.upstream import PromptsShown

_TYPICAL = {
    # The example of a class is the token for which this is largest.
    "fixed_point": lambda c: c.near_fraction,
    "orbit": lambda c: c.amplitude,
    "slider": lambda c: c.late_speed,
    "unknown": lambda c: c.drop,
}


@checked
def plot_trajectories(
    source: TrajectoryClassification | Float[Tensor, "iteration *tokens d_model"] | Any,
    *,
    examples: int = 1,
    model: Model | str | None = None,
    prompts: PromptsShown | None = None,
    title: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """One token (or a few) of each trajectory class: its path, and the spectrum of the path.

    Left s_t = cos(x_t, x_last), what arXiv 2604.11791 (App. C) classifies; right the amplitude of
    its oscillations by frequency, after a linear trend was removed: an orbit has a peak at 1 /
    period. Of each class the clearest tokens are shown: the quickest fixed point, the widest orbit,
    the fastest slider, the unknown path that falls back the most.

    Args:
        source: From :func:`tl_loops.metrics.classify_trajectory`; or an activation cache with
            ``state_out``, or states [iteration, ..., d_model], which are classified with its
            defaults.
        examples: Tokens of each class, at most.
        model: Model or its name.
        prompts: Their number or text.
        title: In place of the general one.
        backend: See :func:`tl_loops.plots.draw`.
        **options: ``width``, ``height``, and what the library takes.

    Returns:
        A figure of the library; a class without a token has no row, and the shares of all classes
        stand under the title.

    Raises:
        ValueError: ``examples`` is below 1, or the cache lacks the states.
        ImportError: The library is missing.
    """
    if examples < 1:
        raise ValueError(f"examples={examples}, expected at least 1")
    given, source = source, iteration_values(source, "state_out")
    found = source if isinstance(source, TrajectoryClassification) else classify_trajectory(source)
    similarity = as_array(found.similarity)
    n_iterations = similarity.shape[0]
    similarity = similarity.reshape(n_iterations, -1)
    labels = np.asarray(found.labels).reshape(-1)
    where = np.unravel_index(np.arange(labels.size), np.shape(found.labels) or (1,))

    panels: list[Panel] = []
    t = np.arange(n_iterations, dtype=np.float64)
    x, y = ITERATION, named(COSINE, "cosine to the last state")
    for kind, colour in zip(TRAJECTORY_LABELS, DISTINCT, strict=False):
        members = np.flatnonzero(labels == kind)
        if not len(members) or n_iterations < 2:
            continue
        score = as_array(_TYPICAL[kind](found)).reshape(-1)[members]
        order = np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")
        chosen = members[order[:examples]]
        words = kind.replace("_", " ")
        paths, spectra = [], []
        for token in chosen.tolist():
            name = "token " + (", ".join(str(int(axis[token])) for axis in where) or "0")
            path = similarity[:, token]
            paths.append(Line(t, path, name, colour, symbol=None, in_legend=False))
            places, amplitude = oscillations(path)
            spectra.append(Line(places, amplitude, name, colour, symbol=None, in_legend=False))
        shown = paths[0].name if len(paths) == 1 else f"{len(paths)} tokens"
        panels.append(Panel(tuple(paths), x, y, title=f"{words}: {shown}"))
        panels.append(Panel(tuple(spectra), FREQUENCY, AMPLITUDE, title=f"{words}: spectrum"))
    if not panels:
        note = "Nothing to draw: there is no token."
        if labels.size and n_iterations < 2:
            note = "Nothing to draw: with one iteration only there is no path."
        panels.append(Panel((), x, y, note=note))
    shares = ", ".join(
        f"{kind.replace('_', ' ')} {100 * found.fraction(kind):.1f}%"
        for kind in TRAJECTORY_LABELS
        if labels.size
    )
    subject = subject_of(given, model=model, prompts=prompts)
    if subject.n_iterations != n_iterations:  # a long trajectory of a model that is set to fewer
        name = model if isinstance(model, str) or model is None else model.cfg.model_name
        subject = subject_of(model=name, prompts=prompts, n_iterations=n_iterations)
    figure = Figure(
        title or "Trajectory classes by example",
        subject.line(complete=title is None),
        tuple(panels),
        columns=min(2, len(panels)),
        panel_size=(400, 190),
        footnotes=(f"Of {labels.size} tokens: {shares}.",) if labels.size else (),
    )
    return draw(figure, backend, **options)


def oscillations(
    curve: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies in cycles per iteration, and the amplitude of a curve's oscillation at each.

    A linear trend is removed first. A cosine of amplitude a whose period divides the length gives
    a at its frequency and 0 elsewhere (but for the trend).
    """
    n = len(curve)
    t = np.arange(n, dtype=np.float64) - (n - 1) / 2
    flat = curve - curve.mean()
    flat = flat - t * (t @ flat) / max(t @ t, 1.0)
    amplitude = 2 * np.abs(np.fft.rfft(flat)) / n
    if n % 2 == 0:
        amplitude[-1] /= 2
    return np.fft.rfftfreq(n), amplitude
