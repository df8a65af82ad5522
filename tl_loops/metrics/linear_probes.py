"""Linear probes: ridge or logistic regression to labels, and how well they do."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.metrics.precision import full_precision

Fit = Literal["ridge", "logistic"]

_NOISE = 1e-6
"""A feature that varies less than this, relative to its size, is constant but for rounding."""


@full_precision
def fit_linear_probes(
    features: Float[Tensor, "sample width"],
    labels: Int[Tensor, "set sample"],
    n_classes: int,
    fit: Fit = "ridge",
    ridge: float = 0.01,
    n_steps: int = 500,
) -> tuple[Float[Tensor, "set class width"], Float[Tensor, "set class"]]:
    """Weights and biases of one linear probe for each set of labels of the same samples.

    Features are standardised by the samples, z = (x - mean) / std, and the probe is given for the
    features as they came: a score is x . weight + bias, and the largest names the class. A feature
    that does not vary has weight 0. All in float64, without any random start.

    Args:
        features: the samples.
        labels: a class of each sample, 0 to `n_classes` - 1, one row per probe.
        n_classes: number of classes.
        fit: `"ridge"`: least squares to one-hot targets, mean over samples of ||y - W z - b||^2 +
            ridge ||W||^2, in closed form, one factorisation for all sets. `"logistic"`: mean
            cross-entropy + ridge / 2 ||W||^2, by L-BFGS from zero.
        ridge: L2 penalty, above 0.
        n_steps: most steps of `"logistic"`.
    """
    x = features.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    varies = std > _NOISE * x.square().mean(0).sqrt()
    scale = torch.where(varies, 1 / torch.where(varies, std, 1.0), 0.0)
    z = (x - mean) * scale
    solve = _ridge if fit == "ridge" else _logistic
    weight, bias = solve(z, labels, n_classes, ridge, n_steps)
    weight = weight * scale
    return weight, bias - weight @ mean


def _ridge(
    z: Tensor, labels: Tensor, n_classes: int, ridge: float, n_steps: int
) -> tuple[Tensor, Tensor]:
    """Closed form, by the smaller of the two systems of equations."""
    n, width = z.shape
    target = F.one_hot(labels, n_classes).to(z.dtype)  # [set, sample, class]
    bias = target.mean(1)
    target = (target - bias.unsqueeze(1)).transpose(0, 1).reshape(n, -1)
    penalty = n * ridge
    if width <= n:
        gram = z.T @ z + penalty * torch.eye(width, dtype=z.dtype, device=z.device)
        weight = torch.cholesky_solve(z.T @ target, torch.linalg.cholesky(gram))
    else:
        gram = z @ z.T + penalty * torch.eye(n, dtype=z.dtype, device=z.device)
        weight = z.T @ torch.cholesky_solve(target, torch.linalg.cholesky(gram))
    return weight.T.reshape(*labels.shape[:1], n_classes, width), bias


def _logistic(
    z: Tensor, labels: Tensor, n_classes: int, ridge: float, n_steps: int
) -> tuple[Tensor, Tensor]:
    """One set of labels after the other."""
    weights, biases = [], []
    for row in labels:
        with torch.inference_mode(False):
            weight, bias = z.new_zeros(n_classes, z.shape[1]), z.new_zeros(n_classes)
        minimise_logistic_loss(weight, bias, z, row, ridge, n_steps)
        weights.append(weight.detach())
        biases.append(bias.detach())
    return torch.stack(weights), torch.stack(biases)


def minimise_logistic_loss(
    weight: Float[Tensor, "class width"],
    bias: Float[Tensor, "class"],
    features: Float[Tensor, "sample width"],
    labels: Int[Tensor, "sample"],
    ridge: float,
    n_steps: int,
) -> None:
    """Minimise mean cross-entropy + ridge / 2 ||weight||^2 in place, by L-BFGS on all samples."""
    with torch.inference_mode(False), torch.enable_grad():
        # A tensor made in inference mode cannot be trained on.
        features, labels = features.clone(), labels.clone()
        weight.requires_grad_()
        bias.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=n_steps,
            history_size=20,
            tolerance_grad=1e-6,
            tolerance_change=1e-8,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(F.linear(features, weight, bias), labels)
            value = value + ridge / 2 * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)


def wilson_interval(
    share: Float[Tensor, "*batch"], n: int, confidence: float = 0.95
) -> Float[Tensor, "*batch 2"]:
    """Wilson's confidence interval of a share of n independent samples.

    (p + z^2 / 2n ± z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), with z the two-sided normal
    quantile (Wilson 1927). Unlike p ± z sqrt(p (1 - p) / n) it has a width at 0 and 1.

    Args:
        share: in [0, 1].
        n: number of samples.
        confidence: in (0, 1).

    Returns:
        Lower and upper end, in [0, 1].
    """
    z = math.sqrt(2) * float(torch.special.erfinv(torch.tensor(confidence, dtype=torch.float64)))
    p = share.double()
    middle = p + z * z / (2 * n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)).sqrt()
    return (torch.stack([middle - half, middle + half], -1) / (1 + z * z / n)).clamp(0.0, 1.0)


def area_under_roc(
    positive: Float[Tensor, "*batch n_positive"], negative: Float[Tensor, "*batch n_negative"]
) -> Float[Tensor, "*batch"]:
    """Chance that a positive sample scores higher than a negative one, ties counted half.

    Args:
        positive: scores of the positive samples.
        negative: scores of the negative ones.

    Returns:
        In [0, 1]: 0.5 where the score tells nothing.
    """
    ordered = negative.contiguous().sort(-1).values
    scores = positive.contiguous()
    below = torch.searchsorted(ordered, scores)
    at_most = torch.searchsorted(ordered, scores, right=True)
    return (below + at_most).double().mean(-1) / (2 * negative.shape[-1])
