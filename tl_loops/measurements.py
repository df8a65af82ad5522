"""The registry of measurements: what each reads, how it is reduced, where it has a value.

A measurement turns one activation of a batch into one number a prompt. Each is a pure function of
:mod:`tl_loops.metrics` with heads or tokens averaged within the prompt, as arXiv 2604.11791 does
(section 4.1); averages over prompts come later.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.layout import LoopLayout
from tl_loops.metrics import attention, dynamics, exits, massive, pairwise, residual
from tl_loops.metrics.states import direction_cosine
from tl_loops.metrics.trajectories import TRAJECTORY_LABELS, classify_trajectory

Activation = Literal["pattern", "resid_post", "state_out", "exit_gate"]
Needs = Literal["value", "previous", "last", "series"]
Place = Literal["blocks", "calls", "last calls", "iterations", "last iteration"]


@dataclass(frozen=True)
class Measurement:
    """One entry of the registry.

    A *call* of a core layer is one of its passes: block i at iteration t is call t of its layer.

    Attributes:
        function: Gives ``[batch]`` from what ``needs`` says, and the options by keyword.
        reads: ``"pattern"`` [batch, head, dest, src] and ``"resid_post"`` [batch, pos, d_model] of
            blocks; ``"state_out"`` [batch, pos, d_model] and ``"exit_gate"`` [batch, pos, 1] of
            iterations.
        needs: ``"value"``: the activation. ``"previous"``: also that of the same layer in the
            ``window - 1`` calls before, oldest first. ``"last"``: also that of the layer's last
            call. ``"series"``: what ``per_token`` made of all calls, [iteration, batch, pos].
        place: Which blocks get a value: all (``"blocks"``); those of the core that have what is
            needed (``"calls"``); the last call of each core layer (``"last calls"``); the last
            layer of each iteration (``"iterations"``) or of the last one (``"last iteration"``). A
            series that is placed at iterations gives [iteration, batch].
        unit: Of the value.
        bounds: Smallest and largest possible value.
        summary: What it says, in one line.
        source: Where it is defined.
        options: Names and defaults of the options.
        window: Calls that ``"previous"`` spans, this one included.
        per_token: For series: one number a token, [batch, pos], from an activation and (with
            ``against_last``) the activation of the layer's last call.
        against_last: Whether a second pass is needed, behind one that keeps the last calls.
        causal: Defined for causal attention only.
    """

    function: Callable[..., Float[Tensor, "*iteration batch"]]
    reads: Activation
    needs: Needs
    place: Place
    unit: str
    bounds: tuple[float, float]
    summary: str
    source: str
    options: Mapping[str, Any]
    window: int = 1
    per_token: Callable[..., Float[Tensor, "batch pos"]] | None = None
    against_last: bool = False
    causal: bool = False

    def blocks(self, layout: LoopLayout | None, n_layers: int) -> tuple[int, ...]:
        """The unrolled blocks that get a value; empty where the model cannot give any.

        Args:
            layout: ``None`` for a feedforward model.
            n_layers: Unrolled depth.
        """
        if self.place == "blocks":
            return tuple(range(n_layers))
        if layout is None:
            return ()
        if self.place == "iterations":
            return tuple(layout.index(iteration=t, layer=-1) for t in range(layout.n_iterations))
        if self.place == "last iteration":
            return (layout.index(iteration=-1, layer=-1),)
        calls = core_calls(layout).values()
        if self.place == "last calls":
            return tuple(sorted(blocks[-1] for blocks in calls if len(blocks) > 1))
        if self.needs == "last":  # The distance of the last call to itself says nothing.
            return tuple(sorted(block for blocks in calls for block in blocks[:-1]))
        return tuple(sorted(b for blocks in calls for b in blocks[self.window - 1 :]))


def core_calls(layout: LoopLayout) -> dict[str, list[int]]:
    """For each physical layer of the core the unrolled blocks that call it, in order."""
    calls: dict[str, list[int]] = {}
    for block in range(layout.core_start, layout.coda_start):
        calls.setdefault(layout.physical_name(block), []).append(block)
    return calls


def find_measurement(name: str) -> Measurement:
    """The registry's entry.

    Raises:
        ValueError: There is none; near matches are suggested.
    """
    if name in MEASUREMENTS:
        return MEASUREMENTS[name]
    near = difflib.get_close_matches(name, MEASUREMENTS, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"known: {_known()}"
    raise ValueError(f"unknown metric {name!r}: {hint}")


def why_not(name: str, cfg: Any, layout: LoopLayout | None, n_layers: int) -> str | None:
    """Why a model cannot give a measurement, in one clause; ``None`` if it can."""
    measurement = find_measurement(name)
    if measurement.place != "blocks" and layout is None:
        return "it compares iterations, but this model has no loop"
    if measurement.reads == "exit_gate" and not cfg.exit_gate:
        return "it reads the halting gate, but this model has none (cfg.exit_gate is False)"
    if measurement.causal and cfg.attention_dir != "causal":
        return "it counts visible keys, but this model's attention is not causal"
    if not measurement.blocks(layout, n_layers):
        needed = max(2, measurement.window)
        return f"it needs at least {needed} iterations, but there are {_iterations(layout)}"
    return None


def resolve_options(
    name: str, given: Mapping[str, Any], n_tokens: int, d_model: int
) -> dict[str, Any]:
    """All options of a measurement, defaults included, tried on a small example.

    Args:
        name: Of the measurement.
        given: Options that differ from the defaults.
        n_tokens: Length of the shortest prompt, which must be able to carry the options.
        d_model: Width of the model.

    Raises:
        ValueError: An option is unknown (near matches are suggested) or its value is refused.
    """
    measurement = find_measurement(name)
    for option in given:
        if option not in measurement.options:
            near = difflib.get_close_matches(option, measurement.options, n=3)
            known = ", ".join(measurement.options) or "none"
            hint = f"did you mean {', '.join(near)}?" if near else f"its options: {known}"
            raise ValueError(f"metric {name!r} has no option {option!r}: {hint}")
    options = {**measurement.options, **given}
    if not given:
        return options
    try:
        result = measurement.function(*_example(measurement, n_tokens, d_model), **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"options of metric {name!r}: {error}") from error
    expected = [2, 1] if measurement.place == "iterations" and measurement.needs == "series" else [1]
    if list(result.shape) != expected:
        raise ValueError(
            f"options of metric {name!r}: {dict(given)} do not leave one number a prompt"
        )
    return options


def _example(measurement: Measurement, n_tokens: int, d_model: int) -> list[Tensor]:
    """Arguments for one prompt: uniform attention, or states that turn and grow."""
    if measurement.needs == "series":
        return [torch.tensor([0.5, 1.0]).reshape(2, 1, 1).expand(2, 1, n_tokens)]
    if measurement.reads == "pattern":
        seen = torch.ones(1, 1, n_tokens, n_tokens).tril()
        one = seen / seen.sum(-1, keepdim=True)
    else:
        phase = torch.arange(n_tokens).unsqueeze(-1) + torch.arange(d_model)
        one = 1.0 + phase.float().sin().unsqueeze(0)
    copies = {"previous": measurement.window, "last": 2}.get(measurement.needs, 1)
    return [one.roll(shift, -1) if measurement.reads != "pattern" else one for shift in range(copies)]


def _iterations(layout: LoopLayout | None) -> int:
    return 0 if layout is None else layout.n_iterations


def _known() -> str:
    return ", ".join(MEASUREMENTS)


def _options(function: Callable, fixed: Sequence[str] = ()) -> dict[str, Any]:
    """Names and defaults of a metric's own parameters: not its tensors, nor what is set here."""
    hidden = {"mask", "validate", "reference", "heads_agg", *fixed}
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty and name not in hidden
    }


