"""How the state moves from one iteration to the next: steps, distances, angles, accelerations.

`states` is `[iteration, ..., pos, d_model]`: the residual stream at one place of the loop, once
per iteration of ONE trajectory. `[iteration, d_model]` is read as a single token. Cosines of zero
vectors are NaN, never 0, because a direction is missing and not orthogonal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.precision import full_precision
from tl_loops.metrics.residual import unit_vectors
from tl_loops.metrics.states import direction_cosine, measured_states, pool_tokens
from tl_loops.printing import prints_short

Aggregation = Literal["token_mean", "fro", "none"]


@full_precision
def successive_difference(
    states: Float[Tensor, "iteration *tokens d_model"],
    agg: Aggregation = "token_mean",
    relative: bool = False,
    rms: bool = False,
    mask: Bool[Tensor, "*#batch pos"] | None = None,
) -> Float[Tensor, "step ..."]:
    """Length of each step, ||X_t - X_{t-1}||, for t = 1 .. iteration-1.

    arXiv 2604.11791 plots this per layer (section 4.1, Fig. 3) and does not say how tokens are
    pooled. In bfloat16 the relative step cannot fall below about 4e-3: measure convergence in
    float32.

    Args:
        states: `[iteration, *batch, pos, d_model]`, or `[iteration, d_model]` for one token.
        agg: `"token_mean"`: L2 norm per token, then the mean over tokens. `"fro"`: Frobenius norm
            of the `[pos, d_model]` matrix. `"none"`: L2 norm per token.
        relative: divide by the norm of the later state, ||X_t|| (the latent difference of Huginn).
        rms: divide by sqrt(d_model), which makes models of different width comparable.
        mask: True at real tokens, one run per row; broadcasts over the batch axes; not with
            `agg="none"`.

    Returns:
        `[iteration-1, *batch]` (`[iteration-1, *batch, pos]` for `"none"`); an empty first axis
        for one state. With `relative`, a zero state gives inf, or NaN when the step is zero as
        well.

    Raises:
        ValueError: If both `relative` and `rms` are set, or `mask` does not fit.
    """
    x = measured_states(states)
    return _pooled_distance(x[1:], x[:-1], x[1:], agg, relative, rms, mask)


@full_precision
def successive_cosine(
    states: Float[Tensor, "iteration *tokens d_model"],
    agg: Literal["token_mean", "none"] = "token_mean",
    mask: Bool[Tensor, "*#batch pos"] | None = None,
) -> Float[Tensor, "step ..."]:
    """Cosine between consecutive states, cos(X_t, X_{t-1}), averaged over tokens.

    The cosine version of `successive_difference` (arXiv 2604.11791, Fig. 24). It does not see
    radial motion.

    Args:
        states: `[iteration, *batch, pos, d_model]`, or `[iteration, d_model]` for one token.
        agg: `"token_mean"`, or `"none"` to keep the tokens.
        mask: True at real tokens, one run per row; broadcasts over the batch axes; not with
            `agg="none"`.

    Returns:
        `[iteration-1, *batch]` in [-1, 1]; NaN where a counted token is zero in either state.
    """
    x = measured_states(states)
    return _mean_cosine(x[1:], x[:-1], agg, mask)


@full_precision
def fixed_point_distance(
    states: Float[Tensor, "iteration *tokens d_model"],
    reference: int | Float[Tensor, "*tokens d_model"] = -1,
    agg: Aggregation = "token_mean",
    relative: bool = False,
    rms: bool = False,
    mask: Bool[Tensor, "*#batch pos"] | None = None,
) -> Float[Tensor, "iteration ..."]:
    """Distance of every state to an approximate fixed point, ||X_t - X*||.

    arXiv 2604.11791 (section 4.1, Fig. 4) takes the state after 128 iterations as X*. The distance
    at the reference itself is 0 by construction: leave that point out of a plot. Everything near
    the reference looks convergent, a slow drift included, so check against a later reference (pass
    the tensor) or read the rate from `fixed_point_slope`, which uses a window far from it.

    Args:
        states: `[iteration, *batch, pos, d_model]`, or `[iteration, d_model]` for one token.
        reference: which of the states is X*, or X* itself, `[*batch, pos, d_model]`.
        agg: as in `successive_difference`.
        relative: divide by the norm of the reference, ||X*||, one constant for the whole curve.
        rms: divide by sqrt(d_model).
        mask: True at real tokens, one run per row; broadcasts over the batch axes; not with
            `agg="none"`.

    Returns:
        `[iteration, *batch]` (`[iteration, *batch, pos]` for `"none"`).

    Raises:
        ValueError: If both `relative` and `rms` are set, `mask` does not fit, or `reference` is no
            iteration.
    """
    x = measured_states(states)
    fixed_point = _reference_state(x, reference)
    return _pooled_distance(x, fixed_point, fixed_point.expand_as(x), agg, relative, rms, mask)


@full_precision
def fixed_point_cosine(
    states: Float[Tensor, "iteration *tokens d_model"],
    reference: int | Float[Tensor, "*tokens d_model"] = -1,
    agg: Literal["token_mean", "none"] = "token_mean",
    mask: Bool[Tensor, "*#batch pos"] | None = None,
) -> Float[Tensor, "iteration ..."]:
    """Cosine of every state to an approximate fixed point, cos(X_t, X*).

    The cosine version of `fixed_point_distance` (arXiv 2604.11791, Fig. 22); 1 at the reference by
    construction.

    Args:
        states: `[iteration, *batch, pos, d_model]`, or `[iteration, d_model]` for one token.
        reference: which of the states is X*, or X* itself, `[*batch, pos, d_model]`.
        agg: `"token_mean"`, or `"none"` to keep the tokens.
        mask: True at real tokens, one run per row; broadcasts over the batch axes; not with
            `agg="none"`.

    Returns:
        `[iteration, *batch]` in [-1, 1]; NaN where a counted token is zero.

    Raises:
        ValueError: If `reference` is no iteration.
    """
    x = measured_states(states)
    return _mean_cosine(x, _reference_state(x, reference), agg, mask)


@full_precision
def fixed_point_slope(
    distance: Float[Tensor, "iteration *batch"], window: tuple[int, int] = (32, 96)
) -> Float[Tensor, "*batch"]:
    """Least-squares slope of log(distance) over a window of iterations: the log contraction rate.

    A geometric approach X* + rho^t V gives exactly log(rho); a slope near 0 is a drift that has
    not converged, whatever the last distances look like.

    Args:
        distance: `[iteration, ...]`, for instance from `fixed_point_distance`.
        window: first and last iteration of the fit, both included.

    Returns:
        `[...]`, per iteration, natural log. NaN where a distance inside the window is 0.

    Raises:
        ValueError: If the window does not lie inside the iterations or has fewer than two points.
    """
    first, last = window
    n_iterations = distance.shape[0]
    if not 0 <= first < last < n_iterations:
        raise ValueError(
            f"window {window} needs 0 <= first < last < {n_iterations}, the number of iterations "
            "given; pass a window that lies inside the trajectory"
        )
    log_distance = distance[first : last + 1].to(statistic_dtype(distance)).log()
    t = torch.arange(last - first + 1, dtype=log_distance.dtype, device=log_distance.device)
    t = (t - t.mean()).reshape(-1, *[1] * (log_distance.ndim - 1))
    log_distance = torch.where(log_distance.isinf(), torch.nan, log_distance)
    return (t * log_distance).sum(0) / t.square().sum()


@full_precision
def degenerate_fixed_point(
    fixed_points: Float[Tensor, "layer *tokens d_model"],
) -> Float[Tensor, "*tokens"]:
    """Lowest cosine between the fixed point of the first layer and that of any other layer.

    min_{l != 0} cos(X*_0, X*_l). Near 1 the fixed point is degenerate: every layer leaves the
    state where it is. Clearly below 1 it is cyclic: the layers carry the state around a cycle that
    closes once per iteration (arXiv 2604.11791, section 4.2 and Fig. 6).

    Args:
        fixed_points: `[layer, ..., d_model]`, the converged output of each layer of the core.

    Returns:
        `[...]` in [-1, 1]; NaN with a single layer, or where a fixed point is zero.
    """
    x = measured_states(fixed_points)
    if x.shape[0] < 2:
        return x.new_full(x.shape[1:-1], torch.nan)
    return direction_cosine(x[1:], x[:1]).amin(0)


@full_precision
def step_angles(
    states: Float[Tensor, "iteration *tokens d_model"],
) -> Float[Tensor, "step *tokens"]:
    """Angle between consecutive steps D^k = X^{k+1} - X^k, in radians, per token.

    0 is straight motion (a slider, a contraction along a line), pi is bouncing back (period 2),
    and a rotation or spiral by theta gives theta at any rate of contraction (two-scale dynamics,
    arXiv 2509.23314).

    Args:
        states: `[iteration, ..., d_model]`.

    Returns:
        `[iteration-2, ...]` in [0, pi]; empty for fewer than three states, NaN next to a zero
        step.
    """
    steps = measured_states(states).diff(dim=0)
    before, after = unit_vectors(steps[:-1]), unit_vectors(steps[1:])
    # atan2 keeps its precision near 0 and pi, where arccos loses half of the digits.
    sine, cosine = (after - before).norm(dim=-1), (after + before).norm(dim=-1)
    return 2 * torch.atan2(sine, cosine)


@full_precision
def acceleration(
    states: Float[Tensor, "iteration *tokens d_model"],
    normalize: Literal["none", "state", "step"] = "none",
) -> Float[Tensor, "step *tokens"]:
    """Change of the step, a^k = ||D^k - D^{k-1}|| with D^k = X^{k+1} - X^k, per token.

    The exit signal of two-scale dynamics (arXiv 2509.23314, Eq. 4). It never vanishes on an orbit,
    and it vanishes at once on a slider, which keeps drifting. The paper's own normalised form was
    not available; the two offered here are `"state"`, as in Huginn's generation code, and `"step"`
    (ours).

    Args:
        states: `[iteration, ..., d_model]`.
        normalize: `"none"`; `"state"`: divided by ||X^{k+1}||; `"step"`: divided by ||D^k|| +
            ||D^{k-1}||, in [0, 1], which is 0 for a slider, sin(theta/2) for a rotation and 1 for
            period 2.

    Returns:
        `[iteration-2, ...]`; empty for fewer than three states, NaN where the divisor and a^k are
        zero.
    """
    if normalize not in ("none", "state", "step"):
        raise ValueError(f'got normalize={normalize!r}, expected "none", "state" or "step"')
    x = measured_states(states)
    steps = x.diff(dim=0)
    change = steps.diff(dim=0).norm(dim=-1)
    if normalize == "none":
        return change
    if normalize == "state":
        return change / x[2:].norm(dim=-1)
    length = steps.norm(dim=-1)
    return change / (length[1:] + length[:-1])


@full_precision
def two_scale_ratio(
    groups: Sequence[Float[Tensor, "_ *tokens d_model"]],
) -> Float[Tensor, "group *tokens"]:
    """Drift from one looped group to the next over the mean step inside the group.

    ||x_{g+1}^{(0)} - x_g^{(K_g)}|| / mean_k ||D_g^k||: the drift-to-loop ratio of two-scale
    dynamics (arXiv 2509.23314, Eq. 2). The numerator compares the first recorded state of the NEXT
    group with the last of this one; the distance that a group covers itself, ||x_g^{(K)} -
    x_g^{(0)}||, is another quantity. Where the next group starts on the very state that this one
    ends on, the ratio is 0: record the next group from the output of its first pass.

    Args:
        groups: for each looped group in depth order its states `[iteration, ..., d_model]`,
            x_g^{(0)} first. The groups may have different numbers of iterations.

    Returns:
        `[len(groups)-1, ...]`. NaN for a group with a single state (no step); inf where a group
        does not move although the next one starts elsewhere.

    Raises:
        ValueError: If there are fewer than two groups.
    """
    if len(groups) < 2:
        raise ValueError(
            f"{len(groups)} groups given; a group is compared with the next one, pass at least two"
        )
    x = [measured_states(group) for group in groups]
    drift = [(after[0] - before[-1]).norm(dim=-1) for before, after in pairwise(x)]
    loop = [before.diff(dim=0).norm(dim=-1).mean(0) for before in x[:-1]]
    return torch.stack(drift) / torch.stack(loop)


@prints_short
@dataclass(frozen=True, eq=False)
class PathIndependence:
    """Agreement of states that were reached from different initial states, averaged over pairs.

    Attributes:
        cosine: Mean cosine over pairs of seeds `[...]`; 1 when the directions agree.
        distance: Mean L2 distance over pairs `[...]`; 0 when the path does not matter.
        relative_distance: `distance` over the mean norm of the states `[...]`.
    """

    cosine: Float[Tensor, "..."]
    distance: Float[Tensor, "..."]
    relative_distance: Float[Tensor, "..."]


@full_precision
def path_independence(final_states: Float[Tensor, "seed *tokens d_model"]) -> PathIndependence:
    """Compare the states that one input reaches from several initial states.

    Path independence after Anil et al. (arXiv 2211.09961); the pairwise latent distance is also
    used for the width of GRAM (arXiv 2605.19376). Pass `[seed, iteration, ..., d_model]` to follow
    it over iterations.

    Args:
        final_states: `[seed, ..., d_model]`, the same place of the model for each seed of the
            initial state.

    Returns:
        `PathIndependence` with tensors `[...]`; NaN for fewer than two seeds. The cosine is NaN
        where a state is zero, the relative distance where all of them are.
    """
    x = measured_states(final_states)
    pairs = list(combinations(range(x.shape[0]), 2))
    cosine = x.new_zeros(x.shape[1:-1])
    distance = x.new_zeros(x.shape[1:-1])
    for i, j in pairs:  # One pair at a time: all pairs at once would be seed times the memory.
        cosine += direction_cosine(x[i], x[j])
        distance += (x[i] - x[j]).norm(dim=-1)
    n_pairs = len(pairs) if pairs else torch.nan
    distance = distance / n_pairs
    return PathIndependence(cosine / n_pairs, distance, distance / x.norm(dim=-1).mean(0))


def _reference_state(states: Tensor, reference: int | Tensor) -> Tensor:
    if isinstance(reference, Tensor):
        return reference.to(statistic_dtype(reference))
    if not -states.shape[0] <= reference < states.shape[0]:
        raise ValueError(
            f"reference {reference} is not one of the {states.shape[0]} iterations given; "
            "pass an iteration or the reference state itself"
        )
    return states[reference]


def _mean_cosine(a: Tensor, b: Tensor, agg: str, mask: Tensor | None) -> Tensor:
    if agg not in ("token_mean", "none"):
        raise ValueError(f'got agg={agg!r}, expected "token_mean" or "none"')
    cosine = direction_cosine(a, b)
    if agg == "none" and mask is None:
        return cosine
    return pool_tokens(lambda c: c.mean(-2), [cosine], agg, mask)


def _pooled_distance(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    agg: Aggregation,
    relative: bool,
    rms: bool,
    mask: Tensor | None,
) -> Tensor:
    """||a - b|| under one of the aggregations, optionally over ||scale|| or sqrt(d_model)."""
    if agg not in ("token_mean", "fro", "none"):
        raise ValueError(f'got agg={agg!r}, expected "token_mean", "fro" or "none"')
    if relative and rms:
        raise ValueError("relative and rms are both set; each is a scale of its own, choose one")
    distance = (a - b).norm(dim=-1)
    if rms:
        distance = distance / a.shape[-1] ** 0.5
    norm = scale.norm(dim=-1) if relative else None
    if agg == "fro":
        values = [distance] if norm is None else [distance, norm]
        return pool_tokens(_frobenius, values, agg, mask)
    if norm is not None:
        distance = distance / norm
    if agg == "none" and mask is None:
        return distance
    return pool_tokens(lambda d: d.mean(-2), [distance], agg, mask)


def _frobenius(distance: Tensor, norm: Tensor | None = None) -> Tensor:
    """Frobenius norm from the norms per token `[*batch, pos, iteration]`, over that of `norm`."""
    total = distance.norm(dim=-2)
    return total if norm is None else total / norm.norm(dim=-2)
