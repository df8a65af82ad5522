"""Principal components of latent trajectories, and the random walk to compare them with."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import check_at_least
from tl_loops.metrics.precision import full_precision
from tl_loops.metrics.states import measured_states
from tl_loops.printing import prints_short


@prints_short
@dataclass(frozen=True, eq=False)
class PCATrajectory:
    """Trajectories in the basis of their principal components.

    With `fit_on="token"` the last four carry the token axes in front.

    Attributes:
        coordinates: `[iteration, ..., component]`.
        components: unit vectors `[component, d_model]`; the entry of largest magnitude is
            positive. A component beyond the rank of the fitted rows is all zeros, and so are its
            coordinates.
        mean: mean of the fitted rows `[d_model]`.
        explained_variance: variance of the fitted rows along each component `[component]` (n - 1
            in the denominator).
        explained_variance_ratio: the same over the total variance `[component]`, in [0, 1]; NaN if
            the rows do not vary.
    """

    coordinates: Float[Tensor, "iteration ... component"]
    components: Float[Tensor, "... component d_model"]
    mean: Float[Tensor, "... d_model"]
    explained_variance: Float[Tensor, "... component"]
    explained_variance_ratio: Float[Tensor, "... component"]


@full_precision
def pca_trajectory(
    states: Float[Tensor, "iteration *tokens d_model"],
    n_components: int = 2,
    fit_on: Literal["all", "token"] | Float[Tensor, "row d_model"] = "all",
    skip_init: int = 0,
    center: Literal["fit", "token"] = "fit",
) -> PCATrajectory:
    """Project trajectories onto their principal components.

    arXiv 2604.11791 (appendix D.3) fits the states of one token: all blocks, unrolled, in the
    first axis, with `fit_on="token"`. Huginn's notebook fits all iterations of all tokens on the
    states after the final norm and centres each trajectory on its own mean: `fit_on="all"`,
    `center="token"`; apply the norm before.

    A loop in the picture is no evidence of an orbit: any smooth path and any random walk in many
    dimensions projects to Lissajous curves. Compare with `random_walk_null` (arXiv 1806.08805: a
    random walk has the explained variance ratio 6 / (pi k)^2 on component k). Components of equal
    variance are determined only up to a rotation among them.

    Args:
        states: `[iteration, ..., d_model]`.
        n_components: how many components.
        fit_on: which rows determine the components: all iterations of all tokens, each token's own
            iterations, or the rows of a tensor.
        skip_init: number of leading states that are projected but not fitted; 1 keeps a random
            initial state from being the first component.
        center: `"fit"`: coordinates are relative to the mean of the fitted rows. `"token"`: each
            trajectory is relative to its own mean over the fitted iterations.

    Returns:
        `PCATrajectory`. With fewer states or a lower rank than `n_components` the rest is zeros.

    Raises:
        ValueError: If `n_components` is not positive, `skip_init` leaves no state, or an option is
            unknown, or a state that is fitted is not finite.
    """
    x = measured_states(states)
    if n_components < 1:
        raise ValueError(f"n_components={n_components}; expected at least 1")
    if not 0 <= skip_init < x.shape[0]:
        raise ValueError(
            f"skip_init={skip_init} leaves none of the {x.shape[0]} states; "
            f"expected 0 <= skip_init < {x.shape[0]}"
        )
    if center not in ("fit", "token"):
        raise ValueError(f'got center={center!r}, expected "fit" or "token"')
    fitted = x[skip_init:]
    if isinstance(fit_on, Tensor):
        rows = measured_states(fit_on).to(x)
    elif fit_on == "all":
        rows = fitted.flatten(0, -2)
    elif fit_on == "token":
        rows = fitted.movedim(0, -2)
    else:
        raise ValueError(f'got fit_on={fit_on!r}, expected "all", "token" or a tensor of rows')

    if not bool(rows.isfinite().all()):
        raise ValueError("states hold NaN or inf; leave those tokens or iterations out")
    mean, components, variance, total = _principal_components(rows, n_components)
    origin = mean if center == "fit" else fitted.mean(0)
    coordinates = torch.einsum("t...d,...cd->t...c", x - origin, components)
    return PCATrajectory(
        coordinates=coordinates,
        components=components,
        mean=mean,
        explained_variance=variance,
        explained_variance_ratio=variance / total[..., None],
    )


@full_precision
def random_walk_null(
    states: Float[Tensor, "iteration *tokens d_model"], seed: int, n_walks: int = 1
) -> Float[Tensor, "walk iteration *tokens d_model"]:
    """Random walks with the start and step lengths of the trajectories, but random directions.

    Run the same analysis on them: what a random walk shows as well (Lissajous curves in the plane
    of two components, 61% of the variance on the first one) is not a property of the model.

    Args:
        states: `[iteration, ..., d_model]`.
        seed: seed of the directions, which are isotropic and independent.
        n_walks: how many walks for each token.

    Returns:
        `[n_walks, iteration, ..., d_model]`, equal for equal seeds on every device.

    Raises:
        ValueError: If `n_walks` is not positive.
    """
    check_at_least(1, n_walks=n_walks)
    x = measured_states(states)
    length = x.diff(dim=0).norm(dim=-1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    shape = (n_walks, x.shape[0] - 1, *x.shape[1:])
    # Drawn in float32, so that one seed is one walk whatever the dtype of the states.
    direction = torch.randn(shape, generator=generator, dtype=torch.float32).to(x)
    step = length * direction / direction.norm(dim=-1, keepdim=True)
    start = x[:1].expand(n_walks, *x[:1].shape)
    return torch.cat([start, start + step.cumsum(1)], dim=1)


def _principal_components(rows: Tensor, n_components: int) -> tuple[Tensor, ...]:
    """Mean, components, their variances, total variance of rows `[..., row, d_model]`."""
    n_rows, d_model = rows.shape[-2:]
    mean = rows.double().mean(-2)
    centered = rows.double() - mean[..., None, :]
    # The smaller Gram matrix in float64 is as exact as an SVD in float32, and far cheaper for long
    # or wide data. Singular values below the rounding of the rows themselves do not count as rank.
    tall = n_rows > d_model
    gram = centered.mT @ centered if tall else centered @ centered.mT
    eigenvalues, vectors = torch.linalg.eigh(gram)
    n_kept = min(n_components, eigenvalues.shape[-1])
    eigenvalues = eigenvalues.flip(-1)[..., :n_kept]
    vectors = vectors.flip(-1)[..., :n_kept].mT
    noise = torch.finfo(rows.dtype).eps * rows.double().flatten(-2).norm(dim=-1)
    floor = noise.square() + torch.finfo(torch.float64).eps * gram.diagonal(0, -2, -1).sum(-1)
    real = eigenvalues > floor[..., None]
    components = vectors if tall else vectors @ centered
    components = components / components.norm(dim=-1, keepdim=True)
    largest = components.abs().argmax(-1, keepdim=True)
    components = components * components.gather(-1, largest).sign()
    components = torch.where(real[..., None], components, 0.0)

    degrees = max(n_rows - 1, 1)
    variance = torch.where(real, eigenvalues, 0.0) / degrees
    total = centered.square().sum((-2, -1)) / degrees
    total = torch.where(variance[..., 0] > 0, total, torch.nan)
    missing = n_components - n_kept
    components = torch.nn.functional.pad(components, (0, 0, 0, missing))
    variance = torch.nn.functional.pad(variance, (0, missing))
    return mean.to(rows), components.to(rows), variance.to(rows), total.to(rows)