# Attention.


def _per_head(function: Callable, pattern: Tensor, **options: Any) -> Tensor:
    return function(pattern, validate=False, **options).mean(-1)


def _sink_rate(pattern: Tensor, **options: Any) -> Tensor:
    return attention.sink_rate(pattern, validate=False, **options)


def _attention(
    function: Callable,
    unit: str,
    bounds: tuple[float, float],
    summary: str,
    source: str,
    reduce: Callable | None = None,
    causal: bool = False,
    **fixed: Any,
) -> Measurement:
    return Measurement(
        partial(_per_head, function, **fixed) if reduce is None else reduce,
        "pattern",
        "value",
        "blocks",
        unit,
        bounds,
        summary,
        source,
        _options(function, tuple(fixed)),
        causal=causal,
    )


def _pattern_distance(a: Tensor, b: Tensor, **options: Any) -> Tensor:
    return pairwise.pattern_distance(b, a, validate=False, **options)


# Residual stream.


def _residual(
    function: Callable,
    unit: str,
    bounds: tuple[float, float],
    summary: str,
    source: str,
    reads: Activation = "resid_post",
    reduce: Callable | None = None,
    **fixed: Any,
) -> Measurement:
    return Measurement(
        partial(function, **fixed) if reduce is None else reduce,
        reads,
        "value",
        "iterations" if reads == "state_out" else "blocks",
        unit,
        bounds,
        summary,
        source,
        _options(function, tuple(fixed)),
    )


