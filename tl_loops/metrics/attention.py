"""Measurements on attention patterns `[..., head, dest, src]`: sinks, mixing, concentration.

All functions share four arguments.

- `mask` (Bool `[..., pos]`, True at real tokens, left or right padding, broadcasts over the batch
  axes): each row is sliced to its real tokens before anything is computed, so that padding never
  changes a number. T below is the number of real tokens, and position 0 the first of them.
- `drop_bos=True` leaves out the first real token, as query and as key. T is then one less. The
  rows keep the weight that is left; they are not rescaled.
- `renormalize=True` divides each row by its sum after the slicing. A row without any weight
  becomes NaN.
- `validate=False` skips the check of the rows (`check_pattern`), for patterns that were checked
  before.

Statistics are float32 (float64 for float64 patterns). Gradients flow, except through thresholds.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_loops.metrics.entropy import shannon_entropy
from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.patterns import map_patterns
from tl_loops.metrics.precision import full_precision


@full_precision
def sink_score(
    pattern: Float[Tensor, "*batch head dest src"],
    position: int = 0,
    norm: Literal["T", "visible"] = "T",
    *,
    mask: Bool[Tensor, "*#batch pos"] | None = None,
    drop_bos: bool = False,
    renormalize: bool = False,
    validate: bool = True,
) -> Float[Tensor, "*batch head"]:
    """Mean attention that one position receives, per head.

    score_k = (1/T) sum_t A_tk, arXiv 2604.11791 Eq. 16. `norm="visible"` divides column k by the T
    - k queries that can see it instead, as in arXiv 2410.10781; the two agree at k = 0. Short
    prompts look like sinks: uniform causal attention has score_0 = H_T / T (harmonic number),
    above 0.3 for T <= 9.

    Args:
        pattern: attention weights, rows sum to 1.
        position: the key position k, counted from the first real token.
        norm: `"T"` or `"visible"`; the latter requires a causal pattern.
        mask: True at real tokens; see the module.
        drop_bos: leave out the first real token; see the module.
        renormalize: rescale the rows that are left; see the module.
        validate: check the rows first.

    Returns:
        `[..., head]` in [0, 1]. NaN for T = 1, where the only token attends to itself.

    Raises:
        TypeError: `pattern` is not floating point or `mask` is not Bool.
        ValueError: unknown `norm`, `position` outside the real tokens of a row, a mask that does
            not fit, or a row that does not sum to 1 or (`norm="visible"`) is not causal.
    """
    if norm not in ("T", "visible"):
        raise ValueError(f'got norm={norm!r}, expected "T" or "visible"')

    def score(span: Tensor) -> Tensor:
        n_tokens = span.shape[-1]
        if not 0 <= position < max(n_tokens, 1):
            raise ValueError(
                f"got position={position}, expected 0 <= position < {n_tokens}, "
                "the number of tokens measured in a row"
            )
        if n_tokens < 2:
            return _nan_per_head(span)
        n_queries = n_tokens if norm == "T" else n_tokens - position
        return span[..., position].sum(-1, dtype=statistic_dtype(span)) / n_queries

    return map_patterns(
        score,
        [pattern],
        mask=mask,
        drop_bos=drop_bos,
        renormalize=renormalize,
        validate=validate,
        causal=norm == "visible",
    )


@full_precision
def sink_rate(
    pattern: Float[Tensor, "*batch head dest src"],
    threshold: float = 0.3,
    position: int = 0,
    strict: bool = False,
    norm: Literal["T", "visible"] = "T",
    *,
    mask: Bool[Tensor, "*#batch pos"] | None = None,
    drop_bos: bool = False,
    renormalize: bool = False,
    validate: bool = True,
) -> Float[Tensor, "*batch"]:
    """Fraction of heads whose sink score reaches a threshold.

    rate_k = (1/H) sum_h 1[score_k >= threshold], arXiv 2604.11791 Eq. 17. The threshold is applied
    per sequence and head; average rates over sequences, not scores. arXiv 2410.10781 uses
    `strict=True` and `norm="visible"`.

    Args:
        pattern: attention weights, rows sum to 1.
        threshold: tau of the paper.
        position: the key position k, counted from the first real token.
        strict: count scores > threshold instead of >=.
        norm: as in `sink_score`.
        mask: True at real tokens; see the module.
        drop_bos: leave out the first real token; see the module.
        renormalize: rescale the rows that are left; see the module.
        validate: check the rows first.

    Returns:
        `[...]` in [0, 1]; no gradient. NaN for T = 1.

    Raises:
        TypeError: see `sink_score`.
        ValueError: see `sink_score`.
    """
    with torch.no_grad():
        score = sink_score(
            pattern,
            position,
            norm,
            mask=mask,
            drop_bos=drop_bos,
            renormalize=renormalize,
            validate=validate,
        )
    is_sink = score > threshold if strict else score >= threshold
    return torch.where(score.isnan(), score, is_sink.to(score.dtype)).mean(-1)


@full_precision
def mixing_score(
    pattern: Float[Tensor, "*batch head dest src"],
    normalize: Literal["none", "log", "length", "row"] = "none",
    *,
    mask: Bool[Tensor, "*#batch pos"] | None = None,
    drop_bos: bool = False,
    renormalize: bool = False,
    validate: bool = True,
) -> Float[Tensor, "*batch head"]:
    """Mean entropy of the attention rows, per head.

    (1/T) sum_i H(A_i), arXiv 2604.11791 Eq. 18, in nats. It cannot tell a sink from an identity
    head: both give 0.

    Args:
        pattern: attention weights, rows sum to 1.
        normalize: `"none"`: Eq. 18, at most log(T!)/T for causal patterns. `"log"`: divided by log
            T. `"length"`: divided by T; by its range this is what the figures of arXiv 2604.11791
            show (an inference), never compare it across lengths. `"row"`: the entropy of the row
            that sees i keys is divided by log i and rows with one visible key are left out; 1 for
            uniform causal attention of any length, requires a causal pattern.
        mask: True at real tokens; see the module.
        drop_bos: leave out the first real token; see the module. Without `renormalize` a row adds
            its part -sum p log p over the keys that are left, which is not an entropy and not
            bounded by log T.
        renormalize: rescale the rows that are left; see the module.
        validate: check the rows first.

    Returns:
        `[..., head]`, non-negative; at most 1 for `"log"` and `"row"`. For T = 1, 0 with `"none"`
        and `"length"` (one row of entropy 0) and NaN with `"log"` and `"row"` (0/0). NaN where no
        token is left.

    Raises:
        TypeError: `pattern` is not floating point or `mask` is not Bool.
        ValueError: unknown `normalize`, a mask that does not fit, or a row that does not sum to 1
            or (`normalize="row"`) is not causal.
    """
    if normalize not in ("none", "log", "length", "row"):
        raise ValueError(f'got normalize={normalize!r}, expected "none", "log", "length" or "row"')

    def score(span: Tensor) -> Tensor:
        n_tokens = span.shape[-1]
        if n_tokens < 2 and normalize in ("log", "row"):
            return _nan_per_head(span)
        row_entropy = shannon_entropy(span.to(statistic_dtype(span)))
        if normalize == "row":
            n_visible = torch.arange(2, n_tokens + 1, device=span.device, dtype=row_entropy.dtype)
            return (row_entropy[..., 1:] / n_visible.log()).mean(-1)
        mean = row_entropy.mean(-1)
        if normalize == "log":
            return mean / math.log(n_tokens)
        return mean / n_tokens if normalize == "length" else mean

    return map_patterns(
        score,
        [pattern],
        mask=mask,
        drop_bos=drop_bos,
        renormalize=renormalize,
        validate=validate,
        causal=normalize == "row",
    )


@full_precision
def colsum_concentration(
    pattern: Float[Tensor, "*batch head dest src"],
    *,
    mask: Bool[Tensor, "*#batch pos"] | None = None,
    drop_bos: bool = False,
    renormalize: bool = False,
    validate: bool = True,
) -> Float[Tensor, "*batch head"]:
    """How much the attention of all queries gathers on few keys, per head.

    C = 1 + (1/log T) sum_j q_j log q_j with the share q_j = c_j / sum_j c_j of the column sums c_j
    = sum_i A_ij, arXiv 2604.11791 Sec. 2.2 (the shares there are c_j / T, which is the same where
    rows sum to 1). It does not depend on which position is the sink. The causal mask alone gives C
    above 0: 0.097 for uniform causal attention at T = 64.

    Args:
        pattern: attention weights, rows sum to 1.
        mask: True at real tokens; see the module.
        drop_bos: leave out the first real token; see the module. The shares are those of the
            weight that is left.
        renormalize: rescale the rows that are left; see the module.
        validate: check the rows first.

    Returns:
        `[..., head]` in [0, 1] up to rounding: 0 when all keys receive the same, 1 when one key
        receives everything. NaN for T = 1 and where no weight is left.

    Raises:
        TypeError: `pattern` is not floating point or `mask` is not Bool.
        ValueError: a mask that does not fit, or a row that does not sum to 1.
    """

    def concentration(span: Tensor) -> Tensor:
        n_tokens = span.shape[-1]
        if n_tokens < 2:
            return _nan_per_head(span)
        column_sum = span.sum(-2, dtype=statistic_dtype(span))
        share = column_sum / column_sum.sum(-1, keepdim=True)
        return 1 - shannon_entropy(share) / math.log(n_tokens)

    return map_patterns(
        concentration,
        [pattern],
        mask=mask,
        drop_bos=drop_bos,
        renormalize=renormalize,
        validate=validate,
    )


@full_precision
def diagonal_score(
    pattern: Float[Tensor, "*batch head dest src"],
    *,
    mask: Bool[Tensor, "*#batch pos"] | None = None,
    drop_bos: bool = False,
    renormalize: bool = False,
    validate: bool = True,
) -> Float[Tensor, "*batch head"]:
    """Mean attention of a token to itself, per head: the mean of A_ii over i >= 1.

    The first token is left out because under a causal mask it can only attend to itself.

    Args:
        pattern: attention weights, rows sum to 1.
        mask: True at real tokens; see the module.
        drop_bos: leave out the first real token; see the module.
        renormalize: rescale the rows that are left; see the module.
        validate: check the rows first.

    Returns:
        `[..., head]` in [0, 1]: 1 for an identity head, (H_T - 1)/(T - 1) for uniform causal
        attention, with the harmonic number H_T. NaN for T = 1.

    Raises:
        TypeError: `pattern` is not floating point or `mask` is not Bool.
        ValueError: a mask that does not fit, or a row that does not sum to 1.
    """
    return map_patterns(
        _mean_diagonal,
        [pattern],
        mask=mask,
        drop_bos=drop_bos,
        renormalize=renormalize,
        validate=validate,
    )


@full_precision
def previous_token_score(
    pattern: Float[Tensor, "*batch head dest src"],
    *,
    mask: Bool[Tensor, "*#batch pos"] | None = None,
    drop_bos: bool = False,
    renormalize: bool = False,
    validate: bool = True,
) -> Float[Tensor, "*batch head"]:
    """Mean attention of a token to the one before it, per head: the mean of A_{i,i-1} over i >= 1.

    Args:
        pattern: attention weights, rows sum to 1.
        mask: True at real tokens; see the module.
        drop_bos: leave out the first real token; see the module.
        renormalize: rescale the rows that are left; see the module.
        validate: check the rows first.

    Returns:
        `[..., head]` in [0, 1]: 1 for a previous-token head. NaN for T = 1.

    Raises:
        TypeError: `pattern` is not floating point or `mask` is not Bool.
        ValueError: a mask that does not fit, or a row that does not sum to 1.
    """

    def score(span: Tensor) -> Tensor:
        return span.diagonal(-1, -2, -1).to(statistic_dtype(span)).mean(-1)

    return map_patterns(
        score,
        [pattern],
        mask=mask,
        drop_bos=drop_bos,
        renormalize=renormalize,
        validate=validate,
    )


@full_precision
def sink_identity_index(
    pattern: Float[Tensor, "*batch head dest src"],
    *,
    mask: Bool[Tensor, "*#batch pos"] | None = None,
    drop_bos: bool = False,
    renormalize: bool = False,
    validate: bool = True,
) -> Float[Tensor, "*batch head"]:
    """Where a head stands between a sink on the first token and an identity head.

    (s - d)/(s + d) with s the mean of A_i0 and d the mean of A_ii over i >= 1. This index is
    defined here, not in a paper; it puts a number on the phase in which heads switch from sinks to
    identity (arXiv 2510.06477).

    Args:
        pattern: attention weights, rows sum to 1.
        mask: True at real tokens; see the module.
        drop_bos: leave out the first real token; see the module.
        renormalize: rescale the rows that are left; see the module.
        validate: check the rows first.

    Returns:
        `[..., head]` in [-1, 1]: 1 for a pure sink, -1 for identity, 0 for uniform causal
        attention. NaN for T = 1 and where a head puts no weight on either.

    Raises:
        TypeError: `pattern` is not floating point or `mask` is not Bool.
        ValueError: a mask that does not fit, or a row that does not sum to 1.
    """

    def index(span: Tensor) -> Tensor:
        if span.shape[-1] < 2:
            return _nan_per_head(span)
        s = span[..., 1:, 0].to(statistic_dtype(span)).mean(-1)
        d = _mean_diagonal(span)
        return (s - d) / (s + d)

    return map_patterns(
        index,
        [pattern],
        mask=mask,
        drop_bos=drop_bos,
        renormalize=renormalize,
        validate=validate,
    )


def _mean_diagonal(span: Tensor) -> Tensor:
    """Mean of A_ii over i >= 1; NaN where there is none."""
    return span.diagonal(0, -2, -1)[..., 1:].to(statistic_dtype(span)).mean(-1)


def _nan_per_head(span: Tensor) -> Tensor:
    """NaN in the shape `[..., head]`, for spans too short to be measured."""
    return span.new_full(span.shape[:-2], math.nan, dtype=statistic_dtype(span))
