"""How an entry of the registry is made: one function for each way of reading a run."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from tl_loops.measurements import reductions
from tl_loops.measurements.measurement import Activation, Bounds, Measurement, Place, own_options
from tl_loops.metrics import pairwise
from tl_loops.metrics.states import direction_cosine
from tl_loops.metrics.trajectories import classify_trajectory

SHARE: Bounds = (0.0, 1.0)
POSITIVE: Bounds = (0.0, math.inf)
COSINE: Bounds = (-1.0, 1.0)
PAPER = "arXiv 2604.11791"


def of_value(
    function: Callable,
    unit: str,
    bounds: Bounds,
    summary: str,
    source: str,
    reads: Activation = "resid_post",
    place: Place = "blocks",
    reduce: Callable | None = None,
    causal: bool | tuple[str, str] = False,
    **fixed: Any,
) -> Measurement:
    """A metric [batch] of one activation, or one that ``reduce`` makes so."""
    return Measurement(
        partial(reduce or function, **fixed),
        unit,
        bounds,
        summary,
        source,
        reads=reads,
        needs="value",
        place=place,
        options=own_options(function, fixed),
        causal=causal,
    )


def of_each_head(function: Callable, *meaning: Any, **more: Any) -> Measurement:
    """A metric [batch, head] of one pattern."""
    reduce = partial(reductions.mean_over_heads, function=function)
    return of_value(function, *meaning, reads="pattern", reduce=reduce, **more)


def between_patterns(summary: str, source: str, **needs: Any) -> Measurement:
    """The distance of a pattern to another one of the same layer."""
    return Measurement(
        reductions.distance_between_patterns,
        "Frobenius norm",
        POSITIVE,
        summary,
        source,
        reads="pattern",
        place="calls",
        options=own_options(pairwise.pattern_distance),
        **needs,
    )


def of_steps(
    function: Callable,
    unit: str,
    bounds: Bounds,
    summary: str,
    source: str,
    window: int = 2,
    reduce: Callable = reductions.last_step,
    **fixed: Any,
) -> Measurement:
    """A metric of the last few states of a layer."""
    return Measurement(
        partial(reduce, function=function, **fixed),
        unit,
        bounds,
        summary,
        source,
        reads="resid_post",
        needs="previous",
        place="calls",
        options=own_options(function, fixed),
        window=window,
    )


def to_fixed_point(
    function: Callable, unit: str, bounds: Bounds, summary: str, figure: str, **fixed: Any
) -> Measurement:
    """A metric that compares a layer's state with its last one."""
    return Measurement(
        partial(reductions.against_last, function=function, **fixed),
        unit,
        bounds,
        summary,
        f"{PAPER}, section 4.1 and {figure}",
        reads="resid_post",
        needs="last",
        place="calls",
        options=own_options(function, fixed),
        against_last=True,
    )


def of_trajectory(label: str) -> Measurement:
    """The share of tokens with one label, which the scores beside the labels do not change."""
    return Measurement(
        partial(reductions.label_fraction, label=label),
        "fraction of tokens",
        SHARE,
        f"Tokens whose path to the last iteration is labelled {label.replace('_', ' ')}",
        f"{PAPER}, App. C, Algorithm 1 (reconstructed)",
        reads="resid_post",
        needs="series",
        place="last calls",
        options=own_options(classify_trajectory, ("late_fraction", "min_periodicity")),
        per_token=direction_cosine,
        against_last=True,
    )


def of_step_part(component: str, unit: str, bounds: Bounds, summary: str) -> Measurement:
    """A part of a layer's step from one iteration to the next."""
    return Measurement(
        partial(reductions.step_component, component=component),
        unit,
        bounds,
        summary,
        "arXiv 2606.24898" + (", ratio defined here" if component == "norm_ratio" else ""),
        reads="resid_post",
        needs="previous",
        place="calls",
        options={},
        window=2,
    )


def of_path(
    reduce: Callable,
    per_token: Callable,
    unit: str,
    bounds: Bounds,
    summary: str,
    source: str,
    options: dict[str, Any],
    window: int = 2,
    least_calls: int = 2,
) -> Measurement:
    """A metric of the whole path of the states."""
    return Measurement(
        reduce,
        unit,
        bounds,
        summary,
        source,
        reads="state_out",
        needs="path",
        place="last iteration",
        options=options,
        window=window,
        least_calls=least_calls,
        per_token=per_token,
    )


def of_gates(
    function: Callable, unit: str, bounds: Bounds, summary: str, place: Place
) -> Measurement:
    """A metric of the halting gates."""
    return Measurement(
        partial(reductions.gates_over_tokens, function=function),
        unit,
        bounds,
        summary,
        "arXiv 2510.25741",
        reads="exit_gate",
        needs="series",
        place=place,
        options={},
        per_token=reductions.gate_logit,
    )