def _massive_count(resid: Tensor, **options: Any) -> Tensor:
    return massive.massive_activations(resid, **options).count.float()


# From one iteration to the next.


def _over_steps(function: Callable, *states: Tensor, **options: Any) -> Tensor:
    """The only step of a short trajectory; tokens are averaged where the function keeps them."""
    step = function(torch.stack(states), **options)[-1]
    return step.mean(-1) if function in (dynamics.step_angles, dynamics.acceleration) else step


def _to_last(function: Callable, state: Tensor, last: Tensor, **options: Any) -> Tensor:
    return function(state.unsqueeze(0), reference=last, **options)[0]


def _steps(
    function: Callable,
    unit: str,
    bounds: tuple[float, float],
    summary: str,
    source: str,
    window: int = 2,
    **fixed: Any,
) -> Measurement:
    return Measurement(
        partial(_over_steps, function, **fixed),
        "resid_post",
        "previous",
        "calls",
        unit,
        bounds,
        summary,
        source,
        _options(function, tuple(fixed)),
        window=window,
    )


def _fixed_point(
    function: Callable,
    unit: str,
    bounds: tuple[float, float],
    summary: str,
    source: str,
    **fixed: Any,
) -> Measurement:
    return Measurement(
        partial(_to_last, function, **fixed),
        "resid_post",
        "last",
        "calls",
        unit,
        bounds,
        summary,
        source,
        _options(function, tuple(fixed)),
        against_last=True,
    )


def _label_fraction(label: str, similarity: Tensor, **options: Any) -> Tensor:
    """Share of a prompt's tokens with one label, from s_t = cos(x_t, x_last).

    The labels depend on s_t alone, so a path in the plane with the same s_t stands for the states,
    which need not be kept.
    """
    s = similarity.double().clamp(-1.0, 1.0)
    s = torch.cat([s[:-1], torch.where(s[-1:].isnan(), s[-1:], 1.0)])  # s_last = 1 by definition
    path = torch.stack([s, (1.0 - s.square()).sqrt()], dim=-1)
    has_label = torch.from_numpy(classify_trajectory(path, **options).labels == label)
    return has_label.to(torch.float32).mean(-1)


def _trajectory(label: str) -> Measurement:
    return Measurement(
        partial(_label_fraction, label),
        "resid_post",
        "series",
        "last calls",
        "fraction of tokens",
        (0.0, 1.0),
        f"Tokens whose path to the last iteration is labelled {label}",
        "arXiv 2604.11791, App. C, Algorithm 1 (reconstructed)",
        _options(classify_trajectory),
        per_token=direction_cosine,
        against_last=True,
    )


# Exits.


def _gate(gate: Tensor) -> Tensor:
    return gate.squeeze(-1)


def _over_tokens(function: Callable, gates: Tensor) -> Tensor:
    return function(gates).mean(-1)


