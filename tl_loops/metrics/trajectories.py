"""Labels for latent trajectories: fixed point, orbit, slider, unknown."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.metrics.precision import full_precision
from tl_loops.metrics.states import direction_cosine, measured_states
from tl_loops.printing import prints_short

TRAJECTORY_LABELS = ("fixed_point", "orbit", "slider", "unknown")

# A cosine in float32 is rounded at about 1e-7; a curve that swings less than this has no period.
_FLAT = 1e-5


@prints_short
@dataclass(frozen=True, eq=False)
class TrajectoryClassification:
    """Labels of `classify_trajectory` and the scores that they were read from, one entry per token.

    Attributes:
        labels: array of strings `[...]`, each one of `TRAJECTORY_LABELS`.
        similarity: s_t = cos(x_t, x_last) `[iteration, ...]`; the last one is 1 by construction.
        near_fraction: share of iterations with s_t >= 1 - tau `[...]`.
        amplitude: 1 - min s_t after the first near iteration `[...]`, in [0, 2]; 0 if the state
            never leaves again.
        returns: how often the state came back after it had left `[...]`; 0 where the scores are
            NaN.
        gap_variation: standard deviation of the gaps between visits over their mean `[...]`; NaN
            without a return.
        drop: largest fall of s_t below its running maximum `[...]`; 0 for a monotone approach.
        late_speed: mean of ||x_t - x_{t-1}|| / ||x_t|| over the late steps `[...]`. Tells a slow
            contraction (it goes to 0) from a slider (it does not).
        dominant_period: period of s_t over the late iterations `[...]`, in iterations; NaN if
            there is none.
        periodicity: autocorrelation of s_t at that period `[...]`; NaN if there is none.
    """

    labels: np.ndarray
    similarity: Float[Tensor, "iteration ..."]
    near_fraction: Float[Tensor, "..."]
    amplitude: Float[Tensor, "..."]
    returns: Int[Tensor, "..."]
    gap_variation: Float[Tensor, "..."]
    drop: Float[Tensor, "..."]
    late_speed: Float[Tensor, "..."]
    dominant_period: Float[Tensor, "..."]
    periodicity: Float[Tensor, "..."]

    def fraction(self, label: str) -> float:
        """Share of tokens with one label, in [0, 1].

        Args:
            label: one of `TRAJECTORY_LABELS`.

        Returns:
            The share; NaN if there is no token.

        Raises:
            ValueError: If there is no such label.
        """
        if label not in TRAJECTORY_LABELS:
            raise ValueError(f"label {label!r} is unknown; expected one of {TRAJECTORY_LABELS}")
        return float((self.labels == label).mean()) if self.labels.size else float("nan")


@full_precision
def classify_trajectory(
    states: Float[Tensor, "iteration *tokens d_model"],
    tau: float | int = 0.05,
    rho: float | int = 0.9,
    min_returns: int = 3,
    max_gap_variation: float | int = 0.5,
    max_drop: float | int | None = None,
    late_fraction: float | int = 0.5,
    min_periodicity: float | int = 0.5,
) -> TrajectoryClassification:
    """Label the path of each token by its cosine to where it ends, s_t = cos(x_t, x_last).

    A RECONSTRUCTION of Algorithm 1 of arXiv 2604.11791 (appendix C). Known from the paper are the
    input s_t over 128 iterations of the last core layer's output, tau = 0.05, rho = 0.9 and the
    four labels; the body of the algorithm is not in the available text. The rules here, the first
    that holds:

    - fixed_point: s_t >= 1 - tau (near) for at least a share rho of all iterations;
    - orbit: after the first near iteration the state leaves and returns at least `min_returns`
      times, at regular gaps: std <= `max_gap_variation` * mean;
    - slider: s_t never falls more than `max_drop` below its running maximum;
    - unknown: everything else.

    What follows from a cosine to the end: an orbit or a drift that turns by less than arccos(1 -
    tau), 18 degrees at the default, is a fixed point, so the rarity of orbits is partly a matter
    of definition; a slow contraction is a slider until it has had time to settle (see
    `late_speed`); radial motion is invisible; and an orbit needs `min_returns` periods inside the
    trajectory. Rates depend strongly on tau and rho.

    Args:
        states: `[iteration, ..., d_model]`, for instance the state that leaves each of 128
            iterations.
        tau: how far below 1 the cosine of a near iteration may be.
        rho: share of near iterations that makes a fixed point.
        min_returns: returns that make an orbit.
        max_gap_variation: regularity of an orbit, std over mean of the gaps between visits.
        max_drop: the slider's tolerance; `tau` if None.
        late_fraction: the last share of the trajectory on which late speed and period are
            measured.
        min_periodicity: autocorrelation that a period needs.

    Returns:
        `TrajectoryClassification` with labels `[...]`. With a single iteration, or where a state
        is zero (padding) or not finite, nothing can be said: the label is unknown and the scores
        are NaN.

    Raises:
        ValueError: If a parameter is out of its range.
    """
    for name, value, low, high in (
        ("tau", tau, 0.0, 2.0),
        ("rho", rho, 0.0, 1.0),
        ("late_fraction", late_fraction, 0.0, 1.0),
        ("min_periodicity", min_periodicity, 0.0, 1.0),
    ):
        if not low < value <= high:
            raise ValueError(f"{name}={value} is out of range; expected {low} < {name} <= {high}")
    if min_returns < 1:
        raise ValueError(
            f"min_returns={min_returns}; an orbit returns at least once, pass 1 or more"
        )
    x = measured_states(states)
    n_iterations = x.shape[0]
    similarity = direction_cosine(x, x[-1])
    defined = similarity.isfinite().all(0) & (n_iterations > 1)

    near = similarity >= 1 - tau
    seen = near.cummax(0).values
    near_fraction = near.to(x.dtype).mean(0)
    amplitude = 1 - torch.where(seen, similarity, 1.0).amin(0)
    returns, gap_variation = _visits(near, seen, x.dtype)
    drop = (similarity.cummax(0).values - similarity).amax(0)

    n_late = max(1, round(late_fraction * (n_iterations - 1)))
    step = x[-n_late - 1 :].diff(dim=0).norm(dim=-1) / x[-n_late:].norm(dim=-1)
    late_speed = step.mean(0)
    period, periodicity = _dominant_period(similarity[-n_late - 1 :], min_periodicity)

    conditions = [
        ~defined,
        near_fraction >= rho,
        (returns >= min_returns) & (gap_variation <= max_gap_variation),
        drop <= (tau if max_drop is None else max_drop),
    ]
    choices = ["unknown", "fixed_point", "orbit", "slider"]
    labels = np.select([c.cpu().numpy() for c in conditions], choices, default="unknown")

    def known(score: Tensor) -> Tensor:
        return torch.where(defined, score, torch.nan)

    return TrajectoryClassification(
        labels=np.asarray(labels),
        similarity=similarity,
        near_fraction=known(near_fraction),
        amplitude=known(amplitude),
        returns=returns,
        gap_variation=known(gap_variation),
        drop=known(drop),
        late_speed=known(late_speed),
        dominant_period=known(period),
        periodicity=known(periodicity),
    )


@full_precision
def label_co_occurrence(labels: np.ndarray) -> Float[Tensor, "given also"]:
    """How often a token that has one label on some layer has another label on some layer.

    P(b on any layer | a on any layer), per token (arXiv 2604.11791, appendix C.2 and Fig. 14).

    Args:
        labels: array of strings `[layer, ...]`, the labels of the same tokens at each layer.

    Returns:
        `[4, 4]` in [0, 1], rows a and columns b in the order of `TRAJECTORY_LABELS`; a row is NaN
        where no token has the label a. The diagonal is 1.

    Raises:
        ValueError: If a label is unknown.
    """
    unknown = set(np.unique(labels)) - set(TRAJECTORY_LABELS)
    if unknown:
        raise ValueError(f"labels {sorted(unknown)} are unknown; expected {TRAJECTORY_LABELS}")
    has = [(labels == label).any(axis=0).reshape(-1) for label in TRAJECTORY_LABELS]
    has = torch.from_numpy(np.stack(has)).float()
    return (has @ has.T) / has.sum(-1, keepdim=True)


def _visits(near: Tensor, seen: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Number of returns after the first visit, and std over mean of the gaps between visits."""
    before = torch.zeros_like(near)
    before[1:] = near[:-1]
    visit = near & ~before  # Also the first one, which opens the first gap.
    n_iterations = near.shape[0]
    t = torch.arange(n_iterations, device=near.device).reshape(-1, *[1] * (near.ndim - 1))
    last_visit = torch.where(visit, t, -1).cummax(0).values
    previous = torch.full_like(last_visit, -1)
    previous[1:] = last_visit[:-1]
    is_return = visit & (previous >= 0)
    n = is_return.sum(0)
    gap = torch.where(is_return, t - previous, 0).to(torch.float64)
    mean = gap.sum(0) / n
    variance = torch.where(is_return, (gap - mean).square(), 0.0).sum(0) / n
    return n, (variance.sqrt() / mean).to(dtype)


