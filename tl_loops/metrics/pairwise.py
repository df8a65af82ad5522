"""Distances between blocks: two attention patterns, or all pairs of blocks of a trajectory.

arXiv 2604.11791 plots such matrices over all realised layers: attention in Fig. 2 and 21, the
residual stream in Fig. 19 and 20. It does not say how heads are pooled; the default here is the
norm per head, then the mean over heads.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_loops.metrics.padding import map_spans, statistic_dtype
from tl_loops.metrics.patterns import check_pattern, map_patterns
from tl_loops.metrics.precision import full_precision
from tl_loops.metrics.residual import unit_vectors


@full_precision
def pattern_distance(
    a: Float[Tensor, "*#batch head dest src"],
    b: Float[Tensor, "*#batch head dest src"],
    heads: Literal["mean", "stack", "avg_pattern"] = "mean",
    *,
    mask: Bool[Tensor, "*#batch pos"] | None = None,
    drop_bos: bool = False,
    renormalize: bool = False,
    validate: bool = True,
) -> Float[Tensor, "*batch"]:
    """Frobenius distance ||A - B||_F between attention patterns of the same tokens.

    The attention version of successive differences and fixed-point distances, arXiv 2604.11791
    Sec. 4.1 and App. D.2. Average over sequences afterwards: the distance grows with T (at most
    sqrt(2 (T-1)) per head for causal patterns).

    Args:
        a: attention weights, rows sum to 1.
        b: attention weights of the same heads and positions; the batch axes broadcast.
        heads: `"mean"`: distance per head, then the mean over heads; `"stack"`: one norm over the
            stacked `[head, dest, src]`; `"avg_pattern"`: distance of the head-averaged patterns.
        mask: True at real tokens; each row is sliced to them first.
        drop_bos: leave out the first real token, as query and as key; the rows are not rescaled.
        renormalize: divide each row by its sum after the slicing.
        validate: check the rows first (`check_pattern`).

    Returns:
        `[...]`, non-negative. T = 1 gives 0: the only token attends to itself in both. NaN where
        no token is left. The gradient is 0 where the distance is.

    Raises:
        TypeError: a pattern is not floating point or `mask` is not Bool.
        ValueError: unknown `heads`, different heads or positions, a mask that does not fit, or a
            row that does not sum to 1.
    """
    _check_heads(heads)
    if a.shape[-3:] != b.shape[-3:]:
        raise ValueError(
            f"got shapes {list(a.shape)} and {list(b.shape)}, expected the same heads and positions"
        )

    def distance(a: Tensor, b: Tensor) -> Tensor:
        dtype = torch.promote_types(statistic_dtype(a), statistic_dtype(b))
        difference = a.to(dtype) - b.to(dtype)
        if difference.shape[-1] == 0:
            return difference.new_full(difference.shape[:-3], math.nan)
        if heads == "avg_pattern":
            difference = difference.mean(-3, keepdim=True)
        # Row by row: one norm over many entries loses digits in float32.
        per_row = torch.linalg.vector_norm(difference, dim=-1)
        per_head = torch.linalg.vector_norm(per_row, dim=-1)
        return torch.linalg.vector_norm(per_head, dim=-1) if heads == "stack" else per_head.mean(-1)

    return map_patterns(
        distance,
        torch.broadcast_tensors(a, b),
        mask=mask,
        drop_bos=drop_bos,
        renormalize=renormalize,
        validate=validate,
    )


@full_precision
def pairwise_pattern_distance(
    patterns: Float[Tensor, "block *batch head dest src"],
    heads: Literal["mean", "stack", "avg_pattern"] = "mean",
    *,
    mask: Bool[Tensor, "*#batch pos"] | None = None,
    drop_bos: bool = False,
    renormalize: bool = False,
    validate: bool = True,
) -> Float[Tensor, "block block *batch"]:
    """`pattern_distance` between all pairs of blocks.

    Differences are formed entry by entry, not from norms and inner products, so that blocks at a
    fixed point have distance 0 and not the square root of a rounding error.

    Args:
        patterns: attention weights of every block, `[block, ..., head, dest, src]`.
        heads: as in `pattern_distance`.
        mask: True at real tokens, `[..., pos]` without a block axis; each row is sliced to them
            first.
        drop_bos: leave out the first real token, as query and as key; the rows are not rescaled.
        renormalize: divide each row by its sum after the slicing.
        validate: check the rows first (`check_pattern`).

    Returns:
        `[block, block, ...]`, non-negative, symmetric, 0 on the diagonal. All 0 for T = 1; NaN
        where no token is left.

    Raises:
        TypeError: `patterns` is not floating point or `mask` is not Bool.
        ValueError: unknown `heads`, a mask that does not fit, or a row that does not sum to 1.
    """
    _check_heads(heads)
    if patterns.ndim < 4:
        raise ValueError(
            f"patterns has shape {list(patterns.shape)}, expected [block, ..., head, dest, src]"
        )
    if validate:
        check_pattern(patterns, mask, renormalize=renormalize)

    def distances(span: Tensor) -> Tensor:
        span = span.to(statistic_dtype(span))
        if span.shape[-1] == 0:
            return span.new_full((*span.shape[:-3], span.shape[-4]), math.nan)
        if heads == "avg_pattern":
            span = span.mean(-3, keepdim=True)
        per_head = torch.stack([_frobenius_distances(head) for head in span.unbind(-3)], -1)
        return torch.linalg.vector_norm(per_head, dim=-1) if heads == "stack" else per_head.mean(-1)

    per_row = map_patterns(
        distances,
        [patterns.movedim(0, -4)],
        mask=mask,
        drop_bos=drop_bos,
        renormalize=renormalize,
        validate=False,
        core_ndim=4,
    )
    return per_row.movedim((-2, -1), (0, 1))


@full_precision
def pairwise_cosine(
    resids: Float[Tensor, "block *batch pos d_model"],
    mask: Bool[Tensor, "*#batch pos"] | None = None,
    *,
    drop_bos: bool = False,
) -> Float[Tensor, "block block *batch"]:
    """`cosine_similarity` between the residual streams of all pairs of blocks.

    Args:
        resids: residual stream at every block, `[block, ..., pos, d_model]`.
        mask: True at real tokens, `[..., pos]` without a block axis; each row is sliced to them
            first.
        drop_bos: leave out the first real token.

    Returns:
        `[block, block, ...]` in [-1, 1], 1 on the diagonal. T = 1 is defined. NaN in the row and
        the column of a block with a zero token, and where no token is left.

    Raises:
        TypeError: `resids` is not floating point or `mask` is not Bool.
        ValueError: `resids` has fewer than three axes, or the mask does not fit.
    """
    if resids.ndim < 3:
        raise ValueError(
            f"resids has shape {list(resids.shape)}, expected [block, ..., pos, d_model]"
        )

    def cosines(span: Tensor) -> Tensor:
        if drop_bos:
            span = span[..., 1:, :]
        n_tokens = span.shape[-2]
        unit = unit_vectors(span).flatten(-2)
        if n_tokens == 0:
            return unit.new_full((*unit.shape[:-1], unit.shape[-2]), math.nan)
        return (unit @ unit.mT / n_tokens).clamp(-1, 1)

    per_row = map_spans(cosines, [resids.movedim(0, -3)], mask, 3, position_dims=(-2,))
    return per_row.movedim((-2, -1), (0, 1))


def _check_heads(heads: str) -> None:
    if heads not in ("mean", "stack", "avg_pattern"):
        raise ValueError(f'got heads={heads!r}, expected "mean", "stack" or "avg_pattern"')


def _frobenius_distances(matrices: Tensor) -> Tensor:
    """Distances `[..., block, block]` between the matrices `[..., block, dest, src]`."""
    rows = matrices.transpose(-3, -2)
    per_row = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.linalg.vector_norm(per_row, dim=-3)
