"""Measurements on the residual stream `[..., pos, d_model]`: size, direction, spectral entropy.

`mask` (Bool `[..., pos]`, True at real tokens, left or right padding, broadcasts over the batch
axes) slices each row to its real tokens before anything is computed, so that padding never changes
a number. T below is the number of real tokens. `drop_bos=True` leaves out the first of them.
Results are float32 (float64 for float64 input).
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_loops.metrics.entropy import shannon_entropy
from tl_loops.metrics.padding import map_spans, statistic_dtype
from tl_loops.metrics.precision import full_precision


@full_precision
def residual_entropy(
    resid: Float[Tensor, "*batch pos d_model"],
    alpha: float | int = 1,
    center: bool = False,
    row_norm: bool = False,
    normalize: Literal["none", "log_T", "log_min"] = "none",
    base: Literal["e"] | float | int = "e",
    mask: Bool[Tensor, "*#batch pos"] | None = None,
    *,
    drop_bos: bool = False,
) -> Float[Tensor, "*batch"]:
    """Matrix-based entropy of the token representations of each sequence.

    The Renyi entropy S_alpha of p_j = sigma_j^2 / ||X||_F^2, with the singular values sigma_j of X
    = resid. The defaults (alpha = 1, raw X) are the von Neumann entropy of arXiv 2510.06477, which
    arXiv 2604.11791 uses; `alpha`, `center`, `row_norm` and the normalisations follow arXiv
    2502.02013, without the clamping of negative Gram entries in its code. `center` and `row_norm`
    remove massive activations and with them the compression that the entropy is meant to show.

    p are the eigenvalues of the smaller Gram matrix in float64: one token that is 10^4 times
    longer than the others leaves p_j near 1e-8, which a float32 Gram matrix cannot resolve.

    Args:
        resid: residual stream.
        alpha: order, positive; 1 is Shannon's, 2 the collision entropy.
        center: subtract the mean over tokens first.
        row_norm: scale each token to length 1 first (after centring); a zero token stays zero.
        normalize: `"log_T"` divides by log T, `"log_min"` by log min(T, d_model), the largest
            possible value.
        base: of the logarithm: `"e"` for nats, 2 for bits. It has no effect on normalised values.
        mask: True at real tokens; see the module.
        drop_bos: leave out the first real token.

    Returns:
        `[...]` in [0, log min(T, d_model)]: 0 for rank 1, log T for T orthogonal tokens of equal
        length. T = 1 gives 0, and NaN when normalised. A zero token changes nothing but T. NaN if
        all tokens are zero (or equal, with `center`), if none is left, or if a value is not
        finite.

    Raises:
        TypeError: `resid` is not floating point or `mask` is not Bool.
        ValueError: unknown `normalize`, bad `alpha` or `base`, or a mask that does not fit.
    """
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"got alpha={alpha!r}, expected a positive finite order")
    log_base = _log_base(base)
    _check_normalize(normalize)
    dtype = statistic_dtype(resid)

    def entropy(span: Tensor) -> Tensor:
        if drop_bos:
            span = span[..., 1:, :]
        if span.shape[-2] == 0:
            return span.new_full(span.shape[:-2], math.nan, dtype=dtype)
        p = _spectrum(span, center, row_norm)
        if alpha == 1:
            nats = shannon_entropy(p)
        else:
            # 0^alpha = 0; NaN stays NaN, and the gradient at 0 is finite.
            powers = torch.where(p == 0, 1.0, p) ** alpha * (p != 0)
            nats = powers.sum(-1).log() / (1 - alpha)
        scaled = _scale(nats, normalize, log_base, *span.shape[-2:])
        return scaled.to(dtype).to(resid.device)

    return map_spans(entropy, [resid], mask, 2, position_dims=(-2,))


@full_precision
def effective_rank(
    resid: Float[Tensor, "*batch pos d_model"],
    center: bool = False,
    row_norm: bool = False,
    mask: Bool[Tensor, "*#batch pos"] | None = None,
    *,
    drop_bos: bool = False,
) -> Float[Tensor, "*batch"]:
    """Exponential of the residual entropy: how many equal directions have the same entropy.

    Args:
        resid: residual stream.
        center: subtract the mean over tokens first.
        row_norm: scale each token to length 1 first.
        mask: True at real tokens; see the module.
        drop_bos: leave out the first real token.

    Returns:
        `[...]` in [1, min(T, d_model)]. T = 1 gives 1. NaN where `residual_entropy` is.

    Raises:
        TypeError: see `residual_entropy`.
        ValueError: see `residual_entropy`.
    """
    return residual_entropy(
        resid, 1, center=center, row_norm=row_norm, mask=mask, drop_bos=drop_bos
    ).exp()


@full_precision
def participation_ratio(
    resid: Float[Tensor, "*batch pos d_model"],
    center: bool = False,
    row_norm: bool = False,
    mask: Bool[Tensor, "*#batch pos"] | None = None,
    *,
    drop_bos: bool = False,
) -> Float[Tensor, "*batch"]:
    """(sum_j sigma_j^2)^2 / sum_j sigma_j^4: the exponential of the residual entropy of order 2.

    It weighs the squares of the singular values (of tokens); `tl_loops.lens.participation_ratio`,
    of a lens's map, weighs the singular values themselves.

    Args:
        resid: residual stream.
        center: subtract the mean over tokens first; this is the participation ratio of the
            covariance.
        row_norm: scale each token to length 1 first.
        mask: True at real tokens; see the module.
        drop_bos: leave out the first real token.

    Returns:
        `[...]` in [1, min(T, d_model)], at most the effective rank. T = 1 gives 1. NaN where
        `residual_entropy` is.

    Raises:
        TypeError: see `residual_entropy`.
        ValueError: see `residual_entropy`.
    """
    return residual_entropy(
        resid, 2, center=center, row_norm=row_norm, mask=mask, drop_bos=drop_bos
    ).exp()


@full_precision
def residual_entropy_bound(
    resid: Float[Tensor, "*batch pos d_model"],
    normalize: Literal["none", "log_T", "log_min"] = "none",
    base: Literal["e"] | float | int = "e",
    mask: Bool[Tensor, "*#batch pos"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Upper bound on `residual_entropy` from the size and direction of the first token alone.

    arXiv 2510.06477, Theorem 1 and Corollary 2. With M = ||x_0||^2, R = sum_{i>0} ||x_i||^2, c =
    M/R and a the mean of cos^2(x_i, x_0) over i > 0 with weights ||x_i||^2, a share p = (c + a)/(c
    + 1) of ||X||_F^2 lies along x_0, so that H <= h(p) + (1 - p) log(r - 1) with the binary
    entropy h and r = min(T, d_model). It holds for every X, since the entropy of a diagonal bounds
    that of the eigenvalues; it is tight when the first token is massive. Compare it with the
    entropy of the raw residual (alpha = 1, not centred).

    Args:
        resid: residual stream.
        normalize: as in `residual_entropy`.
        base: as in `residual_entropy`.
        mask: True at real tokens; see the module.

    Returns:
        `[...]` in [0, log min(T, d_model)]. T = 1 gives 0, and NaN when normalised. NaN if the
        first token is zero or a value is not finite.

    Raises:
        TypeError: `resid` is not floating point or `mask` is not Bool.
        ValueError: unknown `normalize`, bad `base`, or a mask that does not fit.
    """
    log_base = _log_base(base)
    _check_normalize(normalize)
    dtype = statistic_dtype(resid)

    def bound(span: Tensor) -> Tensor:
        x = _to_float64(span)
        u = x[..., :1, :] / x[..., :1, :].norm(dim=-1, keepdim=True)
        p = ((x * u).sum(-1).square().sum(-1) / x.square().sum((-2, -1))).clamp(max=1)
        r = min(span.shape[-2:])
        nats = shannon_entropy(torch.stack([p, 1 - p], -1)) + (1 - p) * math.log(max(r - 1, 1))
        scaled = _scale(nats, normalize, log_base, *span.shape[-2:])
        return scaled.to(dtype).to(resid.device)

    return map_spans(bound, [resid], mask, 2, position_dims=(-2,))