def _dominant_period(curve: Tensor, min_periodicity: float) -> tuple[Tensor, Tensor]:
    """Period of `[iteration, ...]` curves and the autocorrelation there: its first high peak.

    The autocorrelation is computed by FFT without wrap-around, after a linear trend was removed,
    and each lag is divided by its number of pairs. The peak is refined by a parabola, so the
    period need not be an integer; below about 4 a period that is not an integer appears as its
    first multiple that nearly is one.
    """
    n = curve.shape[0]
    nothing = curve.new_full(curve.shape[1:], torch.nan)
    max_lag = n // 2
    if max_lag < 2 or not curve.numel():
        return nothing, nothing
    curve = curve.to(torch.float64)
    t = torch.arange(n, dtype=curve.dtype, device=curve.device).reshape(-1, *[1] * (curve.ndim - 1))
    t = t - t.mean()
    curve = curve - curve.mean(0)
    curve = curve - t * (t * curve).sum(0) / t.square().sum()
    flat = curve.square().mean(0).sqrt() <= _FLAT

    spectrum = torch.fft.rfft(curve, n=2 * n, dim=0)
    correlation = torch.fft.irfft(spectrum.abs().square(), n=2 * n, dim=0)[: max_lag + 2]
    lags = torch.arange(correlation.shape[0], dtype=curve.dtype, device=curve.device)
    correlation = correlation / (n - lags).reshape(-1, *[1] * (curve.ndim - 1))
    correlation = correlation / correlation[0]

    left, middle, right = correlation[1:-2], correlation[2:-1], correlation[3:]
    peak = (middle > left) & (middle >= right)
    offset = 0.5 * (left - right) / (left - 2 * middle + right)
    height = torch.where(peak, middle - 0.25 * (left - right) * offset, -1.0)
    # Multiples of the period peak as high as the period itself: take the first of the high ones.
    high = height >= (0.9 * height.amax(0)).clamp(min=min_periodicity)
    found = high.any(0) & ~flat
    first = high.to(torch.uint8).argmax(0, keepdim=True)
    period = first + 2 + offset.gather(0, first)
    scores = (period.squeeze(0), height.gather(0, first).squeeze(0))
    period, height = (torch.where(found, s, torch.nan).to(nothing.dtype) for s in scores)
    return period, height
