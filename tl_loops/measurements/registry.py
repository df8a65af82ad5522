"""The registry: every measurement by name."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from tl_loops.measurements import reductions
from tl_loops.measurements.measurement import Activation, Bounds, Measurement, Place, own_options
from tl_loops.metrics import attention, dynamics, exits, massive, pairwise, residual
from tl_loops.metrics.states import direction_cosine
from tl_loops.metrics.trajectories import TRAJECTORY_LABELS, classify_trajectory

_SHARE: Bounds = (0.0, 1.0)
_POSITIVE: Bounds = (0.0, math.inf)
_COSINE: Bounds = (-1.0, 1.0)
_PAPER = "arXiv 2604.11791"


def _value(
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


def _per_head(function: Callable, *meaning: Any, **more: Any) -> Measurement:
    """A metric [batch, head] of one pattern."""
    reduce = partial(reductions.mean_over_heads, function=function)
    return _value(function, *meaning, reads="pattern", reduce=reduce, **more)


def _between_patterns(summary: str, source: str, **needs: Any) -> Measurement:
    """The distance of a pattern to another one of the same layer."""
    return Measurement(
        reductions.distance_between_patterns,
        "Frobenius norm",
        _POSITIVE,
        summary,
        source,
        reads="pattern",
        place="calls",
        options=own_options(pairwise.pattern_distance),
        **needs,
    )


def _step(
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


def _fixed_point(
    function: Callable, unit: str, bounds: Bounds, summary: str, figure: str, **fixed: Any
) -> Measurement:
    """A metric that compares a layer's state with its last one."""
    return Measurement(
        partial(reductions.against_last, function=function, **fixed),
        unit,
        bounds,
        summary,
        f"{_PAPER}, section 4.1 and {figure}",
        reads="resid_post",
        needs="last",
        place="calls",
        options=own_options(function, fixed),
        against_last=True,
    )


def _trajectory(label: str) -> Measurement:
    """The share of tokens with one label, which the scores beside the labels do not change."""
    return Measurement(
        partial(reductions.label_fraction, label=label),
        "fraction of tokens",
        _SHARE,
        f"Tokens whose path to the last iteration is labelled {label.replace('_', ' ')}",
        f"{_PAPER}, App. C, Algorithm 1 (reconstructed)",
        reads="resid_post",
        needs="series",
        place="last calls",
        options=own_options(classify_trajectory, ("late_fraction", "min_periodicity")),
        per_token=direction_cosine,
        against_last=True,
    )


def _exit(function: Callable, unit: str, bounds: Bounds, summary: str, place: Place) -> Measurement:
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