@full_precision
def residual_norm(
    resid: Float[Tensor, "*batch pos d_model"],
    agg: Literal["token_mean", "token_max", "fro", "none"] = "token_mean",
    rms: bool = False,
    mask: Bool[Tensor, "*#batch pos"] | None = None,
    *,
    drop_bos: bool = False,
) -> Float[Tensor, "..."]:
    """Length of the residual stream.

    The residual magnitudes of arXiv 2604.11791 Fig. 9, which does not say how tokens are pooled.

    Args:
        resid: residual stream.
        agg: `"token_mean"`: L2 norm per token, then the mean over tokens; `"token_max"`: the
            largest of them; `"fro"`: Frobenius norm of the `[pos, d_model]` matrix; `"none"`: L2
            norm per token.
        rms: divide by sqrt(d_model), to compare models of different width.
        mask: True at real tokens; see the module.
        drop_bos: leave out the first real token.

    Returns:
        `[...]`, or `[..., pos]` for `"none"`; non-negative. T = 1 is defined. A zero token counts
        as 0. NaN (for `"fro"` too) where no token is left.

    Raises:
        TypeError: `resid` is not floating point or `mask` is not Bool.
        ValueError: unknown `agg`, a mask that does not fit, or `mask` or `drop_bos` with
            `agg="none"`.
    """
    _check_agg(agg, ("token_mean", "token_max", "fro", "none"), mask, drop_bos)
    scale = resid.shape[-1] ** -0.5 if rms else 1.0

    def token_norm(span: Tensor) -> Tensor:
        return torch.linalg.vector_norm(span, dim=-1, dtype=statistic_dtype(span)) * scale

    def norm(span: Tensor) -> Tensor:
        per_token = token_norm(span[..., 1:, :] if drop_bos else span)
        if agg == "token_mean" or per_token.shape[-1] == 0:
            return per_token.mean(-1)
        if agg == "token_max":
            return per_token.amax(-1)
        return torch.linalg.vector_norm(per_token, dim=-1)

    if agg == "none":
        return token_norm(resid)
    return map_spans(norm, [resid], mask, 2, position_dims=(-2,))


