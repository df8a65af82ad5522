"""Choosing the edges of a circuit by their scores."""

from typing import Literal, get_args

import torch
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.circuits.circuit import Circuit
from tl_loops.circuits.scores import EdgeScores
from tl_loops.layout.selection import as_index

Pruning = Literal["top", "greedy"]


@checked
def prune(
    scores: EdgeScores, n_edges: int, method: str = "greedy", *, signed: bool = False
) -> Circuit:
    """Keep the edges of largest score.

    Args:
        scores: Of :func:`score`. Folded ones choose folded edges.
        n_edges: How many edges to keep, at most all.
        method: ``"top"``: those of largest magnitude, connected or not. ``"greedy"``: from the
            logits back, each time the largest among the edges into a component that is already
            there, so that every edge can reach the logits; fewer than ``n_edges`` only where no
            other can.
        signed: Order by the score and not by its magnitude, so that edges that lower the metric
            come last.

    Returns:
        The circuit, with the scores.

    Raises:
        ValueError: ``n_edges`` is out of range, the method is unknown, or a score is NaN.

    Source: top-n and greedy choice as in 2403.17806, section 3.
    """
    if method not in get_args(Pruning):
        raise ValueError(f"method must be 'top' or 'greedy', got {method!r}")
    graph = scores.graph
    if not 0 <= as_index("n_edges", n_edges) <= graph.n_edges:
        raise ValueError(f"n_edges must be between 0 and {graph.n_edges}, got {n_edges}")
    values = scores.scores.detach().cpu()
    if bool(values[graph.exists].isnan().any()):
        raise ValueError("some scores are NaN, which has no order: look for NaN in the activations")
    classes, exists = graph.edge_classes, graph.exists
    of_class = values.new_zeros(graph.n_edges)
    of_class[classes[exists]] = values[exists]  # all edges of a class have its score
    order = (of_class if signed else of_class.abs()).argsort(descending=True, stable=True)
    if method == "top":
        chosen = order[:n_edges]
    else:
        chosen = _greedy(scores, order.tolist(), n_edges)
    kept = exists & torch.isin(classes, chosen)
    return Circuit(graph, kept, values)


def _greedy(scores: EdgeScores, order: list[int], n_edges: int) -> Tensor:
    """Classes of edges, each the first in the order that leads to what has been reached."""
    graph = scores.graph
    members: list[list[tuple[int, int]]] = [[] for _ in order]
    for s, r in graph.exists.nonzero().tolist():
        members[int(graph.edge_classes[s, r])].append((s, r))
    reached = torch.tensor([c.kind == "logits" for c in graph.receivers])
    chosen: list[int] = []
    waiting = list(order)
    while len(chosen) < n_edges:
        edge = next((k for k in waiting if any(reached[r] for _, r in members[k])), None)
        if edge is None:
            break
        waiting.remove(edge)
        chosen.append(edge)
        for s, _ in members[edge]:
            reached |= graph.feeds[:, s]
    return torch.tensor(chosen, dtype=torch.int64)
