"""The shape of a set of representations: likeness of two sets, curvature, anisotropy, spectra.

`mask` slices each prompt to its real tokens, as everywhere.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_loops.metrics.entropy import shannon_entropy
from tl_loops.metrics.padding import map_spans, statistic_dtype
from tl_loops.metrics.precision import full_precision
from tl_loops.metrics.residual import unit_vectors


@full_precision
def linear_cka(x: Float[Tensor, "token d_x"], y: Float[Tensor, "_ d_y"]) -> float:
    """Linear centred kernel alignment of two representations of the same tokens.

    ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) of the centred matrices (Kornblith et al. 2019, arXiv
    1905.00414). Invariant to rotations, to one scale, and to shifts of either. Worked in float64.

    Args:
        x: `[token, d_x]`.
        y: `[token, d_y]`, of another width where that is so.

    Returns:
        In [0, 1]; NaN with fewer than two tokens or where one of them does not vary.

    Raises:
        ValueError: If the numbers of tokens differ.
    """
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"{x.shape[0]} and {y.shape[0]} tokens; expected the same ones")
    a, b = (v.double() - v.double().mean(0) for v in (x, y))
    return alignment(b.T @ a, a.T @ a, b.T @ b)


def alignment(
    cross: Float[Tensor, "d_y d_x"], of_x: Float[Tensor, "d_x d_x"], of_y: Float[Tensor, "d_y d_y"]
) -> float:
    """Linear centred kernel alignment from Y^T X, X^T X and Y^T Y of the centred matrices.

    Args:
        cross: `[d_y, d_x]`.
        of_x: `[d_x, d_x]`.
        of_y: `[d_y, d_y]`.

    Returns:
        In [0, 1]; NaN where one of the two does not vary.
    """
    both = float(of_x.norm()) * float(of_y.norm())
    return min(float(cross.square().sum()) / both, 1.0) if both > 0 else math.nan


@full_precision
def token_curvature(
    resid: Float[Tensor, "*batch pos d_model"],
    mask: Bool[Tensor, "*#batch pos"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Mean angle between successive steps along the text, in radians.

    mean over k of arccos(v_{k+1} . v_k / (||v_{k+1}|| ||v_k||)) with v_k = x_{k+1} - x_k along
    positions (arXiv 2602.11451).

    Args:
        resid: residual stream.
        mask: True at real tokens; see the module.

    Returns:
        `[...]` in [0, pi]: 0 for tokens on a line, pi / 2 on average for independent steps, 2 pi /
        3 for independent tokens. Equal neighbours are left out; NaN for fewer than three tokens.

    Raises:
        TypeError: If `resid` is not floating point or `mask` is not Bool.
        ValueError: If the mask does not fit.
    """
    dtype = statistic_dtype(resid)

    def mean_angle(span: Tensor) -> Tensor:
        steps = span.to(dtype).diff(dim=-2)
        moves, v = (steps != 0).any(-1), unit_vectors(steps)
        before, after = v[..., :-1, :], v[..., 1:, :]
        counted = moves[..., :-1] & moves[..., 1:]
        # atan2 keeps its precision near 0 and pi, where arccos loses half of the digits.
        angle = 2 * torch.atan2((after - before).norm(dim=-1), (after + before).norm(dim=-1))
        return torch.where(counted, angle, 0.0).sum(-1) / counted.sum(-1)

    return map_spans(mean_angle, [resid], mask, 2, position_dims=(-2,))


@full_precision
def anisotropy(
    resid: Float[Tensor, "*batch pos d_model"],
    mask: Bool[Tensor, "*#batch pos"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Mean cosine between all pairs of different tokens.

    (||sum u||^2 - T) / (T (T - 1)) with u the tokens scaled to length 1 (after Ethayarajh 2019,
    arXiv 1909.00512).

    Args:
        resid: residual stream.
        mask: True at real tokens; see the module.

    Returns:
        `[...]` in [-1 / (T - 1), 1]: 0 for directions spread evenly, 1 where all tokens point the
        same way. NaN for one token, or where a token is zero.

    Raises:
        TypeError: If `resid` is not floating point or `mask` is not Bool.
        ValueError: If the mask does not fit.
    """

    def mean_cosine(span: Tensor) -> Tensor:
        n = span.shape[-2]
        squared = unit_vectors(span.double()).sum(-2).square().sum(-1)
        mean = (squared - n) / (n * (n - 1)) if n > 1 else torch.full_like(squared, math.nan)
        return mean.clamp(max=1.0).to(statistic_dtype(resid))

    return map_spans(mean_cosine, [resid], mask, 2, position_dims=(-2,))


@full_precision
def rank_of_spectrum(
    singular_values: Float[Tensor, "*batch value"],
) -> Float[Tensor, "*batch"]:
    """Effective rank: exp of the entropy of the shares sigma_j^2 / sum sigma^2 of a spectrum.

    `effective_rank` of the matrix that has these singular values (Roy and Vetterli 2007, with
    squared singular values).

    Args:
        singular_values: `[..., value]`, >= 0, in any order.

    Returns:
        `[...]` in [1, number of values]; NaN where all are zero.
    """
    squares = singular_values.double().square()
    p = squares / squares.sum(-1, keepdim=True)
    return shannon_entropy(p).exp().to(statistic_dtype(singular_values))


@full_precision
def rank_for_share(
    singular_values: Float[Tensor, "*batch value"], share: float | int = 0.99
) -> Float[Tensor, "*batch"]:
    """The fewest directions that hold a share of the squared length, from a spectrum.

    Args:
        singular_values: `[..., value]`, >= 0, in any order.
        share: in (0, 1].

    Returns:
        `[...]`, a whole number of at least 1; NaN where all are zero.

    Raises:
        ValueError: If `share` is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}; expected 0 < share <= 1")
    squares = singular_values.double().square().sort(-1, descending=True).values
    total = squares.sum(-1, keepdim=True)
    # Rounding must not ask for one direction more.
    missing = squares.cumsum(-1) < share * total * (1 - 1e-12)
    n = missing.sum(-1) + 1.0
    return torch.where(total.squeeze(-1) > 0, n, math.nan).to(statistic_dtype(singular_values))