@full_precision
def cosine_similarity(
    a: Float[Tensor, "*#batch pos d_model"],
    b: Float[Tensor, "*#batch pos d_model"],
    agg: Literal["token_mean", "none"] = "token_mean",
    mask: Bool[Tensor, "*#batch pos"] | None = None,
    *,
    drop_bos: bool = False,
) -> Float[Tensor, "..."]:
    """Cosine between two residual streams: per token, then the mean over tokens.

    Args:
        a: residual stream.
        b: residual stream of the same positions; the batch axes broadcast.
        agg: `"token_mean"`, or `"none"` for the cosine of each token.
        mask: True at real tokens; see the module.
        drop_bos: leave out the first real token.

    Returns:
        `[...]`, or `[..., pos]` for `"none"`; in [-1, 1]. T = 1 is defined. A zero token has no
        direction: NaN for the token, and for the mean of a sequence that has one. NaN where no
        token is left.

    Raises:
        TypeError: `a` or `b` is not floating point or `mask` is not Bool.
        ValueError: shapes that do not fit, unknown `agg`, a mask that does not fit, or `mask` or
            `drop_bos` with `agg="none"`.
    """
    _check_agg(agg, ("token_mean", "none"), mask, drop_bos)
    shapes = f"got shapes {list(a.shape)} and {list(b.shape)}"
    if a.shape[-2:] != b.shape[-2:]:
        raise ValueError(f"{shapes}, expected the same positions and d_model")
    try:
        a, b = torch.broadcast_tensors(a, b)
    except RuntimeError:
        raise ValueError(f"{shapes}, expected batch axes that broadcast") from None

    def token_cosine(a: Tensor, b: Tensor) -> Tensor:
        return (unit_vectors(a) * unit_vectors(b)).sum(-1).clamp(-1, 1)

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        if drop_bos:
            a, b = a[..., 1:, :], b[..., 1:, :]
        return token_cosine(a, b).mean(-1)

    if agg == "none":
        return token_cosine(a, b)
    return map_spans(cosine, [a, b], mask, 2, position_dims=(-2,))


