"""k-means with an explicit seed: Lloyd's algorithm from k-means++ starts."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.precision import full_precision
from tl_loops.printing import prints_short


@prints_short
@dataclass(frozen=True, eq=False)
class KMeans:
    """A clustering of points.

    Attributes:
        labels: cluster of each point `[point]`; clusters are numbered in the order of their first
            point.
        centroids: mean of each cluster `[cluster, feature]`.
        inertia: sum of squared distances of the points to their centroids.
    """

    labels: Int[Tensor, "point"]
    centroids: Float[Tensor, "cluster feature"]
    inertia: float


@full_precision
def kmeans(
    points: Float[Tensor, "point feature"],
    n_clusters: int,
    seed: int = 0,
    n_init: int = 10,
    max_iterations: int = 300,
) -> KMeans:
    """Cluster points around `n_clusters` means; the best of `n_init` runs counts.

    A cluster that loses its points is moved to the point that is farthest from its centroid. With
    fewer distinct points than clusters the clusters that are left over are dropped.

    Args:
        points: `[point, feature]`.
        n_clusters: how many clusters.
        seed: seed of the start centroids.
        n_init: how many starts.
        max_iterations: assignments per start; a run ends earlier when no point changes its
            cluster.

    Returns:
        `KMeans` with at most `n_clusters` clusters, none of them empty.

    Raises:
        ValueError: If there are fewer points than clusters, a count is not positive, or a point is
            not finite.
    """
    if not 1 <= n_clusters <= points.shape[0]:
        raise ValueError(
            f"n_clusters={n_clusters} with {points.shape[0]} points; "
            "expected 1 <= n_clusters <= number of points"
        )
    if n_init < 1 or max_iterations < 1:
        raise ValueError(
            f"n_init={n_init}, max_iterations={max_iterations}; expected at least 1 each"
        )
    if not points.isfinite().all():
        raise ValueError("points hold NaN or inf; leave those rows out")
    points = points.to(statistic_dtype(points))
    # Distances are computed from dot products, which lose digits far away from the origin.
    offset = points.mean(0)
    centered = points - offset
    generator = torch.Generator().manual_seed(seed)
    best_labels, best_inertia = None, float("inf")
    for _ in range(n_init):
        labels, inertia = _lloyd(
            centered, _plus_plus(centered, n_clusters, generator), max_iterations
        )
        if best_labels is None or inertia < best_inertia:
            best_labels, best_inertia = labels, inertia
    assert best_labels is not None
    labels = _number_by_first_point(best_labels)
    centroids = _means(centered, labels, int(labels.max()) + 1) + offset
    return KMeans(labels, centroids, best_inertia)


def _plus_plus(points: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Start centroids: points drawn in proportion to the squared distance to those drawn before."""
    first = int(torch.randint(points.shape[0], (1,), generator=generator))
    chosen = [first]
    nearest = (points - points[first]).square().sum(-1)
    for _ in range(n_clusters - 1):
        weight = nearest.double().cpu()
        if weight.sum() <= 0:  # Every point sits on a centroid already.
            weight = torch.ones_like(weight)
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(-1))
    return points[chosen]


def _lloyd(points: Tensor, centroids: Tensor, max_iterations: int) -> tuple[Tensor, float]:
    """Alternate assignments and means until nothing changes."""
    labels = points.new_full(points.shape[:1], -1, dtype=torch.long)
    for _ in range(max_iterations):
        squared = centroids.square().sum(-1) - 2 * points @ centroids.T
        assigned = squared.argmin(-1)
        distance = (points - centroids[assigned]).square().sum(-1)
        for empty in _empty_clusters(assigned, len(centroids)):
            farthest = int(distance.argmax())
            if distance[farthest] <= 0:  # No point is left to give away.
                break
            assigned[farthest] = empty
            distance[farthest] = 0.0
        if torch.equal(assigned, labels):
            break
        labels = assigned
        means = _means(points, labels, len(centroids))
        occupied = torch.bincount(labels, minlength=len(centroids)) > 0
        centroids = torch.where(occupied[:, None], means, centroids)
    return labels, float((points - centroids[labels]).square().sum())


def _empty_clusters(labels: Tensor, n_clusters: int) -> list[int]:
    return (torch.bincount(labels, minlength=n_clusters) == 0).nonzero().flatten().tolist()


def _means(points: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """Mean of the points of each cluster `[cluster, feature]`; 0 for an empty one."""
    sums = points.new_zeros(n_clusters, points.shape[1]).index_add_(0, labels, points)
    return sums / torch.bincount(labels, minlength=n_clusters).clamp(min=1)[:, None]


def _number_by_first_point(labels: Tensor) -> Tensor:
    """Renumber the clusters 0, 1, ... in the order in which they appear."""
    number: dict[int, int] = {}
    renumbered = [number.setdefault(label, len(number)) for label in labels.tolist()]
    return torch.tensor(renumbered, device=labels.device)
