"""Exits: when a model would leave the loop, and what it would have said."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.drawing.colours import DISTINCT
from tl_loops.drawing.draw import draw
from tl_loops.drawing.figure import Axis, Bars, Figure, Line, Panel, as_array
from tl_loops.drawing.quantities import ITERATION, PROBABILITY, share
from tl_loops.drawing.subject import subject_of
from tl_loops.layout.model import Model
from tl_loops.lens.exit_curve import ExitCurve
from tl_loops.measurements.profile import LoopProfile
from tl_loops.upstream import PromptsShown

_CURVES = {
    "loss": ("Loss", Axis("cross entropy (nats per token)", bounds=(0, math.inf))),
    "accuracy": ("Accuracy: right answers", share("answers")),
    "kl_to_last": (
        "Distance to the last readout",
        Axis("KL(last || this) (nats)", bounds=(0, math.inf)),
    ),
    "flip_rate": ("Flips: changed since the one before", share("predictions")),
    "overthinking": ("Overthinking: right here, wrong at last", share("answers")),
}

_OF_ANSWERS = ("accuracy", "overthinking")

Exits = (
    LoopProfile
    | Float[Tensor, "iteration *tokens"]
    | Int[Tensor, "..."]
    | Mapping[str, Int[Tensor, "..."]]
)


@checked
def plot_exits(
    source: Exits,
    *,
    n_iterations: int | None = None,
    model: Model | str | None = None,
    prompts: PromptsShown | None = None,
    title: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """How likely, or how often, the loop is left after each iteration.

    Args:
        source: A profile with ``exit_probability``; probabilities [iteration, ...] of
            :func:`tl_loops.metrics.exit_distribution`, averaged over the rest; the exit iteration
            of every token, whole numbers from 0; or several such by name, one for each criterion
            of :func:`tl_loops.metrics.exit_iteration`.
        n_iterations: How many there are, where exit iterations do not tell.
        model: Model or its name.
        prompts: Their number or text.
        title: In place of the general one.
        backend: See :func:`tl_loops.plots.draw`.
        **options: ``width``, ``height``, and what the library takes.

    Returns:
        A figure of the library.

    Raises:
        ValueError: The profile has no exit probabilities, a probability is out of [0, 1], or an
            exit iteration out of range.
        ImportError: The library is missing.
    """
    if n_iterations is not None and n_iterations < 1:
        raise ValueError(f"n_iterations must be at least 1, got {n_iterations}")
    subject = subject_of(source, model=model, prompts=prompts, n_iterations=n_iterations)
    if isinstance(source, Mapping) or (
        isinstance(source, Tensor) and not source.is_floating_point()
    ):
        given = source if isinstance(source, Mapping) else {"tokens": source}
        if subject.n_iterations is None:
            most = max((int(v.max()) for v in given.values() if v.numel()), default=-1)
            n_iterations = most + 1
        else:
            n_iterations = subject.n_iterations
        shares = {name: _histogram(name, v, n_iterations) for name, v in given.items()}
        y = share("tokens")
        heading = "Exit iteration"
        notes = tuple(
            f"{name}: {v.numel()} tokens, mean {as_array(v).mean():.2f}."
            for name, v in given.items()
            if v.numel() and len(given) == 1
        )
    else:
        probability = _probabilities(source)
        shares = {"probability": probability}
        y = PROBABILITY
        heading = "Exit distribution"
        expected = float(np.arange(len(probability)) @ probability) if len(probability) else np.nan
        notes = (f"Expected exit: iteration {expected:.2f}.",) if np.isfinite(expected) else ()
    n = max((len(share) for share in shares.values()), default=0)
    x = np.arange(n, dtype=np.float64)
    bars = tuple(
        Bars(x, share, name, DISTINCT[i % len(DISTINCT)])
        for i, (name, share) in enumerate(shares.items())
    )
    if subject.n_iterations is None:
        subject = subject_of(source, model=model, prompts=prompts, n_iterations=n)
    axis = replace(ITERATION, limits=(-0.6, max(n, 1) - 0.4))
    figure = Figure(
        title or heading,
        subject.line(complete=title is None),
        (Panel(bars, axis, y),),
        panel_size=(560, 320),
        legend="criterion",
        footnotes=notes,
    )
    return draw(figure, backend, **options)


@checked
def plot_exit_curves(
    curve: ExitCurve,
    *,
    std: bool = False,
    model: Model | str | None = None,
    prompts: PromptsShown | None = None,
    title: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """Loss, accuracy, distance to the last readout, flips and overthinking by forced exit.

    Without answers there are loss, distance and flips of the predicted tokens.

    Args:
        curve: From :func:`tl_loops.exit_curve`.
        std: Whether bands show one standard deviation over prompts.
        model: Model or its name.
        prompts: Their text; ``None``: as many as were measured.
        title: In place of the general one.
        backend: See :func:`tl_loops.plots.draw`.
        **options: ``width``, ``height``, and what the library takes.

    Returns:
        A figure of the library.

    Raises:
        ImportError: The library is missing.
    """
    panels = []
    n = curve.moments["loss"].mean.shape[0]
    for i, (name, (heading, y)) in enumerate(_CURVES.items()):
        if name in _OF_ANSWERS and not curve.has_answers:
            continue
        moments = curve.moments[name]
        exists = as_array(moments.count + moments.undefined) > 0
        x = np.arange(n, dtype=np.float64)[exists]
        mean, spread = as_array(moments.mean)[exists], as_array(moments.std())[exists]
        note = ""
        if name == "flip_rate" and n == 1:
            note = "Nothing to draw: with one iteration only no answer can change."
        line = Line(
            x,
            mean,
            heading,
            DISTINCT[i],
            spread=np.nan_to_num(spread) if std else None,
            in_legend=False,
        )
        axis = replace(ITERATION, label="exit after iteration", limits=(-0.5, n - 0.5))
        panels.append(Panel((line,), axis, y, title=heading, note=note))
    subject = subject_of(
        model=model, prompts=curve.n_prompts if prompts is None else prompts, n_iterations=n
    )
    notes = [f"{curve.n_targets} predicted tokens."]
    if curve.has_answers and np.isfinite(curve.oracle_headroom):
        notes.append(
            f"A perfect choice of the exit would add {100 * curve.oracle_headroom:.1f}% accuracy."
        )
    if std:
        notes.append("Bands: one standard deviation over prompts.")
    figure = Figure(
        title or "What the model says when it leaves the loop early",
        subject.line(complete=title is None),
        tuple(panels),
        columns=3,
        panel_size=(280, 230),
        footnotes=(" ".join(notes),),
    )
    return draw(figure, backend, **options)


def _probabilities(source: Any) -> np.ndarray:
    if isinstance(source, LoopProfile):
        if "exit_probability" not in source.metrics:
            raise ValueError(
                "the profile has no exit_probability: measure(model, prompts, "
                "metrics=('exit_probability',)) of a model with an exit gate"
            )
        # One value per iteration, at its last layer.
        return as_array(source.by_iteration("exit_probability")[:, -1])
    values = as_array(source)
    if values.ndim == 0:
        raise ValueError("probabilities must be [iteration, ...], got a single number")
    finite = values[np.isfinite(values)]
    if finite.size and (finite.min() < -1e-6 or finite.max() > 1 + 1e-6):
        raise ValueError(
            f"probabilities lie in [0, 1], got {finite.min():.4g} to {finite.max():.4g}: pass "
            "tl_loops.metrics.exit_distribution(gate_logits)"
        )
    return values.reshape(len(values), -1).mean(1) if values.size else np.zeros(0)


def _histogram(name: str, exits: Tensor, n_iterations: int) -> np.ndarray:
    flat = exits.detach().cpu().reshape(-1)
    if not flat.numel():
        return np.zeros(0)
    low, high = int(flat.min()), int(flat.max())
    if low < 0 or high >= n_iterations:
        raise ValueError(
            f"{name} exits between iteration {low} and {high}, but there are {n_iterations} "
            "iterations, counted from 0"
        )
    return np.bincount(flat.numpy(), minlength=n_iterations) / flat.numel()
