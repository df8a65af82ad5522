"""Graphs of short paths, worked out by hand, and laws of loop counts and shortest paths."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.graph import cluster_paths, reasoning_graph, shuffled_graphs

torch.set_num_threads(1)

laws = settings(deadline=None, max_examples=25)
paths = st.lists(st.integers(0, 5), min_size=1, max_size=14)


def graph(path, points=None):
    if points is not None:
        points = torch.tensor(points, dtype=torch.float32).reshape(len(path), -1)
    return reasoning_graph(torch.tensor(path), points)


class TestLoops:
    @pytest.mark.parametrize(
        ("path", "count"),
        [
            ([0, 1, 2, 0, 1, 2], 1),
            ([0, 0, 0], 0),
            ([0, 1, 0], 1),
            ([0, 1, 2, 3], 0),
            ([0, 0, 1, 1, 0, 0], 1),
            ([7, 3, 7, 3, 7], 2),
            ([4], 0),
        ],
    )
    def test_both_counts_of_simple_paths(self, path, count):
        result = graph(path)
        assert result.has_loop == (count > 0)
        assert result.loop_count == result.max_loop_count == count

    def test_the_counts_differ_when_another_node_returns_more_often(self):
        """Node 0 is the first to come back, once; node 2 comes back three times."""
        result = graph([0, 1, 0, 2, 3, 2, 3, 2, 4, 2])
        assert result.loop_count == 1
        assert result.max_loop_count == 3

    @laws
    @given(paths)
    def test_staying_changes_nothing(self, path):
        doubled = [node for node in path for _ in range(2)]
        a, b = graph(path), graph(doubled)
        assert (a.loop_count, a.max_loop_count) == (b.loop_count, b.max_loop_count)
        assert a.diameter == b.diameter and a.clustering == b.clustering

    @laws
    @given(paths, st.permutations(range(6)))
    def test_names_of_nodes_do_not_matter(self, path, names):
        a, b = graph(path), graph([names[node] for node in path])
        assert (a.loop_count, a.max_loop_count) == (b.loop_count, b.max_loop_count)
        assert (a.diameter, a.hop_length) == (b.diameter, pytest.approx(b.hop_length, nan_ok=True))
        assert a.clustering == pytest.approx(b.clustering)

    @laws
    @given(paths)
    def test_the_first_count_never_exceeds_the_maximum(self, path):
        result = graph(path)
        assert 0 <= result.loop_count <= result.max_loop_count
        assert result.has_loop == (result.loop_count > 0)


class TestLengths:
    def test_a_line_has_the_sum_of_its_edges(self):
        result = graph([0, 1, 2, 3], [0.0, 1.0, 3.0, 6.0])
        assert result.diameter == pytest.approx(6.0)
        assert result.path_length == pytest.approx((1 + 2 + 3 + 3 + 5 + 6) / 6)
        assert not result.has_loop

    def test_edges_are_directed(self):
        """Around the cycle 0 1 2 0 the way back from 1 to 0 leads through 2."""
        result = graph([0, 1, 2, 0], [0.0, 1.0, 5.0, 0.0])
        assert result.weights[0, 1] == 1 and result.weights[1, 0].isinf()
        assert result.diameter == pytest.approx(9.0)  # 1 -> 2 -> 0 and 2 -> 0 -> 1: 4 + 5, 5 + 1

    def test_an_edge_walked_twice_has_its_shorter_length(self):
        result = graph([0, 1, 0, 1], [0.0, 3.0, 1.0, 2.0])
        assert result.weights[0, 1] == 1.0
        assert result.weights[1, 0] == 2.0

    def test_nodes_are_the_clusters_in_order(self):
        result = graph([9, 2, 9, 5])
        assert result.nodes.tolist() == [2, 5, 9]
        assert result.weights[2, 0] == result.weights[0, 2] == result.weights[2, 1] == 1

    def test_a_single_node(self):
        result = graph([3, 3, 3])
        assert result.diameter == 0 and math.isnan(result.path_length)
        assert result.clustering == 0
        assert math.isnan(result.hop_length) and math.isnan(result.small_world)

    @laws
    @given(paths)
    def test_shortest_paths_match_an_enumeration(self, path):
        """Unit edges: compare with plain breadth-first search."""
        neighbours = {node: set() for node in path}
        for a, b in pairwise(path):
            if a != b:
                neighbours[a].add(b)
        lengths = []
        for start in neighbours:
            depth, frontier = {start: 0}, [start]
            while frontier:
                step = [b for a in frontier for b in neighbours[a] if b not in depth]
                for a in frontier:
                    for b in neighbours[a]:
                        depth.setdefault(b, depth[a] + 1)
                frontier = sorted(set(step))
            lengths += [d for node, d in depth.items() if node != start]
        result = graph(path)
        assert result.diameter == max(lengths, default=0)
        if lengths:
            assert result.path_length == pytest.approx(sum(lengths) / len(lengths))


class TestSmallWorld:
    def test_a_triangle_is_complete(self):
        result = graph([0, 1, 2, 0])
        assert result.clustering == 1.0 and result.hop_length == 1.0
        # K = 2, C_rand = 1, L_rand = ln 3 / ln 2
        assert result.small_world == pytest.approx(math.log(3) / math.log(2))

    def test_a_line_has_no_triangle(self):
        result = graph([0, 1, 2, 3])
        assert result.clustering == 0 and result.small_world == 0

    def test_a_triangle_with_a_tail(self):
        """C is 1 at nodes 0 and 1, 1/3 at node 2 (three neighbours, one edge), not counted at 3."""
        result = graph([0, 1, 2, 0, 2, 3])
        clustering = (1 + 1 + 1 / 3) / 3
        assert result.clustering == pytest.approx(clustering)
        hop_length = (1 + 1 + 2 + 1 + 2 + 1) / 6
        assert result.hop_length == pytest.approx(hop_length)
        expected = clustering / (2 / 3) / (hop_length / (math.log(4) / math.log(2)))
        assert result.small_world == pytest.approx(expected)

    def test_two_nodes_have_no_random_counterpart(self):
        assert math.isnan(graph([0, 1, 0, 1]).small_world)


class TestClusterPaths:
    def test_a_cycle_of_states_is_a_cyclic_path(self):
        corners = 10 * torch.eye(3)
        noise = 0.1 * torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
        path = cluster_paths(corners[torch.arange(9) % 3] + noise, n_clusters=3)
        assert path.tolist() == [0, 1, 2] * 3
        assert reasoning_graph(path).loop_count == 2

    def test_tokens_share_their_clusters(self):
        corners = 10 * torch.eye(4)
        first, second = torch.tensor([0, 1, 2, 3]), torch.tensor([3, 3, 0, 1])
        states = torch.stack([corners[first], corners[second]], 1)[:, None]
        path = cluster_paths(states, n_clusters=4)
        assert path.shape == (4, 1, 2)
        for a in range(4):
            for b in range(4):
                assert (path[a, 0, 0] == path[b, 0, 1]) == (first[a] == second[b])


class TestNull:
    def test_shuffles_keep_the_visits(self):
        path = torch.tensor([0, 1, 2, 0, 1, 2, 3])
        graphs = shuffled_graphs(path, seed=0, n_shuffles=20)
        assert len(graphs) == 20
        assert all(g.nodes.tolist() == [0, 1, 2, 3] for g in graphs)
        assert len({g.loop_count for g in graphs}) > 1

    def test_points_move_with_their_nodes(self):
        """Points that depend on the node alone give the same length to an edge in every order."""
        path = torch.tensor([0, 1, 2, 0, 1, 2, 3, 1])
        points = torch.tensor([0.0, 1.0, 10.0, 100.0])[path][:, None]
        for g in shuffled_graphs(path, seed=1, n_shuffles=10, points=points):
            edges = g.weights.isfinite().nonzero().tolist()
            value = [0.0, 1.0, 10.0, 100.0]
            assert all(g.weights[a, b] == abs(value[a] - value[b]) for a, b in edges)

    def test_is_a_function_of_the_seed(self):
        path = torch.arange(12) % 5
        a, b, c = (
            [g.weights.isfinite().tolist() for g in shuffled_graphs(path, s, 3)] for s in (0, 0, 1)
        )
        assert a == b != c


def test_refuses_bad_input():
    with pytest.raises(ValueError, match="no step"):
        reasoning_graph(torch.zeros(0, dtype=torch.long))
