"""How faithful and how alike lenses are: pure functions of logits, predictions and Jacobians."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.precision import full_precision


@checked
@full_precision
def transport_similarity(
    jacobians: Float[Tensor, "point out d_model"],
) -> Float[Tensor, "point point"]:
    """Cosine between the Jacobians of every two points, as vectors.

    For one layer at several iterations: near 1 where the fit of one iteration serves all.

    Args:
        jacobians: [point, out, d_model], for example ``JacobianLens.jacobians``.

    Returns:
        [point, point] in [-1, 1]; NaN where a Jacobian is zero.

    Source: 2609.01924 (per-loop transports).
    """
    flat = jacobians.to(statistic_dtype(jacobians)).flatten(1)
    unit = flat / flat.norm(dim=1, keepdim=True)
    return (unit @ unit.T).clamp(-1.0, 1.0)


@checked
@full_precision
def singular_value_participation(
    matrix: Float[Tensor, "*batch out d_model"],
) -> Float[Tensor, "*batch"]:
    """Effective rank of a map: (sum of singular values)² / sum of their squares.

    Public as ``tl_loops.lens.participation_ratio``. It weighs the singular values themselves;
    ``tl_loops.metrics.participation_ratio``, of tokens, weighs their squares and is never larger.

    Args:
        matrix: [..., out, d_model].

    Returns:
        [...], from 1 (rank one) to min(out, d_model); NaN for a zero matrix and for
        one that is not finite.
    """
    x = matrix.to(statistic_dtype(matrix))
    finite = x.isfinite().all(-1).all(-1)
    s = torch.linalg.svdvals(torch.where(finite[..., None, None], x, 0.0))
    return s.sum(-1).square() / s.square().sum(-1)


@checked
@full_precision
def logit_kurtosis(
    logits: Float[Tensor, "*batch d_vocab"], vocab_size: int | None = None
) -> Float[Tensor, "*batch"]:
    """Excess kurtosis of the logits over the vocabulary: how few tokens stand out.

    Args:
        logits: [..., d_vocab].
        vocab_size: Ids from here on are padding; ``None``: none are.

    Returns:
        [...], at least -2, 0 for normal logits (population moments, minus 3); NaN where all logits
        are equal.

    Raises:
        ValueError: ``vocab_size`` is below 1 or above the number of logits.
    """
    size = logits.shape[-1]
    if vocab_size is not None and not 1 <= vocab_size <= size:
        raise ValueError(f"vocab_size must be 1 to the {size} logits, got {vocab_size}")
    x = logits[..., :vocab_size].to(statistic_dtype(logits))
    z = x - x.mean(-1, keepdim=True)
    return z.pow(4).mean(-1) / z.square().mean(-1).square() - 3.0


@checked
@full_precision
def adjacent_agreement(predictions: Int[Tensor, "*batch pos"]) -> Float[Tensor, "*batch"]:
    """Fraction of neighbouring positions with one and the same top token.

    Args:
        predictions: [..., pos], for example ``LensResult.predictions`` read at all positions.

    Returns:
        [...] in [0, 1]; NaN for a single position.
    """
    return (predictions[..., 1:] == predictions[..., :-1]).float().mean(-1)
