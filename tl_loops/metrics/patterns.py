"""Attention patterns before they are measured: checked, and sliced to the real tokens."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_loops.metrics.padding import expand_mask, map_spans, statistic_dtype
from tl_loops.metrics.precision import full_precision

ROW_SUM_TOLERANCE = 1e-3


@full_precision
def check_pattern(
    pattern: Float[Tensor, "*batch head dest src"],
    mask: Bool[Tensor, "*#batch pos"] | None = None,
    causal: bool = False,
    renormalize: bool = False,
) -> None:
    """Raise on a tensor that is not a post-softmax attention pattern.

    Every row of a real query must be non-negative and sum to 1 over the real keys. The tolerance
    is 1e-3, plus the rounding of the pattern's own dtype (half its epsilon: 4e-3 for bfloat16,
    where the row [1/3, 1/3, 1/3] sums to 1.002). All rows are tested together, with one device
    synchronisation. The metrics call this unless `validate=False`; a caller that measures one
    pattern in many ways can call it once.

    Args:
        pattern: attention weights, `[..., head, dest, src]`, dest and src the same positions.
        mask: True at real tokens; broadcasts over the batch axes. Rows of padding are not looked
            at, and keys in padding do not count.
        causal: also require that no weight lies above the diagonal.
        renormalize: the rows will be divided by their sums, so only require that each sum is
            positive.

    Raises:
        TypeError: `pattern` is not floating point or `mask` is not Bool.
        ValueError: dest and src differ in size, the mask does not fit, or a row is bad; the
            message names the first bad row and what it sums to.
    """
    dtype = statistic_dtype(pattern)
    if pattern.ndim < 3 or pattern.shape[-1] != pattern.shape[-2]:
        raise ValueError(
            f"pattern has shape {list(pattern.shape)}, expected [..., head, dest, src] with as "
            "many dest as src positions; measure a full forward pass, not a step with a key-value "
            "cache"
        )
    pattern = pattern.detach()
    real_query = None
    if mask is not None:
        mask = expand_mask(mask.to(pattern.device), pattern.shape[:-3], pattern.shape[-1])
        real_query = mask[..., None, :]
        pattern = pattern.masked_fill(~mask[..., None, None, :], 0)
    sums = pattern.sum(-1, dtype=dtype)
    tolerance = ROW_SUM_TOLERANCE + torch.finfo(pattern.dtype).eps / 2
    # Written so that NaN counts as bad.
    good = (sums > 0) & sums.isfinite() if renormalize else (sums - 1).abs() <= tolerance
    if pattern.shape[-1] > 0:
        good &= pattern.amin(-1) >= 0
        if causal:
            good &= pattern.triu(1).amax(-1) == 0
    if real_query is not None:
        good |= ~real_query
    if not good.all():
        _refuse(pattern, sums, good, tolerance, causal, renormalize)


def _refuse(
    pattern: Tensor, sums: Tensor, good: Tensor, tolerance: float, causal: bool, renormalize: bool
) -> None:
    """Raise the error for the first bad row."""
    index = tuple((~good).nonzero()[0].tolist())
    row, total = pattern[index], sums[index].item()
    where = (
        f"pattern[{', '.join(map(str, index))}] (head {index[-2]}, dest {index[-1]}; "
        f"{int((~good).sum())} bad rows in all)"
    )
    smallest = row.min().item()
    if smallest < 0:
        raise ValueError(
            f"{where} has an entry {smallest:.4g} and sums to {total:.4g}, expected weights >= 0; "
            "pass the pattern after the softmax (hook_pattern)"
        )
    sum_is_good = 0 < total < float("inf") if renormalize else abs(total - 1) <= tolerance
    if causal and sum_is_good:
        above = row[index[-1] + 1 :].sum().item()
        raise ValueError(
            f"{where} sums to {total:.4g} but has {above:.4g} of it above the diagonal, expected "
            "0; this normalisation counts visible keys and is defined for causal patterns only"
        )
    expected = "a positive sum" if renormalize else f"1 within {tolerance:.2g}"
    advice = "pass the pattern after the softmax (hook_pattern), and mask= where tokens are padding"
    if not renormalize:
        advice += "; renormalize=True rescales rows whose remaining weight lies on masked keys"
    raise ValueError(f"{where} sums to {total:.4g} over src, expected {expected}; {advice}")


def map_patterns(
    function: Callable[..., Tensor],
    patterns: Sequence[Tensor],
    *,
    mask: Tensor | None,
    drop_bos: bool,
    renormalize: bool,
    validate: bool,
    causal: bool = False,
    core_ndim: int = 3,
) -> Tensor:
    """Apply `function` to checked patterns, sliced to the real tokens of each row.

    Args:
        function: takes patterns `[*batch, ..., head, dest, src]` and returns `[*batch, ...]`.
        patterns: patterns with the same batch axes.
        mask: Bool, broadcasts to `[*batch, pos]`.
        drop_bos: leave out the first real token, as query and as key. The rows keep the weight
            that is left.
        renormalize: divide each row by its sum, after the slicing; a row without weight becomes
            NaN.
        validate: call `check_pattern` on each pattern.
        causal: passed to `check_pattern`.
        core_ndim: number of trailing axes that are not batch axes.

    Returns:
        `[*batch, ...]`: what `function` gave for each row.

    Raises:
        TypeError: see `check_pattern`.
        ValueError: see `check_pattern` and `map_spans`.
    """
    if validate:
        for pattern in patterns:
            check_pattern(pattern, mask, causal, renormalize)

    def on_span(*spans: Tensor) -> Tensor:
        if drop_bos:
            spans = tuple(span[..., 1:, 1:] for span in spans)
        if renormalize:
            spans = tuple(s / s.sum(-1, keepdim=True, dtype=statistic_dtype(s)) for s in spans)
        return function(*spans)

    return map_spans(on_span, patterns, mask, core_ndim, position_dims=(-2, -1))
