"""Stages of inference: is the depth profile of a looped block like that of a feedforward model?

Blayney et al. (arXiv 2604.11791, sections 2.1 and 5) compare the curves by eye. The numbers of
`align_stages` are this library's own: a profile is one value of some metric per layer, compared on
a common grid of relative depth or layer by layer with a window of the reference.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.precision import full_precision
from tl_loops.printing import prints_short


@prints_short
@dataclass(frozen=True)
class StagePermutationNull:
    """How often a profile with its layers in random order fits the reference at least as well.

    p values are (1 + number of permutations at least as good) / (1 + number of permutations), so
    never 0. NaN where the statistic is.

    Attributes:
        pearson_p: permuted r >= r.
        rmse_p: permuted RMSE <= RMSE.
        window_p: best-window RMSE of the permuted profile <= that of the profile; accounts for the
            choice of the window.
        n_permutations: number of permutations.
    """

    pearson_p: Float[Tensor, "*iteration"]
    rmse_p: Float[Tensor, "*iteration"]
    window_p: Float[Tensor, "*iteration"]
    n_permutations: int


@prints_short
@dataclass(frozen=True)
class StageAlignment:
    """Agreement of a depth profile with a reference profile, one value a curve.

    Attributes:
        pearson: correlation on the grid; NaN for fewer than 3 layers on either side or a constant
            curve.
        rmse: root mean squared difference on the grid, in units of the metric; NaN for a one-layer
            curve.
        max_abs: largest absolute difference on the grid; NaN for a one-layer curve.
        dtw_cost: dynamic time warping on the grid: the smallest sum of absolute differences along a
            monotone path from corner to corner, divided by the number of grid points. At most the
            mean absolute difference, hence at most `rmse`.
        window_start: first reference layer of the best window; the first of several equal ones.
        window_length: number of reference layers in every window; the window is [window_start,
            window_start + window_length).
        window_rmse: RMSE layer by layer between the profile and the best window.
        window_pearson: correlation there; NaN as for `pearson`.
        stability: correlation over layers with the previous iteration's curve; NaN for the first,
            and as for `pearson`.
        null: permutation test, if asked for.
    """

    pearson: Float[Tensor, "*iteration"]
    rmse: Float[Tensor, "*iteration"]
    max_abs: Float[Tensor, "*iteration"]
    dtw_cost: Float[Tensor, "*iteration"]
    window_start: Int[Tensor, "*iteration"]
    window_length: int
    window_rmse: Float[Tensor, "*iteration"]
    window_pearson: Float[Tensor, "*iteration"]
    stability: Float[Tensor, "*iteration"]
    null: StagePermutationNull | None


@full_precision
def align_stages(
    profile: Float[Tensor, "depth"] | Float[Tensor, "iteration depth"],
    reference_profile: Float[Tensor, "depth_ref"],
    grid: int = 101,
    window_length: int | None = None,
    n_permutations: int = 0,
    seed: int | None = None,
) -> StageAlignment:
    """Compare the depth profile of a looped block, or one per iteration, with a reference.

    Two comparisons: both curves stretched to relative depth 0..1 (layer i of k at i / (k - 1)) and
    interpolated linearly on `grid` points; and the block laid over each window of consecutive
    reference layers. For a model that was cut out of the reference, the best window should be the
    source layers.

    Args:
        profile: one value per layer, `[depth]` or `[iteration, depth]` (`layout.by_iteration` gives
            the latter).
        reference_profile: one value per layer of the reference, `[depth_ref]`.
        grid: number of grid points, at least 2.
        window_length: reference layers in a window; None takes as many as the profile has, at most
            all. A window of another length than the profile is interpolated to the profile's
            layers.
        n_permutations: size of the permutation null; 0 leaves it out.
        seed: seed of the permutations, required if there are any.

    Returns:
        Scalars for `[depth]`, `[iteration]` for `[iteration, depth]`; float32 (float64 where both
        inputs are).

    Raises:
        ValueError: an empty or non-finite profile, a bad `grid` or `window_length`, or permutations
            without a seed.
    """
    dtype = torch.promote_types(statistic_dtype(profile), statistic_dtype(reference_profile))
    _require_curve("profile", profile)
    _require_curve("reference_profile", reference_profile)
    if grid < 2:
        raise ValueError(f"grid={grid}, expected at least 2 points")
    if n_permutations < 0 or (n_permutations > 0 and seed is None):
        raise ValueError(
            f"n_permutations={n_permutations} with seed={seed}; expected a number >= 0 and, if it "
            "is positive, a seed"
        )
    depth, depth_ref = profile.shape[-1], reference_profile.shape[-1]
    if window_length is None:
        window_length = min(depth, depth_ref)
    if not 1 <= window_length <= depth_ref or (depth == 1) != (window_length == 1):
        raise ValueError(
            f"window_length={window_length} for a profile of {depth} and a reference of "
            f"{depth_ref} layers; expected at most {depth_ref}, and 1 exactly if the profile has "
            "one layer"
        )

    curves = profile.to(dtype)
    reference = reference_profile.to(curves)
    reference_on_grid = _resample(reference, grid)
    windows = _resample(reference.unfold(-1, window_length, 1), depth)

    on_grid = _resample(curves, grid)
    pearson = _pearson(on_grid, reference_on_grid)
    if min(depth, depth_ref) < 3:
        pearson = torch.full_like(pearson, math.nan)
    rmse = _rmse(on_grid, reference_on_grid)
    window_rmse, window_start = _rmse(curves[..., None, :], windows).min(-1)
    stability = torch.full_like(pearson, math.nan)
    if curves.ndim == 2:
        stability[1:] = _pearson(curves[1:], curves[:-1])

    null = None
    if n_permutations > 0:
        assert seed is not None  # checked above
        generator = torch.Generator().manual_seed(seed)
        orders = torch.stack(
            [torch.randperm(depth, generator=generator) for _ in range(n_permutations)]
        ).to(curves.device)
        permuted = curves[..., orders]  # [*iteration, permutation, depth]
        permuted_on_grid = _resample(permuted, grid)
        permuted_window = _rmse(permuted[..., None, :], windows).amin(-1)
        null = StagePermutationNull(
            pearson_p=_p_value(-_pearson(permuted_on_grid, reference_on_grid), -pearson),
            rmse_p=_p_value(_rmse(permuted_on_grid, reference_on_grid), rmse),
            window_p=_p_value(permuted_window, window_rmse),
            n_permutations=n_permutations,
        )
    return StageAlignment(
        pearson=pearson,
        rmse=rmse,
        max_abs=(on_grid - reference_on_grid).abs().amax(-1),
        dtw_cost=_dtw_cost(on_grid, reference_on_grid),
        window_start=window_start,
        window_length=window_length,
        window_rmse=window_rmse,
        window_pearson=_pearson(curves, windows[window_start]),
        stability=stability,
        null=null,
    )


@full_precision
def angular_distance(
    resid: Float[Tensor, "depth *batch d_model"], gap: int = 1
) -> Float[Tensor, "pair"]:
    """Mean angle between residual streams `gap` layers apart, in units of pi (arXiv 2403.17887).

    arccos(cos(x_l, x_{l + gap})) / pi per token, then the mean over all batch axes. The angle is
    computed from the chord, which stays exact near 0, where arccos of a float32 cosine is off by
    1e-4.

    Args:
        resid: residual stream entering each block (and leaving the last), `[depth, ..., d_model]`,
            real tokens only; the paper uses the last position of each sequence.
        gap: number of layers between the two streams.

    Returns:
        `[depth - gap]` in [0, 1]; entry l compares l with l + gap. NaN where a token has a zero
        vector or there is no token.

    Raises:
        ValueError: `gap` does not fit the depth.
    """
    a, b = _unit_pairs(resid, gap)
    angle = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))
    return (angle / math.pi).unsqueeze(-1).flatten(1).mean(1)


@full_precision
def block_influence(resid: Float[Tensor, "depth *batch d_model"]) -> Float[Tensor, "pair"]:
    """Block Influence: 1 - E cos(x_l, x_{l + 1}) over tokens (arXiv 2403.03853).

    Computed as half the squared chord, which is the same and keeps its precision near 0.

    Args:
        resid: residual stream entering each block (and leaving the last), `[depth, ..., d_model]`,
            real tokens only.

    Returns:
        `[depth - 1]` in [0, 2]; 0 for a block that only rescales. NaN where a token has a zero
        vector or there is no token.

    Raises:
        ValueError: fewer than two residual streams.
    """
    a, b = _unit_pairs(resid, 1)
    return ((a - b).square().sum(-1) / 2).unsqueeze(-1).flatten(1).mean(1)


def _unit_pairs(resid: Tensor, gap: int) -> tuple[Tensor, Tensor]:
    if not 1 <= gap < resid.shape[0]:
        raise ValueError(
            f"gap={gap} for {resid.shape[0]} residual streams, expected at least 1 and less than "
            "their number"
        )
    resid = resid.to(statistic_dtype(resid))
    unit = resid / resid.norm(dim=-1, keepdim=True)
    return unit[:-gap], unit[gap:]


def _require_curve(name: str, curve: Tensor) -> None:
    if curve.ndim == 0 or curve.numel() == 0:
        raise ValueError(f"{name} has shape {list(curve.shape)}, expected one value per layer")
    if not curve.isfinite().all():
        layers = (~curve.isfinite()).nonzero()[:, -1].unique().tolist()
        raise ValueError(
            f"{name} is not finite in layer(s) {layers}; drop them or the prompts that cause it"
        )


def _resample(curve: Tensor, points: int) -> Tensor:
    """Linear interpolation along the last axis at equal steps; NaN for more points from one."""
    depth = curve.shape[-1]
    if depth == points:
        return curve
    if depth == 1:
        return curve.new_full((*curve.shape[:-1], points), math.nan)
    position = torch.arange(points, dtype=torch.float64, device=curve.device)
    position = position * (depth - 1) / (points - 1)
    left = position.long().clamp(max=depth - 2)
    weight = (position - left).to(curve.dtype)
    return torch.lerp(curve[..., left], curve[..., left + 1], weight)


def _rmse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(-1).sqrt()


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation along the last axis; NaN for under 3 points or a curve that is constant."""
    a_unit, b_unit = _unit_deviation(a), _unit_deviation(b)
    r = (a_unit * b_unit).sum(-1).clamp(-1, 1)
    undefined = _is_constant(a) | _is_constant(b)
    if a.shape[-1] < 3:
        undefined = torch.ones_like(undefined)
    return torch.where(undefined, math.nan, r)


