"""Massive activations: few entries of the residual stream that are far larger than all others."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_loops.metrics.padding import expand_mask, map_spans, statistic_dtype
from tl_loops.metrics.precision import full_precision
from tl_loops.printing import prints_short


@prints_short
@dataclass(frozen=True)
class MassiveActivations:
    """The massive activations of a residual stream `[..., pos, d_model]`.

    Attributes:
        index: `[n, axis]`: where each one is, one column per axis of the residual stream; the last
            two are position and dimension. In the order of the tensor.
        value: `[n]`: the activations, with their signs.
        ratio: `[n]`: |value| divided by the median; inf where the median is 0.
        median: `[...]`: median |activation| of each sequence.
        count: `[...]`: number of massive activations of each sequence.
    """

    index: Int[Tensor, "n axis"]
    value: Float[Tensor, "n"]
    ratio: Float[Tensor, "n"]
    median: Float[Tensor, "*batch"]
    count: Int[Tensor, "*batch"]


@full_precision
def massive_activations(
    resid: Float[Tensor, "*batch pos d_model"],
    magnitude: float | int = 100,
    ratio: float | int = 1000,
    mask: Bool[Tensor, "*#batch pos"] | None = None,
) -> MassiveActivations:
    """Find the massive activations of each sequence.

    An activation is massive if its magnitude exceeds `magnitude` and is at least `ratio` times the
    median magnitude of the hidden state `[pos, d_model]` that it belongs to (arXiv 2402.17762,
    Sec. 2). For an even number of entries the median is the lower of the two in the middle.

    Args:
        resid: residual stream.
        magnitude: absolute threshold, exclusive.
        ratio: threshold relative to the median, inclusive.
        mask: True at real tokens, left or right padding; padding is neither reported nor part of
            the median.

    Returns:
        `MassiveActivations`; positions count from the start of the tensor, padding included. T = 1
        is defined. Zero tokens enter the median; where it is 0, only `magnitude` decides. A
        sequence with NaN has median NaN and reports nothing.

    Raises:
        TypeError: `resid` is not floating point or `mask` is not Bool.
        ValueError: a threshold is negative, or the mask does not fit.
    """
    if not (magnitude >= 0 and ratio >= 0):
        raise ValueError(f"got magnitude={magnitude!r}, ratio={ratio!r}, expected thresholds >= 0")
    if not resid.shape[-1]:
        raise ValueError("the residual stream has d_model = 0, so it holds no activations")
    size = resid.detach().to(statistic_dtype(resid)).abs()

    def span_median(span: Tensor) -> Tensor:
        return span.flatten(-2).median(-1).values

    median = map_spans(span_median, [size], mask, 2, position_dims=(-2,))
    is_massive = (size > magnitude) & (size >= ratio * median[..., None, None])
    if mask is not None:
        real = expand_mask(mask.to(size.device), size.shape[:-2], size.shape[-2])
        is_massive &= real[..., None]
    index = is_massive.nonzero()
    where = index.unbind(-1)
    return MassiveActivations(
        index=index,
        value=resid.detach()[where].to(size.dtype),
        ratio=size[where] / median[where[:-2]],
        median=median,
        count=is_massive.sum((-2, -1)),
    )


@full_precision
def bos_norm_ratio(
    resid: Float[Tensor, "*batch pos d_model"],
    mask: Bool[Tensor, "*#batch pos"] | None = None,
) -> Float[Tensor, "*batch"]:
    """How much longer the first token is than the others: ||x_0|| / mean_{i>0} ||x_i||.

    arXiv 2510.06477 reports 10^3 to 10^4 in the middle layers of pretrained models.

    Args:
        resid: residual stream.
        mask: True at real tokens, left or right padding; x_0 is the first real token.

    Returns:
        `[...]`, non-negative. NaN for T <= 1, where all tokens are zero and where a value is not
        finite; inf where all tokens but the first are zero.

    Raises:
        TypeError: `resid` is not floating point or `mask` is not Bool.
        ValueError: the mask does not fit.
    """

    def ratio(span: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(span, dim=-1, dtype=statistic_dtype(span))
        norm = norm.masked_fill(norm.isinf(), torch.nan)  # Over inf the ratio would be 0.
        return norm[..., :1].sum(-1) / norm[..., 1:].mean(-1)

    return map_spans(ratio, [resid], mask, 2, position_dims=(-2,))
