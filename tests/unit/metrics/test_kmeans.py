"""k-means on clusters that are known, and what it does when points run short."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.kmeans import _lloyd, kmeans

torch.set_num_threads(1)

laws = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31 - 1)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(n_clusters=4, n_points=60, spread=0.1, seed=0):
    centers = 10 * torch.eye(n_clusters, 8)
    labels = torch.arange(n_points) % n_clusters
    return centers[labels] + spread * randn(seed, n_points, 8), labels


def test_finds_separate_clusters_numbered_by_first_point():
    points, labels = blobs()
    result = kmeans(points, 4)
    assert torch.equal(result.labels, labels)
    means = torch.stack([points[labels == c].mean(0) for c in range(4)])
    torch.testing.assert_close(result.centroids, means)
    expected = (points - means[labels]).square().sum().item()
    assert result.inertia == pytest.approx(expected, rel=1e-4)


def test_survives_a_large_common_offset():
    points, labels = blobs()
    assert torch.equal(kmeans(points + 1e4, 4).labels, labels)


def test_two_groups_on_a_line():
    points = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    result = kmeans(points, 2)
    assert result.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert result.centroids.flatten().tolist() == [1.0, 11.0]
    assert result.inertia == pytest.approx(4.0)


@laws
@given(seeds)
def test_lies_between_the_best_partition_and_the_better_quarter(seed):
    points = randn(seed, 6, 2).double()

    def inertia(labels):
        groups = [points[labels == c] for c in labels.unique()]
        return sum((group - group.mean(0)).square().sum().item() for group in groups)

    partitions = [torch.tensor(p) for p in itertools.product([0, 1], repeat=6) if 0 < sum(p) < 6]
    result = kmeans(points, 2, seed=seed)
    assert result.inertia == pytest.approx(inertia(result.labels))
    assert result.inertia >= min(map(inertia, partitions)) - 1e-9
    assert result.inertia <= sorted(map(inertia, partitions))[len(partitions) // 4]


@laws
@given(seeds, st.integers(1, 8))
def test_every_point_has_its_nearest_centroid(seed, n_clusters):
    points = randn(seed, 30, 3).double()
    result = kmeans(points, n_clusters, seed=seed, n_init=1)
    nearest = torch.cdist(points, result.centroids).argmin(-1)
    assert torch.equal(nearest, result.labels)
    assert torch.bincount(result.labels).min() > 0
    distance = (points - result.centroids[result.labels]).square().sum().item()
    assert result.inertia == pytest.approx(distance)


def test_an_empty_cluster_moves_to_the_farthest_point():
    points = torch.tensor([[0.0], [1.0], [10.0]])
    labels, inertia = _lloyd(points, torch.tensor([[0.0], [1e3]]), max_iterations=10)
    assert labels[0] == labels[1] != labels[2]
    assert inertia == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(10))
def test_one_start_reaches_every_far_cluster(seed):
    """k-means++ draws far points: a plain random start would miss a blob in most runs."""
    points, labels = blobs(n_clusters=6, spread=1e-3)
    assert torch.equal(kmeans(points, 6, seed=seed, n_init=1, max_iterations=1).labels, labels)


def test_is_a_function_of_the_seed():
    points = randn(0, 50, 3)
    first, again = kmeans(points, 7, seed=3, n_init=1), kmeans(points, 7, seed=3, n_init=1)
    assert torch.equal(first.labels, again.labels)
    others = [kmeans(points, 7, seed=s, n_init=1).inertia for s in range(5)]
    assert len(set(others)) > 1
    assert kmeans(points, 7, seed=3, n_init=10).inertia <= first.inertia


def test_as_many_clusters_as_points():
    result = kmeans(randn(0, 5, 3), 5)
    assert result.labels.tolist() == [0, 1, 2, 3, 4]
    assert result.inertia == pytest.approx(0.0, abs=1e-10)


def test_fewer_distinct_points_than_clusters():
    points = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    result = kmeans(points, 3)
    assert result.labels.tolist() == [0, 1, 0, 1]
    assert result.centroids.shape == (2, 1)


def test_one_cluster_is_the_mean():
    points = randn(0, 9, 3)
    torch.testing.assert_close(kmeans(points, 1).centroids[0], points.mean(0))


def test_bfloat16_is_measured_in_float32():
    points, labels = blobs()
    result = kmeans(points.bfloat16(), 4)
    assert result.centroids.dtype == torch.float32 and torch.equal(result.labels, labels)


def test_refuses_bad_input():
    with pytest.raises(ValueError, match="n_clusters"):
        kmeans(randn(0, 3, 2), 4)
    with pytest.raises(ValueError, match="NaN"):
        kmeans(torch.full((3, 2), torch.nan), 2)
    with pytest.raises(ValueError, match="n_init"):
        kmeans(randn(0, 3, 2), 2, n_init=0)
