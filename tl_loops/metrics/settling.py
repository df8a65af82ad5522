"""Whether a trajectory has settled by its last iterations, and whether settled answers are right.

The question of outcome-conditioned settling: wrong answers of recursive reasoning models wander,
right ones settle. The late drift is what is measured, Otsu's threshold says where "settled" ends.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_loops.metrics.dynamics import successive_difference
from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.precision import full_precision
from tl_loops.printing import prints_short

if TYPE_CHECKING:
    import pandas


@full_precision
def late_drift(
    states: Float[Tensor, "iteration *tokens d_model"],
    window: int = 4,
    relative: bool = False,
) -> Float[Tensor, "*tokens"]:
    """Mean length of the last steps, mean ||z_t - z_{t-1}|| over the last iterations, per token.

    Args:
        states: `[iteration, ..., d_model]`.
        window: how many steps; fewer where there are not so many.
        relative: divide each by the norm of the later state, ||z_t||.

    Returns:
        `[...]`, >= 0; NaN for one state.

    Raises:
        ValueError: If `window` is below 1.
    """
    steps = successive_difference(states, agg="none", relative=relative)
    return last_mean(steps, window)


def last_mean(steps: Float[Tensor, "step *tokens"], window: int) -> Float[Tensor, "*tokens"]:
    """Mean over the last `window` steps; NaN without one.

    Raises:
        ValueError: If `window` is below 1.
    """
    if window < 1:
        raise ValueError(f"window={window}; expected at least 1 step")
    return steps[-window:].mean(0)


@full_precision
def otsu_threshold(values: Float[Tensor, "sample"]) -> float:
    """The threshold that splits values into two groups with the largest variance between them.

    Exact over all splits of the sorted values (Otsu 1979, without its histogram): between the two
    neighbours of the best split, halfway. Values that are not finite are left out.

    Args:
        values: for instance the pooled log drift of many prompts.

    Returns:
        The threshold; NaN with fewer than two different values.
    """
    x = values[values.isfinite()].double().sort().values
    n = x.numel()
    if n < 2 or float(x[0]) == float(x[-1]):
        return math.nan
    x = x.cpu()
    size = torch.arange(1, n, dtype=torch.float64)
    below = x.cumsum(0)[:-1] / size
    above = (x.sum() - x.cumsum(0)[:-1]) / (n - size)
    between = size * (n - size) * (above - below).square()
    between[x[1:] == x[:-1]] = -1.0  # equal values are not split
    best = int(between.argmax())
    return float((x[best] + x[best + 1]) / 2)


@prints_short
@dataclass(frozen=True, eq=False)
class SettlingTable:
    """Settled against correct.

    Attributes:
        threshold: drift at or below which a trajectory is settled, in the unit of the drift.
        settled: which are, `[sample]`.
        counts: `[2, 2]`, rows settled and wandering, columns correct and wrong.
        auc: probability that a wrong answer drifts further than a right one (ties count half), the
            area under the receiver operating characteristic; NaN unless there are both.
    """

    threshold: float
    settled: Bool[Tensor, "sample"]
    counts: Int[Tensor, "2 2"]
    auc: float

    @property
    def accuracy_settled(self) -> float:
        """Share of correct answers among settled trajectories; NaN without one."""
        return _share(self.counts[0])

    @property
    def accuracy_wandering(self) -> float:
        """Share of correct answers among the others; NaN without one."""
        return _share(self.counts[1])

    def to_frame(self) -> "pandas.DataFrame":
        """The counts, with names."""
        import pandas

        return pandas.DataFrame(
            self.counts.tolist(), index=["settled", "wandering"], columns=["correct", "wrong"]
        )


def _share(row: Int[Tensor, "2"]) -> float:
    n = int(row.sum())
    return int(row[0]) / n if n else math.nan


@full_precision
def settling_table(
    drift: Float[Tensor, "sample"],
    correct: Bool[Tensor, "sample"],
    threshold: float | int | None = None,
) -> SettlingTable:
    """Whether answers of settled trajectories are right more often.

    Args:
        drift: from `late_drift`, one number per prompt or token, >= 0.
        correct: whether each answer is right.
        threshold: of the drift; None: Otsu's, of the logarithm of all drifts, which pools right
            and wrong answers. A drift of 0 is settled.

    Returns:
        `SettlingTable`.

    Raises:
        ValueError: If there is no sample, a drift is negative or NaN, or the drifts do not differ
            (no threshold can be found then: pass one).
    """
    if not drift.numel() or not bool((drift >= 0).all()):
        raise ValueError(
            "drift must hold at least one number, each at least 0 and none NaN: leave out what has "
            "no drift"
        )
    if threshold is None:
        log_threshold = otsu_threshold(drift.to(statistic_dtype(drift)).log())
        if math.isnan(log_threshold):
            raise ValueError(
                "the drifts that are not 0 do not differ, so no threshold splits them: pass one"
            )
        threshold = math.exp(log_threshold)
    settled = drift <= threshold
    answers = torch.stack([correct, ~correct])
    counts = torch.stack([(rows & answers).sum(-1) for rows in (settled, ~settled)])
    return SettlingTable(float(threshold), settled, counts, _auc(drift[~correct], drift[correct]))


def _auc(higher: Tensor, lower: Tensor) -> float:
    """P(higher > lower) + P(equal) / 2 over all pairs."""
    if not higher.numel() or not lower.numel():
        return math.nan
    ordered = lower.sort().values
    below = torch.searchsorted(ordered, higher, right=False)
    up_to = torch.searchsorted(ordered, higher, right=True)
    return float((below + up_to).double().sum() / 2 / (higher.numel() * lower.numel()))
