"""The path of the states as a whole: its steps split by direction, how straight it is, its return.

`states` is `[iteration, ..., pos, d_model]` of ONE trajectory; `[iteration, d_model]` is one token.
Everything is per token, unless a function says that it averages over tokens.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.precision import full_precision
from tl_loops.metrics.residual import unit_vectors
from tl_loops.metrics.states import direction_cosine, measured_states
from tl_loops.printing import prints_short

MOST_LAGS = 16
"""Lags that a recurrence curve has at most, unless another number is asked for."""


@prints_short
@dataclass(frozen=True, eq=False)
class StepComponents:
    """Each step D = x_{t+1} - x_t, along the state x_t and across it.

    Attributes:
        radial: rho = D . x_t / ||x_t||, `[step, ...]`; positive: the state grows.
        tangential: tau = ||D - rho x_t / ||x_t|| ||, `[step, ...]`, >= 0: how far it turns.
        norm_ratio: ||x_{t+1}|| / ||x_t||, `[step, ...]`.
    """

    radial: Float[Tensor, "step ..."]
    tangential: Float[Tensor, "step ..."]
    norm_ratio: Float[Tensor, "step ..."]


@full_precision
def step_components(states: Float[Tensor, "iteration *tokens d_model"]) -> StepComponents:
    """Radial and tangential part of each step, and the growth of the state.

    A readout that begins with a norm does not see the radial part, so a state can grow without end
    while its readout has settled (arXiv 2606.24898). rho^2 + tau^2 = ||D||^2. The ratio of norms is
    ours.

    Args:
        states: `[iteration, ..., d_model]`.

    Returns:
        `StepComponents` with tensors `[iteration-1, ...]`; empty for one state, NaN after a zero
        state.
    """
    x = measured_states(states)
    direction, steps = unit_vectors(x[:-1]), x.diff(dim=0)
    radial = (steps * direction).sum(-1)
    tangential = (steps - radial.unsqueeze(-1) * direction).norm(dim=-1)
    length = x.norm(dim=-1)
    return StepComponents(radial, tangential, length[1:] / length[:-1])


@full_precision
def path_efficiency(
    states: Float[Tensor, "iteration *tokens d_model"],
) -> Float[Tensor, "*tokens"]:
    """Length of the straight line over the length of the path, ||x_T - x_0|| / sum ||D^k||.

    Args:
        states: `[iteration, ..., d_model]`.

    Returns:
        `[...]` in [0, 1]: 1 for motion along a line, 0 for a path that ends where it began; NaN
        where nothing moves.
    """
    x = measured_states(states)
    return efficiency((x[-1] - x[0]).norm(dim=-1), x.diff(dim=0).norm(dim=-1))


def efficiency(
    distance: Float[Tensor, "*tokens"], steps: Float[Tensor, "step *tokens"]
) -> Float[Tensor, "*tokens"]:
    """Path efficiency from the distance between the ends and the lengths of the steps."""
    # Rounding of the sum must not give more than a straight line.
    return (distance / steps.sum(0)).clamp(max=1.0)


@full_precision
def directional_persistence(
    states: Float[Tensor, "iteration *tokens d_model"],
) -> Float[Tensor, "*tokens"]:
    """Mean cosine between successive steps: whether the state keeps its direction (ours).

    Args:
        states: `[iteration, ..., d_model]`.

    Returns:
        `[...]` in [-1, 1]: 1 straight, cos(theta) for a rotation or spiral by theta, -1 bouncing
        back and forth. Steps of length 0 are left out; NaN with fewer than two others in a row.
    """
    steps = measured_states(states).diff(dim=0)
    cosine, counted = turn(steps[:-1], steps[1:])
    return cosine.sum(0) / counted.sum(0)


def turn(
    before: Float[Tensor, "*batch d_model"], after: Float[Tensor, "*batch d_model"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Cosine between two steps, and whether it counts (1): not where one has no length (0).

    Returns:
        The cosine, 0 where it does not count and NaN where a step is not finite; and the weight.
    """
    counted = (before != 0).any(-1) & (after != 0).any(-1)
    cosine = torch.where(counted, direction_cosine(after, before), 0.0)
    return cosine, counted.to(cosine.dtype)


def n_lags(n_iterations: int, max_lag: int | None) -> int:
    """Lags of a recurrence curve: up to half the trajectory, so that each has many pairs.

    Raises:
        ValueError: If `max_lag` is below 1.
    """
    most = MOST_LAGS if max_lag is None else max_lag
    if most < 1:
        raise ValueError(f"max_lag={max_lag}; expected at least 1")
    return min(most, n_iterations // 2)


@full_precision
def recurrence_curve(
    states: Float[Tensor, "iteration *tokens d_model"], max_lag: int | None = None
) -> Float[Tensor, "lag *tokens"]:
    """Mean distance of a state to the one some iterations before, against that lag.

    c(l) = mean over t of ||x_t - x_{t-l}||, for l = 1, 2, ...; at most half of the iterations. Of
    an orbit it falls again where the state comes back, of a fixed point or a drift it does not.

    Args:
        states: `[iteration, ..., d_model]`.
        max_lag: the largest lag; None: 16.

    Returns:
        `[lag, ...]`, lag 1 first; empty for one state.

    Raises:
        ValueError: If `max_lag` is below 1.
    """
    x = measured_states(states)
    lags = range(1, n_lags(x.shape[0], max_lag) + 1)
    if not lags:
        return x.new_empty(0, *x.shape[1:-1])
    return torch.stack([(x[lag:] - x[:-lag]).norm(dim=-1).mean(0) for lag in lags])


@full_precision
def recurrence_lag(
    curve: Float[Tensor, "lag *tokens"], min_depth: float | int = 0.1
) -> Float[Tensor, "*tokens"]:
    """The lag after which a trajectory comes back: the first interior local minimum of its curve.

    A minimum at lag l counts where the curve has fallen there by a share `min_depth` of what it
    reached before: c(l) <= (1 - min_depth) max_{j<l} c(j), with c(l-1) > c(l) <= c(l+1). It needs
    no end state, so that it tells an orbit from a slow approach (the criterion is ours).

    Args:
        curve: `[lag, ...]` from `recurrence_curve`, lag 1 first.
        min_depth: in (0, 1].

    Returns:
        `[...]`, a lag of at least 2; NaN where there is none, or too few lags.

    Raises:
        ValueError: If `min_depth` is out of range.
    """
    if not 0 < min_depth <= 1:
        raise ValueError(f"min_depth={min_depth}; expected 0 < min_depth <= 1")
    c = curve.to(statistic_dtype(curve))
    nothing = c.new_full(c.shape[1:], math.nan)
    if c.shape[0] < 3:
        return nothing
    before = c.cummax(0).values[:-2]
    left, middle, right = c[:-2], c[1:-1], c[2:]
    found = (left > middle) & (middle <= right) & (middle <= (1 - min_depth) * before)
    first = found.to(torch.uint8).argmax(0).to(c.dtype) + 2
    return torch.where(found.any(0), first, nothing)