def _exit(
    function: Callable, place: Place, unit: str, bounds: tuple[float, float], summary: str
) -> Measurement:
    return Measurement(
        partial(_over_tokens, function),
        "exit_gate",
        "series",
        place,
        unit,
        bounds,
        summary,
        "arXiv 2510.25741",
        {},
        per_token=_gate,
    )


_INF = float("inf")
_MA = "arXiv 2604.11791"

MEASUREMENTS: dict[str, Measurement] = {
    "sink_rate": _attention(
        attention.sink_rate,
        "fraction of heads",
        (0.0, 1.0),
        "Heads whose mean attention to the first token reaches the threshold",
        f"{_MA}, Eq. 17",
        reduce=_sink_rate,
    ),
    "sink_score": _attention(
        attention.sink_score,
        "probability",
        (0.0, 1.0),
        "Mean attention that the first token receives",
        f"{_MA}, Eq. 16",
    ),
    "mixing_score": _attention(
        attention.mixing_score, "nats", (0.0, _INF), "Mean entropy of rows", f"{_MA}, Eq. 18"
    ),
    "mixing_score_log": _attention(
        attention.mixing_score,
        "1",
        (0.0, 1.0),
        "Mean entropy of rows over log T",
        f"{_MA}, Eq. 18, normalised as arXiv 2510.06477",
        normalize="log",
    ),
    "mixing_score_length": _attention(
        attention.mixing_score,
        "nats / token",
        (0.0, _INF),
        "Mean entropy of rows over T: the axis of the paper's figures (inferred)",
        f"{_MA}, Eq. 18",
        normalize="length",
    ),
    "mixing_score_row": _attention(
        attention.mixing_score,
        "1",
        (0.0, 1.0),
        "Mean over rows of entropy over that of uniform attention",
        f"{_MA}, Eq. 18, normalised per row",
        causal=True,
        normalize="row",
    ),
    "colsum_concentration": _attention(
        attention.colsum_concentration,
        "1",
        (0.0, 1.0),
        "How much the attention of all queries gathers on few keys",
        f"{_MA}, section 2.2",
    ),
    "sink_identity_index": _attention(
        attention.sink_identity_index,
        "1",
        (-1.0, 1.0),
        "1 for sinks on the first token, -1 for attention to oneself",
        "defined here, after arXiv 2510.06477",
    ),
    "diagonal_score": _attention(
        attention.diagonal_score,
        "probability",
        (0.0, 1.0),
        "Mean attention of a token to itself",
        "defined here, after arXiv 2510.06477",
    ),
    "previous_token_score": _attention(
        attention.previous_token_score,
        "probability",
        (0.0, 1.0),
        "Mean attention of a token to the one before it",
        "defined here, after arXiv 2510.06477",
    ),
    "attention_successive_difference": Measurement(
        _pattern_distance,
        "pattern",
        "previous",
        "calls",
        "Frobenius norm",
        (0.0, _INF),
        "Distance between a layer's patterns in successive iterations",
        f"{_MA}, section 4.1 and Fig. 25",
        _options(pairwise.pattern_distance),
        window=2,
    ),
    "attention_fixed_point_distance": Measurement(
        _pattern_distance,
        "pattern",
        "last",
        "calls",
        "Frobenius norm",
        (0.0, _INF),
        "Distance of a layer's pattern to that of the last iteration",
        f"{_MA}, App. D.2 and Fig. 23",
        _options(pairwise.pattern_distance),
        against_last=True,
    ),
    "residual_entropy": _residual(
        residual.residual_entropy,
        "nats",
        (0.0, _INF),
        "Matrix-based entropy of the tokens' residual stream",
        "arXiv 2510.06477",
    ),
    "residual_entropy_log_T": _residual(
        residual.residual_entropy,
        "1",
        (0.0, 1.0),
        "Matrix-based entropy over log T",
        "arXiv 2510.06477",
        normalize="log_T",
    ),
    "effective_rank": _residual(
        residual.effective_rank,
        "directions",
        (1.0, _INF),
        "Exponential of the residual entropy",
        "arXiv 2510.06477",
    ),
    "participation_ratio": _residual(
        residual.participation_ratio,
        "directions",
        (1.0, _INF),
        "Exponential of the residual entropy of order 2",
        "arXiv 2502.02013",
    ),
    "residual_norm": _residual(
        residual.residual_norm,
        "L2 norm",
        (0.0, _INF),
        "Mean length of the residual stream",
        f"{_MA}, Fig. 9",
    ),
    "bos_norm_ratio": _residual(
        massive.bos_norm_ratio,
        "1",
        (0.0, _INF),
        "Length of the first token over the mean length of the others",
        "arXiv 2510.06477",
    ),
    "massive_activations": _residual(
        massive.massive_activations,
        "count",
        (0.0, _INF),
        "Number of massive activations",
        "arXiv 2402.17762, section 2",
        reduce=_massive_count,
    ),
    "state_entropy": _residual(
        residual.residual_entropy,
        "nats",
        (0.0, _INF),
        "Matrix-based entropy of the state that leaves an iteration, behind the norm there",
        "arXiv 2510.06477",
        reads="state_out",
    ),
    "state_norm": _residual(
        residual.residual_norm,
        "L2 norm",
        (0.0, _INF),
        "Mean length of the state that leaves an iteration, behind the norm there",
        f"{_MA}, Fig. 9",
        reads="state_out",
    ),
    "successive_difference": _steps(
        dynamics.successive_difference,
        "L2 norm",
        (0.0, _INF),
        "Length of a layer's step from one iteration to the next",
        f"{_MA}, section 4.1 and Fig. 3",
    ),
    "successive_difference_relative": _steps(
        dynamics.successive_difference,
        "1",
        (0.0, _INF),
        "Length of the step over the length of the state",
        f"{_MA}, Fig. 3, relative as in arXiv 2502.05171",
        relative=True,
        rms=False,
    ),
    "successive_cosine": _steps(
        dynamics.successive_cosine,
        "cosine",
        (-1.0, 1.0),
        "Cosine between a layer's output in successive iterations",
        f"{_MA}, Fig. 24",
    ),
    "step_angles": _steps(
        dynamics.step_angles,
        "radians",
        (0.0, 3.1415927410125732),  # pi in float32
        "Angle between a layer's successive steps",
        "arXiv 2509.23314",
        window=3,
    ),
    "acceleration": _steps(
        dynamics.acceleration,
        "L2 norm",
        (0.0, _INF),
        "Length of the change of a layer's step",
        "arXiv 2509.23314, Eq. 4",
        window=3,
    ),
    "fixed_point_distance": _fixed_point(
        dynamics.fixed_point_distance,
        "L2 norm",
        (0.0, _INF),
        "Distance of a layer's output to that of the last iteration",
        f"{_MA}, section 4.1 and Fig. 4",
    ),
    "fixed_point_distance_relative": _fixed_point(
        dynamics.fixed_point_distance,
        "1",
        (0.0, _INF),
        "The same over the length of the last iteration's output",
        f"{_MA}, Fig. 4",
        relative=True,
        rms=False,
    ),
    "fixed_point_cosine": _fixed_point(
        dynamics.fixed_point_cosine,
        "cosine",
        (-1.0, 1.0),
        "Cosine of a layer's output to that of the last iteration",
        f"{_MA}, Fig. 22",
    ),
    **{f"trajectory_{label}": _trajectory(label) for label in TRAJECTORY_LABELS},
    "exit_probability": _exit(
        exits.exit_distribution,
        "iterations",
        "probability",
        (0.0, 1.0),
        "Probability of leaving the loop behind an iteration",
    ),
    "expected_exit_iteration": _exit(
        exits.expected_exit_iteration,
        "last iteration",
        "iterations, from 0",
        (0.0, _INF),
        "Mean of the exit distribution",
    ),
}
"""Every measurement by name."""

DEFAULT_METRICS = (
    "sink_rate",
    "mixing_score",
    "colsum_concentration",
    "residual_entropy",
    "residual_norm",
)
"""What arXiv 2604.11791 compares between looped and feedforward models."""