def unit_vectors(vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """Scale vectors to length 1.

    Args:
        vectors: `[..., d_model]`.

    Returns:
        `[..., d_model]`, float32 (float64 for float64 input); NaN for a zero vector.

    Raises:
        TypeError: `vectors` is not floating point.
        ValueError: there are no entries, so that there is no direction.
    """
    vectors = vectors.to(statistic_dtype(vectors))
    if not vectors.shape[-1]:
        raise ValueError(f"got vectors without entries, of shape {list(vectors.shape)}")
    # Largest entry first: the squares of very small or large entries would leave the range.
    vectors = vectors / vectors.detach().abs().amax(-1, keepdim=True)
    return vectors / vectors.norm(dim=-1, keepdim=True)


def _spectrum(span: Tensor, center: bool, row_norm: bool) -> Tensor:
    """Shares sigma_j^2 / ||X||_F^2 in float64, `[..., min(T, d_model)]`; NaN where undefined."""
    x = _to_float64(span)
    n_tokens, d_model = x.shape[-2:]
    eps = torch.finfo(torch.float64).eps
    if center:
        largest = x.detach().norm(dim=-1, keepdim=True).amax(-2, keepdim=True)
        x = x - x.mean(-2, keepdim=True)
        # A token equal to the mean leaves a rounding error, which must not count as a direction.
        is_rounding = x.detach().norm(dim=-1, keepdim=True) <= n_tokens * eps * largest
        x = torch.where(is_rounding, 0.0, x)
    if row_norm:
        norm = x.norm(dim=-1, keepdim=True)
        x = x / torch.where(norm == 0, 1.0, norm)
    gram = x @ x.mT if n_tokens <= d_model else x.mT @ x
    # The eigenvalue solver fails on values that are not finite; zeros give NaN = 0/0 below.
    gram = torch.where(gram.isfinite().all(-1).all(-1)[..., None, None], gram, 0.0)
    eigenvalues = torch.linalg.eigvalsh(gram)
    # Below its rounding error an eigenvalue may come out negative, and small orders would count it.
    resolution = gram.shape[-1] * eps * eigenvalues[..., -1:].detach()
    eigenvalues = torch.where(eigenvalues > resolution, eigenvalues, 0.0)
    return eigenvalues / eigenvalues.sum(-1, keepdim=True)


def _to_float64(span: Tensor) -> Tensor:
    """Cast to float64; on the CPU for devices that have no float64."""
    return (span.cpu() if span.device.type == "mps" else span).double()


def _scale(nats: Tensor, normalize: str, log_base: float, n_tokens: int, d_model: int) -> Tensor:
    """Entropy in the unit that was asked for; NaN where log T or log min(T, d_model) is 0."""
    if normalize == "none":
        return nats / log_base
    n = n_tokens if normalize == "log_T" else min(n_tokens, d_model)
    return nats / math.log(n) if n > 1 else nats * math.nan


def _log_base(base: float | int | str) -> float:
    if base == "e":
        return 1.0
    if isinstance(base, str) or not (base > 0 and base != 1 and math.isfinite(base)):
        raise ValueError(f'got base={base!r}, expected "e" or a positive number other than 1')
    return math.log(base)


def _check_normalize(normalize: str) -> None:
    if normalize not in ("none", "log_T", "log_min"):
        raise ValueError(f'got normalize={normalize!r}, expected "none", "log_T" or "log_min"')


def _check_agg(agg: str, allowed: tuple[str, ...], mask: Tensor | None, drop_bos: bool) -> None:
    if agg not in allowed:
        raise ValueError(f"got agg={agg!r}, expected one of {', '.join(map(repr, allowed))}")
    if agg == "none" and (mask is not None or drop_bos):
        raise ValueError(
            'mask and drop_bos select the tokens of a mean; with agg="none" select from the result'
        )