def _unit_deviation(curve: Tensor) -> Tensor:
    deviation = curve - curve.mean(-1, keepdim=True)
    # Scaled first, so that small metrics do not underflow in the square.
    deviation = deviation / deviation.abs().amax(-1, keepdim=True)
    return deviation / deviation.norm(dim=-1, keepdim=True)


def _is_constant(curve: Tensor) -> Tensor:
    spread = curve.amax(-1) - curve.amin(-1)
    return spread <= 8 * torch.finfo(curve.dtype).eps * curve.abs().amax(-1)


def _dtw_cost(a: Tensor, b: Tensor) -> Tensor:
    n, m = a.shape[-1], b.shape[-1]
    cost = (a[..., :, None] - b[..., None, :]).abs()
    total = cost.new_full((*cost.shape[:-2], n + 1, m + 1), math.inf)
    total[..., 0, 0] = 0
    # Cells of one anti-diagonal depend on the two before it only.
    for diagonal in range(2, n + m + 1):
        i = torch.arange(max(1, diagonal - m), min(n, diagonal - 1) + 1, device=cost.device)
        j = diagonal - i
        before = torch.minimum(total[..., i - 1, j], total[..., i, j - 1])
        before = torch.minimum(before, total[..., i - 1, j - 1])
        total[..., i, j] = cost[..., i - 1, j - 1] + before
    return total[..., n, m] / n


def _p_value(permuted: Tensor, observed: Tensor) -> Tensor:
    """Share of orders, the observed one included, whose value is at most the observed one."""
    slack = 1e-6 * observed.abs()
    as_good = (permuted <= (observed + slack)[..., None]).sum(-1)
    p = (1 + as_good) / (1 + permuted.shape[-1])
    return torch.where(observed.isnan(), math.nan, p.to(observed.dtype))
