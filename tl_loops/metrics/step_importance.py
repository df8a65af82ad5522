"""Which reasoning steps are used later? Step importance from attention maps.

The prompt-intervention method (PI) keeps the steps that can be reached from the conclusion through
highly attended predecessors and prunes the rest. How it aggregates tokens to steps and where it
cuts was not available, so the aggregation and the cut in this module are our own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.precision import full_precision
from tl_loops.printing import prints_short


@prints_short
@dataclass(frozen=True, eq=False)
class StepImportance:
    """The steps that the conclusion depends on.

    Attributes:
        critical: whether the step is reached from the conclusion `[step]`; the conclusion itself
            is.
        retained_fraction: share of critical steps, in (0, 1].
        predecessors: for each step the kept predecessors, most attended first; empty for steps
            that are not critical.
    """

    critical: Bool[Tensor, "step"]
    retained_fraction: float
    predecessors: tuple[tuple[int, ...], ...]


@full_precision
def step_attention(
    pattern: Float[Tensor, "*batch head dest src"],
    step_ids: Int[Tensor, "pos"],
    length_normalize: bool = False,
) -> Float[Tensor, "*batch step step"]:
    """Attention from step to step, M_ij = mean_{q in step i} sum_{k in step j} A_qk.

    Averaged over heads; batch axes, for instance layer and iteration, are kept. A row sums to at
    most 1: the rest is attention to tokens of no step.

    Args:
        pattern: attention weights `[..., head, dest, src]`.
        step_ids: step of each token `[pos]`, counted from 0; negative for tokens of no step (the
            prompt).
        length_normalize: average over the keys instead of summing, so that long steps do not win
            by their length.

    Returns:
        `[..., step, step]` in [0, 1], from the attending to the attended step.

    Raises:
        ValueError: If the number of tokens differs, there is no step, or a step has no token.
    """
    if step_ids.shape[0] != pattern.shape[-1] or step_ids.shape[0] != pattern.shape[-2]:
        raise ValueError(
            f"{step_ids.shape[0]} step ids for a pattern of {pattern.shape[-2]} x "
            f"{pattern.shape[-1]} tokens; expected one id per token"
        )
    n_steps = int(step_ids.max()) + 1 if len(step_ids) else 0
    if n_steps < 1:
        raise ValueError("no token belongs to a step; expected ids from 0 on")
    member = step_ids == torch.arange(n_steps, device=step_ids.device)[:, None]
    n_tokens = member.sum(-1)
    if (n_tokens == 0).any():
        missing = (n_tokens == 0).nonzero().flatten().tolist()
        raise ValueError(f"steps {missing} have no token; number the steps 0 .. n-1 without gaps")
    a = pattern.to(statistic_dtype(pattern)).mean(-3)
    one_hot = member.to(a)
    rows = one_hot / n_tokens[:, None]
    columns = rows if length_normalize else one_hot
    return rows @ a @ columns.mT


@full_precision
def critical_steps(
    attention: Float[Tensor, "step step"], top_p: float | int = 0.9, conclusion: int = -1
) -> StepImportance:
    """Steps that the conclusion reaches through most attended predecessors, step after step.

    The kept predecessors of a step are the fewest earlier steps that hold a share `top_p` of its
    attention to earlier steps, most attended first; of equal ones the earlier first. A step that
    is never attended to is not kept, whatever `top_p`.

    Args:
        attention: `[step, step]` from `step_attention`, one map (average the layers or iterations
            first).
        top_p: share of the attention to earlier steps that the kept ones cover, in (0, 1].
        conclusion: the step from which the search starts.

    Returns:
        `StepImportance`.

    Raises:
        ValueError: If `top_p` is out of range, there is no step `conclusion`, or a value is not
            finite.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; expected 0 < top_p <= 1")
    n_steps = attention.shape[0]
    if not -n_steps <= conclusion < n_steps:
        raise ValueError(f"conclusion={conclusion} is not one of the {n_steps} steps")
    if not bool(attention.isfinite().all()):
        raise ValueError(
            "attention holds NaN or infinite values, so no step has a share of it: give finite "
            "attention"
        )
    conclusion %= n_steps
    rows: Sequence[Sequence[float]] = attention.double().tolist()
    critical = [False] * n_steps
    critical[conclusion] = True
    predecessors: list[tuple[int, ...]] = [()] * n_steps
    # Predecessors are earlier, so going backwards visits every critical step after its successors.
    for step in range(conclusion, -1, -1):
        if critical[step]:
            predecessors[step] = _nucleus(rows[step][:step], top_p)
            for kept in predecessors[step]:
                critical[kept] = True
    return StepImportance(
        torch.tensor(critical, device=attention.device),
        sum(critical) / n_steps,
        tuple(predecessors),
    )


def _nucleus(weights: Sequence[float], top_p: float) -> tuple[int, ...]:
    """Fewest indices whose weights reach a share `top_p` of the sum, largest first."""
    target = top_p * sum(weights)
    kept, covered = [], 0.0
    for index in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        # Rounding of float32 attention must not pull in one step more.
        if weights[index] <= 0 or covered >= target * (1 - 1e-6):
            break
        kept.append(index)
        covered += weights[index]
    return tuple(kept)
