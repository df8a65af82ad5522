"""When a looped model would stop iterating, under each published exit criterion.

All criteria are evaluated on one recorded trajectory, as in the protocol of arXiv 2607.20519: every
iteration has run, and the question is at which one the rule would have stopped. Iterations count
from 0, so a rule that stops after n passes exits at iteration n - 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.errors import did_you_mean
from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.precision import full_precision
from tl_loops.metrics.readout import kl_divergence


@full_precision
def exit_distribution(
    gate_logits: Float[Tensor, "iteration *batch"],
) -> Float[Tensor, "iteration *batch"]:
    """Probability of leaving at each iteration, from the halting gate of Ouro (arXiv 2510.25741).

    With lambda_t = sigmoid(gate logit), p_t = lambda_t prod_{j<t} (1 - lambda_j), and the last
    iteration takes what remains: its own gate is not read. Computed in float32 also for bfloat16
    gates, where the reference code's running sum rounds to 1 too early.

    Args:
        gate_logits: `[iteration, ...]`, the gate's output before the sigmoid
            (`iter.{t}.hook_exit_gate`).

    Returns:
        `[iteration, ...]`, sums to 1 over iterations; NaN where a gate is NaN. An
        infinite gate is a probability of 0 or 1.

    Raises:
        ValueError: no iteration.
    """
    _require_iterations("gate_logits", gate_logits)
    gate_logits = gate_logits.to(statistic_dtype(gate_logits))
    # 1 - sigmoid(g) = sigmoid(-g), which keeps its precision for large g.
    remaining = torch.sigmoid(-gate_logits[:-1]).cumprod(0)
    before = torch.cat([torch.ones_like(gate_logits[:1]), remaining])
    return torch.cat([torch.sigmoid(gate_logits[:-1]) * before[:-1], before[-1:]])


@full_precision
def expected_exit_iteration(
    gate_logits: Float[Tensor, "iteration *batch"],
) -> Float[Tensor, "*batch"]:
    """Mean of Ouro's exit distribution: sum_t t p_t with t counted from 0.

    Add 1 for the expected number of passes: lambda = 0.5 over four iterations gives 0.875, that is
    1.875 passes.

    Args:
        gate_logits: `[iteration, ...]`, the gate's output before the sigmoid.

    Returns:
        `[...]` in [0, iteration - 1].

    Raises:
        ValueError: no iteration.
    """
    p = exit_distribution(gate_logits)
    return torch.tensordot(torch.arange(p.shape[0], dtype=p.dtype, device=p.device), p, dims=1)


@dataclass(frozen=True)
class ExitCriterion:
    """One published rule for leaving the loop.

    Attributes:
        threshold: default threshold.
        exits_if: how the signal is compared with the threshold.
        inputs: the arguments of `exit_iteration` that it reads.
        signal: from (inputs, checked iterations, reduce) to the compared value `[check, ...]`.
        source: where the rule and its default come from.
        consecutive: number of checks in a row that must pass.
    """

    threshold: float | int
    exits_if: Literal["<", ">="]
    inputs: tuple[str, ...]
    signal: Callable[[dict[str, Tensor], range, bool], Tensor]
    source: str
    consecutive: int = 1


@full_precision
def exit_signal(
    criterion: str,
    *,
    gate_logits: Float[Tensor, "iteration *batch"] | None = None,
    logits: Float[Tensor, "iteration *batch d_vocab"] | None = None,
    states: Float[Tensor, "iteration *batch d_model"] | None = None,
    initial_state: Float[Tensor, "*batch d_model"] | None = None,
    min_steps: int = 0,
    every: int = 1,
    reduce: bool = False,
) -> Float[Tensor, "check *exit"]:
    """The value that an exit criterion compares with its threshold, at each checked iteration.

    Args:
        criterion: a key of `EXIT_CRITERIA`.
        gate_logits: see `exit_iteration`.
        logits: see `exit_iteration`.
        states: see `exit_iteration`.
        initial_state: see `exit_iteration`.
        min_steps: see `exit_iteration`.
        every: see `exit_iteration`.
        reduce: see `exit_iteration`.

    Returns:
        `[check, ...]`; check i is iteration min_steps + i * every. NaN where the value is not
        defined: an acceleration before the second check, a relative or angular change of a zero
        state.

    Raises:
        ValueError: as `exit_iteration`.
    """
    rule = _find(criterion)
    given = {
        "gate_logits": gate_logits,
        "logits": logits,
        "states": states,
        "initial_state": initial_state,
    }
    inputs = {}
    for name in rule.inputs:
        value = given[name]
        if value is None:
            raise ValueError(
                f"exit criterion {criterion!r} reads {' and '.join(rule.inputs)}; {name} is missing"
            )
        if value.isnan().any():
            raise ValueError(f"{name} contains NaN; mask or drop these positions first")
        # Logits are converted one check at a time.
        inputs[name] = value if name == "logits" else value.to(statistic_dtype(value))
    trajectory = inputs[rule.inputs[0]]
    _require_iterations(rule.inputs[0], trajectory)
    if "initial_state" in inputs and inputs["initial_state"].shape != trajectory.shape[1:]:
        raise ValueError(
            f"initial_state has shape {list(inputs['initial_state'].shape)}, expected that of one "
            f"state, {list(trajectory.shape[1:])}"
        )
    n_batch_axes = trajectory.ndim - (1 if rule.inputs == ("gate_logits",) else 2)
    if reduce and n_batch_axes < 1:
        raise ValueError(
            f"reduce=True needs a position axis, but {rule.inputs[0]} has shape "
            f"{list(trajectory.shape)}"
        )
    if min_steps < 0 or every < 1:
        raise ValueError(f"got min_steps={min_steps}, every={every}; expected >= 0 and >= 1")
    return rule.signal(inputs, range(min_steps, trajectory.shape[0], every), reduce)


@full_precision
def exit_iteration(
    criterion: str,
    *,
    gate_logits: Float[Tensor, "iteration *batch"] | None = None,
    logits: Float[Tensor, "iteration *batch d_vocab"] | None = None,
    states: Float[Tensor, "iteration *batch d_model"] | None = None,
    initial_state: Float[Tensor, "*batch d_model"] | None = None,
    threshold: float | int | None = None,
    min_steps: int = 0,
    every: int = 1,
    reduce: bool = False,
) -> Int[Tensor, "*exit"]:
    """The iteration at which an exit criterion stops; the last one where it never does.

    With x the state, p the next-token distribution and ' the previous check, the criteria fire if

    - "ouro" (reads gate_logits): cumulative exit probability >= threshold, default 1.
    - "entropy-diff" (logits): abs(H(p) - H(p')) < threshold, default 1e-3; H' = 100 at first.
    - "latent-diff" (states, initial_state): norm(x - x') / norm(x) < threshold, default 0.03.
    - "kl" (logits): KL(p' || p) < threshold, default 1e-3; p' uniform at first.
    - "minp-kl" (logits): the same, default 1e-5, for p whose ids below a tenth of the top one are
      set to 1 / d_vocab before it is normalised again.
    - "argmax-stability" (logits): top-1 id unchanged in >= threshold checks in a row, default 5.
    - "cosine" (states, initial_state): 1 - cos(x, x') < threshold, default 1e-3.
    - "acceleration" (states, initial_state): norm(D - D') < threshold with D = x - x', at two
      checks in a row, default 1e-3.
    - "normalized-acceleration" (states, initial_state): the same divided by norm(x), default 0.03.

    "ouro": arXiv 2510.25741. From "entropy-diff" to "cosine": the evaluators of Huginn (arXiv
    2502.05171, recpre/raven_modeling_minimal.py), which read the core's output before any further
    norm. "acceleration": arXiv 2509.23314, Algorithm 1; its thresholds range from 1e-5 to 1e-2 and
    depend on the scale of the states. "normalized-acceleration" divides by the state norm, as the
    diffusion-style sampler of recurrent-pretraining does (from there also the default).

    An undefined value (see `exit_signal`) never fires. A state that moves with constant velocity
    has acceleration 0 and is stopped while it still drifts; a state on a circle is never stopped by
    the acceleration.

    Args:
        criterion: a key of `EXIT_CRITERIA`.
        gate_logits: `[iteration, ...]`, the halting gate before its sigmoid.
        logits: `[iteration, ..., d_vocab]`, the readout after each iteration, with the padding of
            the vocabulary (the reference's uniform start is over the padded vocabulary).
        states: `[iteration, ..., d_model]`, the state that leaves each iteration.
        initial_state: `[..., d_model]`, the state before iteration 0.
        threshold: replaces the criterion's default.
        min_steps: first iteration that is checked.
        every: check each `every`-th iteration from there on. Changes are measured between checks,
            not between iterations.
        reduce: one exit per sequence instead of per position, as the reference code decides: the
            last position's gate or logits, the mean over positions of a change of state. The
            position axis is the last of `...`.

    Returns:
        `[...]` (without the position axis if `reduce`), 0-based; arguments that the criterion does
        not read are ignored.

    Raises:
        ValueError: unknown criterion, a missing input, NaN, shapes that do not fit, or a bad
            threshold, `min_steps` or `every`.
    """
    rule = _find(criterion)
    if threshold is None:
        threshold = rule.threshold
    if math.isnan(threshold) or (criterion == "ouro" and not 0 <= threshold <= 1):
        expected = "a probability in [0, 1]" if criterion == "ouro" else "a number"
        raise ValueError(f"threshold={threshold} for {criterion!r}, expected {expected}")
    signal = exit_signal(
        criterion,
        gate_logits=gate_logits,
        logits=logits,
        states=states,
        initial_state=initial_state,
        min_steps=min_steps,
        every=every,
        reduce=reduce,
    )
    trajectory = {"gate_logits": gate_logits, "logits": logits, "states": states}[rule.inputs[0]]
    assert trajectory is not None  # exit_signal has raised otherwise
    last = trajectory.shape[0] - 1
    if signal.shape[0] < rule.consecutive:
        return torch.full(signal.shape[1:], last, device=signal.device)
    passes = signal < threshold if rule.exits_if == "<" else signal >= threshold
    fires = passes.unfold(0, rule.consecutive, 1).all(-1)
    check = fires.to(torch.uint8).argmax(0) + rule.consecutive - 1
    return torch.where(fires.any(0), min_steps + every * check, last)


def _find(criterion: str) -> ExitCriterion:
    if criterion in EXIT_CRITERIA:
        return EXIT_CRITERIA[criterion]
    hint = did_you_mean(criterion.replace("_", "-"), EXIT_CRITERIA, quoted=True)
    raise ValueError(f"unknown exit criterion {criterion!r}; {hint}")


def _require_iterations(name: str, trajectory: Tensor) -> None:
    if trajectory.ndim == 0 or trajectory.shape[0] == 0:
        raise ValueError(
            f"{name} has shape {list(trajectory.shape)}, expected [iteration, ...] with at least "
            "one iteration"
        )


def _checked(trajectory: Tensor, checks: range) -> Tensor:
    return trajectory[checks.start :: checks.step]


def _cumulative_exit_probability(inputs: dict[str, Tensor], checks: range, reduce: bool) -> Tensor:
    cumulative = _checked(exit_distribution(inputs["gate_logits"]).cumsum(0), checks)
    return cumulative[..., -1] if reduce else cumulative


def _checked_logits(inputs: dict[str, Tensor], checks: range, reduce: bool) -> Tensor:
    logits = _checked(inputs["logits"], checks)
    return logits[..., -1, :] if reduce else logits


def _stack(values: list[Tensor], logits: Tensor) -> Tensor:
    if not values:  # no iteration is checked
        return logits.new_zeros(logits.shape[:-1], dtype=statistic_dtype(logits))
    return torch.stack(values)


def _entropy_change(inputs: dict[str, Tensor], checks: range, reduce: bool) -> Tensor:
    entropies = []
    logits = _checked_logits(inputs, checks, reduce)
    for step in logits:
        p = step.to(statistic_dtype(step)).softmax(-1)
        entropies.append(-(p * (p + 1e-10).log()).sum(-1))
    entropy = _stack(entropies, logits)
    before = torch.cat([torch.full_like(entropy[:1], 100.0), entropy[:-1]])
    return (entropy - before).abs()


def _output_kl(inputs: dict[str, Tensor], checks: range, reduce: bool) -> Tensor:
    return _kl_to_previous(_checked_logits(inputs, checks, reduce), lambda logits: logits)


def _min_p_kl(inputs: dict[str, Tensor], checks: range, reduce: bool) -> Tensor:
    def min_p(logits: Tensor) -> Tensor:
        p = logits.to(statistic_dtype(logits)).softmax(-1)
        # log q up to the constant that normalises it.
        return torch.where(p < 0.1 * p.amax(-1, keepdim=True), 1 / p.shape[-1], p).log()

    return _kl_to_previous(_checked_logits(inputs, checks, reduce), min_p)


def _kl_to_previous(logits: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    values = []
    before = None
    for step in logits:
        now = transform(step)
        # Zero logits: the reference starts from the uniform distribution.
        values.append(kl_divergence(torch.zeros_like(now) if before is None else before, now))
        before = now
    return _stack(values, logits)


def _unchanged_argmax_count(inputs: dict[str, Tensor], checks: range, reduce: bool) -> Tensor:
    logits = _checked_logits(inputs, checks, reduce)
    top = logits.argmax(-1)
    count = torch.zeros_like(top, dtype=statistic_dtype(logits))
    for check in range(1, len(checks)):
        count[check] = torch.where(top[check] == top[check - 1], count[check - 1] + 1, 0)
    return count


def _state_path(inputs: dict[str, Tensor], checks: range) -> Tensor:
    return torch.cat([inputs["initial_state"][None], _checked(inputs["states"], checks)])


def _over_positions(values: Tensor, reduce: bool) -> Tensor:
    return values.mean(-1) if reduce else values


def _relative_change(inputs: dict[str, Tensor], checks: range, reduce: bool) -> Tensor:
    path = _state_path(inputs, checks)
    change = path.diff(dim=0).norm(dim=-1) / path[1:].norm(dim=-1)
    return _over_positions(change, reduce)


def _angular_change(inputs: dict[str, Tensor], checks: range, reduce: bool) -> Tensor:
    path = _state_path(inputs, checks)
    norm = path.norm(dim=-1)
    cosine = (path[1:] * path[:-1]).sum(-1) / norm[1:] / norm[:-1]
    return 1 - _over_positions(cosine, reduce)


def _acceleration(inputs: dict[str, Tensor], checks: range, reduce: bool) -> Tensor:
    path = _state_path(inputs, checks)
    a = path.diff(n=2, dim=0).norm(dim=-1)
    return _over_positions(_undefined_at_first(a, path), reduce)


def _acceleration_by_state_norm(inputs: dict[str, Tensor], checks: range, reduce: bool) -> Tensor:
    path = _state_path(inputs, checks)
    a = path.diff(n=2, dim=0).norm(dim=-1) / path[2:].norm(dim=-1)
    return _over_positions(_undefined_at_first(a, path), reduce)


def _undefined_at_first(acceleration: Tensor, path: Tensor) -> Tensor:
    first = path[1:2].new_full(path[1:2].shape[:-1], math.nan)
    return torch.cat([first, acceleration])


_HUGINN = "arXiv 2502.05171, recpre/raven_modeling_minimal.py"
_STATES = ("states", "initial_state")

EXIT_CRITERIA: dict[str, ExitCriterion] = {
    "ouro": ExitCriterion(
        1.0, ">=", ("gate_logits",), _cumulative_exit_probability, "arXiv 2510.25741"
    ),
    "entropy-diff": ExitCriterion(1e-3, "<", ("logits",), _entropy_change, _HUGINN),
    "latent-diff": ExitCriterion(0.03, "<", _STATES, _relative_change, _HUGINN),
    "kl": ExitCriterion(1e-3, "<", ("logits",), _output_kl, _HUGINN),
    "minp-kl": ExitCriterion(1e-5, "<", ("logits",), _min_p_kl, _HUGINN),
    "argmax-stability": ExitCriterion(5, ">=", ("logits",), _unchanged_argmax_count, _HUGINN),
    "cosine": ExitCriterion(1e-3, "<", _STATES, _angular_change, _HUGINN),
    "acceleration": ExitCriterion(
        1e-3, "<", _STATES, _acceleration, "arXiv 2509.23314, Algorithm 1", consecutive=2
    ),
    "normalized-acceleration": ExitCriterion(
        0.03,
        "<",
        _STATES,
        _acceleration_by_state_norm,
        "arXiv 2509.23314, Algorithm 1, with the normalisation of arXiv 2510.14961's code",
        consecutive=2,
    ),
}