MEASUREMENTS: dict[str, Measurement] = {
    # Attention patterns.
    "sink_rate": _value(
        attention.sink_rate,
        "fraction of heads",
        _SHARE,
        "Heads whose mean attention to the first token reaches the threshold",
        f"{_PAPER}, Eq. 17",
        reads="pattern",
        reduce=reductions.sink_rate,
        causal=("norm", "visible"),
    ),
    "sink_score": _per_head(
        attention.sink_score,
        "probability",
        _SHARE,
        "Mean attention that the first token receives",
        f"{_PAPER}, Eq. 16",
        causal=("norm", "visible"),
    ),
    "mixing_score": _per_head(
        attention.mixing_score,
        "nats",
        _POSITIVE,
        "Mean entropy of the attention rows",
        f"{_PAPER}, Eq. 18",
        causal=("normalize", "row"),
    ),
    "mixing_score_log": _per_head(
        attention.mixing_score,
        "1",
        _SHARE,
        "Mean entropy of the attention rows over log T",
        f"{_PAPER}, Eq. 18, over log T as in arXiv 2510.06477",
        normalize="log",
    ),
    "mixing_score_length": _per_head(
        attention.mixing_score,
        "nats / token",
        _POSITIVE,
        "Mean entropy of the attention rows over T, by its range what the paper plots",
        f"{_PAPER}, Eq. 18, over T",
        normalize="length",
    ),
    "mixing_score_row": _per_head(
        attention.mixing_score,
        "1",
        _SHARE,
        "Mean of each row's entropy over that of uniform attention",
        f"{_PAPER}, Eq. 18, each row over the log of its visible keys",
        causal=True,
        normalize="row",
    ),
    "colsum_concentration": _per_head(
        attention.colsum_concentration,
        "1",
        _SHARE,
        "How much the attention of all queries gathers on few keys",
        f"{_PAPER}, section 2.2",
    ),
    "sink_identity_index": _per_head(
        attention.sink_identity_index,
        "1",
        _COSINE,
        "1 for sinks on the first token, -1 for attention to oneself",
        "defined here, after arXiv 2510.06477",
    ),
    "diagonal_score": _per_head(
        attention.diagonal_score,
        "probability",
        _SHARE,
        "Mean attention of a token to itself",
        "defined here, after arXiv 2510.06477",
    ),
    "previous_token_score": _per_head(
        attention.previous_token_score,
        "probability",
        _SHARE,
        "Mean attention of a token to the one before it",
        "defined here, after arXiv 2510.06477",
    ),
    "attention_successive_difference": _between_patterns(
        "Distance between a layer's patterns in successive iterations",
        f"{_PAPER}, section 4.1 and Fig. 25",
        needs="previous",
        window=2,
    ),
    "attention_fixed_point_distance": _between_patterns(
        "Distance of a layer's pattern to that of the last iteration",
        f"{_PAPER}, App. D.2 and Fig. 23",
        needs="last",
        against_last=True,
    ),
    # Residual stream.
    "residual_entropy": _value(
        residual.residual_entropy,
        "nats",
        _POSITIVE,
        "Matrix-based entropy of the tokens' residual streams",
        "arXiv 2510.06477",
    ),
    "residual_entropy_log_T": _value(
        residual.residual_entropy,
        "1",
        _SHARE,
        "Matrix-based entropy of the tokens' residual streams over log T",
        "arXiv 2510.06477",
        normalize="log_T",
    ),
    "effective_rank": _value(
        residual.effective_rank,
        "directions",
        (1.0, math.inf),
        "Exponential of the residual entropy",
        "arXiv 2510.06477",
    ),
    "participation_ratio": _value(
        residual.participation_ratio,
        "directions",
        (1.0, math.inf),
        "Exponential of the residual entropy of order 2",
        "arXiv 2502.02013",
    ),
    "residual_norm": _value(
        residual.residual_norm,
        "L2 norm",
        _POSITIVE,
        "Mean length of the residual stream",
        f"{_PAPER}, Fig. 9",
    ),
    "bos_norm_ratio": _value(
        massive.bos_norm_ratio,
        "1",
        _POSITIVE,
        "Length of the first token over the mean length of the others",
        "arXiv 2510.06477",
    ),
    "massive_activations": _value(
        massive.massive_activations,
        "count",
        _POSITIVE,
        "Number of massive activations",
        "arXiv 2402.17762, section 2",
        reduce=reductions.massive_count,
    ),
    "state_entropy": _value(
        residual.residual_entropy,
        "nats",
        _POSITIVE,
        "Matrix-based entropy of the state that leaves an iteration, after the norm there",
        "arXiv 2510.06477",
        reads="state_out",
        place="iterations",
    ),
    "state_norm": _value(
        residual.residual_norm,
        "L2 norm",
        _POSITIVE,
        "Mean length of the state that leaves an iteration, after the norm there",
        f"{_PAPER}, Fig. 9",
        reads="state_out",
        place="iterations",
    ),
    # From one iteration to the next.
    "successive_difference": _step(
        dynamics.successive_difference,
        "L2 norm",
        _POSITIVE,
        "Length of a layer's step from one iteration to the next",
        f"{_PAPER}, section 4.1 and Fig. 3",
    ),
    "successive_difference_relative": _step(
        dynamics.successive_difference,
        "1",
        _POSITIVE,
        "Length of a layer's step over the length of its output",
        f"{_PAPER}, Fig. 3, relative as in arXiv 2502.05171",
        relative=True,
        rms=False,
    ),
    "successive_cosine": _step(
        dynamics.successive_cosine,
        "cosine",
        _COSINE,
        "Cosine between a layer's outputs in successive iterations",
        f"{_PAPER}, Fig. 24",
    ),
    "step_angles": _step(
        dynamics.step_angles,
        "radians",
        (0.0, math.pi),
        "Angle between a layer's successive steps",
        "arXiv 2509.23314",
        window=3,
        reduce=reductions.last_step_over_tokens,
    ),
    "acceleration": _step(
        dynamics.acceleration,
        "L2 norm",
        _POSITIVE,
        "Length of the difference between a layer's successive steps",
        "arXiv 2509.23314, Eq. 4",
        window=3,
        reduce=reductions.last_step_over_tokens,
    ),
    "fixed_point_distance": _fixed_point(
        dynamics.fixed_point_distance,
        "L2 norm",
        _POSITIVE,
        "Distance of a layer's output to that of the last iteration",
        "Fig. 4",
    ),
    "fixed_point_distance_relative": _fixed_point(
        dynamics.fixed_point_distance,
        "1",
        _POSITIVE,
        "Distance to the last iteration's output over its length",
        "Fig. 4",
        relative=True,
        rms=False,
    ),
    "fixed_point_cosine": _fixed_point(
        dynamics.fixed_point_cosine,
        "cosine",
        _COSINE,
        "Cosine of a layer's output to that of the last iteration",
        "Fig. 22",
    ),
    **{f"trajectory_{label}": _trajectory(label) for label in TRAJECTORY_LABELS},
    # Exits.
    "exit_probability": _exit(
        exits.exit_distribution,
        "probability",
        _SHARE,
        "Probability of leaving the loop after an iteration",
        "iterations",
    ),
    "expected_exit_iteration": _exit(
        exits.expected_exit_iteration,
        "iterations, from 0",
        _POSITIVE,
        "Mean of the exit distribution",
        "last iteration",
    ),
}
"""Every measurement by name."""
