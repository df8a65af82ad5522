"""Reasoning graphs: the path of a trajectory through clusters of states, as a graph.

Minegishi et al. (arXiv 2506.05744) cluster the hidden states of reasoning steps and study the
graph that a sample's steps walk. In a looped model the steps can be the iterations of one token,
or the tokens of a prompt.
"""

import math
from dataclasses import dataclass

import networkx
import numpy
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.arguments import check_at_least
from tl_loops.metrics.kmeans import kmeans
from tl_loops.metrics.precision import full_precision
from tl_loops.metrics.states import measured_states
from tl_loops.printing import prints_short


@prints_short
@dataclass(frozen=True, eq=False)
class ReasoningGraph:
    """Statistics of the graph of one path.

    Attributes:
        nodes: the clusters that the path visits `[node]`, ascending.
        weights: length of the directed edge from row to column `[node, node]`; inf where there is
            none.
        has_loop: whether the path comes back to a node that it had left.
        loop_count: returns to the node that is revisited FIRST (the public code of arXiv
            2506.05744).
        max_loop_count: the largest number of returns to any node (as the paper describes it).
        diameter: longest of the shortest directed paths between nodes that can be reached; 0
            without an edge.
        path_length: mean of those shortest paths; NaN without an edge.
        clustering: mean clustering coefficient C of the undirected graph over nodes with at least
            two neighbours, in [0, 1]; 0 if there is no such node.
        hop_length: mean number of edges L between nodes of the undirected graph; NaN for one node.
        small_world: (C / C_rand) / (L / L_rand) against a random graph of the same size N and mean
            degree K, C_rand = K / (N - 1) and L_rand = ln N / ln K; NaN where K <= 1.
    """

    nodes: Int[Tensor, "node"]
    weights: Float[Tensor, "node node"]
    has_loop: bool
    loop_count: int
    max_loop_count: int
    diameter: float
    path_length: float
    clustering: float
    hop_length: float
    small_world: float


@full_precision
def cluster_paths(
    states: Float[Tensor, "step *tokens d_model"], n_clusters: int, seed: int = 0, n_init: int = 10
) -> Int[Tensor, "step *tokens"]:
    """Cluster all states together and give each trajectory as a path of cluster numbers.

    Args:
        states: `[step, ..., d_model]`, steps are iterations or positions.
        n_clusters: how many clusters; the paper uses 200 for the steps of a whole data set.
        seed: seed of k-means.
        n_init: how many starts of k-means.

    Returns:
        `[step, ...]`, one path in each column.

    Raises:
        ValueError: If there are fewer states than clusters or a state is not finite.
    """
    x = measured_states(states)
    clustering = kmeans(x.reshape(-1, x.shape[-1]), n_clusters, seed=seed, n_init=n_init)
    return clustering.labels.reshape(x.shape[:-1])


@full_precision
def reasoning_graph(
    path: Int[Tensor, "step"], points: Float[Tensor, "step d_model"] | None = None
) -> ReasoningGraph:
    """Graph of a path through clusters, with its loops, diameter and small-world index.

    Each step to another node is an edge; staying is none, so [0, 0, 0] has no loop and [0, 1, 0]
    has one. An edge that is walked more than once has the length of its shortest walk.

    Args:
        path: the node of each step, for instance a column of `cluster_paths`.
        points: the state of each step; the length of an edge is the L2 distance of the two states.
            Without them each edge has length 1.

    Returns:
        `ReasoningGraph`.

    Raises:
        ValueError: If the path is empty or the points do not match it.
    """
    if path.numel() == 0:
        raise ValueError("the path has no step; expected at least one")
    if points is not None and points.shape[0] != path.shape[0]:
        raise ValueError(
            f"{points.shape[0]} points for {path.shape[0]} steps; expected one point per step"
        )
    nodes, walk = torch.unique(path, return_inverse=True)
    n_nodes = len(nodes)
    if points is None:
        length = torch.ones(len(walk) - 1, device=path.device)
    else:
        length = measured_states(points).diff(dim=0).norm(dim=-1)
    weights = length.new_full((n_nodes, n_nodes), math.inf).flatten()
    moves = walk[1:] != walk[:-1]
    edge = (walk[:-1] * n_nodes + walk[1:])[moves]
    weights = weights.scatter_reduce(0, edge, length[moves], "amin").reshape(n_nodes, n_nodes)

    directed = networkx.DiGraph()
    directed.add_nodes_from(range(n_nodes))
    directed.add_weighted_edges_from(
        (start, end, float(weights[start, end]))
        for start, end in weights.isfinite().nonzero().tolist()
    )
    undirected = networkx.Graph(directed.edges)
    undirected.add_nodes_from(directed)
    first_count, max_count = _loop_counts(walk.tolist())
    reached = _path_lengths(directed, "weight")
    hop_length = _mean(_path_lengths(undirected, None))
    clustering = _clustering_coefficient(undirected)
    return ReasoningGraph(
        nodes=nodes,
        weights=weights,
        has_loop=max_count > 0,
        loop_count=first_count,
        max_loop_count=max_count,
        diameter=max(reached, default=0.0),
        path_length=_mean(reached),
        clustering=clustering,
        hop_length=hop_length,
        small_world=_small_world(undirected, clustering, hop_length),
    )


@full_precision
def shuffled_graphs(
    path: Int[Tensor, "step"],
    seed: int,
    n_shuffles: int = 100,
    points: Float[Tensor, "step d_model"] | None = None,
) -> list[ReasoningGraph]:
    """Graphs of the same steps in random orders, the null of `reasoning_graph`.

    Args:
        path: the node of each step.
        seed: seed of the orders.
        n_shuffles: how many.
        points: the state of each step; it moves with its node.

    Returns:
        `n_shuffles` graphs.

    Raises:
        ValueError: As `reasoning_graph`.
    """
    check_at_least(0, n_shuffles=n_shuffles)
    generator = torch.Generator().manual_seed(seed)
    graphs = []
    for _ in range(n_shuffles):
        order = torch.randperm(path.shape[0], generator=generator).to(path.device)
        graphs.append(reasoning_graph(path[order], None if points is None else points[order]))
    return graphs


def _loop_counts(walk: list[int]) -> tuple[int, int]:
    """Returns to the node that is revisited first, and the most returns to any node."""
    visits: dict[int, int] = {}
    first_revisited = None
    for step, node in enumerate(walk):
        if step and walk[step - 1] == node:
            continue
        visits[node] = visits.get(node, 0) + 1
        if visits[node] == 2 and first_revisited is None:
            first_revisited = node
    first_count = 0 if first_revisited is None else visits[first_revisited] - 1
    return first_count, max(visits.values()) - 1


def _path_lengths(graph: networkx.Graph, weight: str | None) -> list[float]:
    """Lengths of the shortest paths between different nodes, where there is one."""
    length = networkx.floyd_warshall_numpy(graph, weight=weight)
    different = ~numpy.eye(len(graph), dtype=bool)
    return length[different & numpy.isfinite(length)].tolist()


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _clustering_coefficient(graph: networkx.Graph) -> float:
    """Share of adjacent pairs of neighbours, mean over nodes with at least two neighbours."""
    eligible = [node for node, degree in graph.degree if degree >= 2]
    return networkx.average_clustering(graph, eligible) if eligible else 0.0


def _small_world(graph: networkx.Graph, clustering: float, hop_length: float) -> float:
    n_nodes = len(graph)
    mean_degree = 2 * graph.number_of_edges() / n_nodes
    if mean_degree <= 1:
        return math.nan
    clustering_random = mean_degree / (n_nodes - 1)
    length_random = math.log(n_nodes) / math.log(mean_degree)
    return (clustering / clustering_random) / (hop_length / length_random)
