"""Does a circuit do what the model does: faithfulness, completeness, minimality."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.arguments import check_at_least, checked
from tl_loops.circuits.circuit import Circuit
from tl_loops.circuits.pruned import PrunedRuns
from tl_loops.circuits.pruning import prune
from tl_loops.circuits.scores import EdgeScores
from tl_loops.layout.model import Model
from tl_loops.runs.in_batches import Split
from tl_loops.runs.removal import MeanOver
from tl_loops.runs.scoring import Metric
from tl_loops.runs.shards import Shards
from tl_loops.upstream import Cache, TextOrTokens, left_as_it_was


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """How much of the model's metric some circuits keep.

    Attributes:
        metrics: The metric of each circuit's run, [circuit].
        n_edges: Edges of each circuit, [circuit].
        full: The metric of the model, m(full).
        empty: The metric without any edge, m(empty).
        n_all: Edges of the graph.
    """

    metrics: Float[Tensor, "circuit"]
    n_edges: Int[Tensor, "circuit"]
    full: float
    empty: float
    n_all: int

    @property
    def values(self) -> Float[Tensor, "circuit"]:
        """(m(circuit) - m(empty)) / (m(full) - m(empty)): 1 for the model, 0 without any edge.

        It can be below 0 or above 1.
        """
        return (self.metrics - self.empty) / (self.full - self.empty)

    @property
    def area(self) -> float:
        """Area under the curve of faithfulness against the share of edges, by trapezoids.

        The curve begins at the empty graph, with 0, and ends at the whole, with 1. Source: the
        integrated circuit performance ratio of 2504.13151, section 4.
        """
        return self._area(lambda values: values)

    @property
    def distance(self) -> float:
        """Area between that curve and 1, without sign: 0 is best.

        Source: the integrated circuit-model distance of 2504.13151, section 4.
        """
        return self._area(lambda values: (1 - values).abs())

    def _area(self, height: Any) -> float:
        edges = self.n_edges.double() / self.n_all
        order = edges.argsort(stable=True)
        ends = edges.new_tensor([0.0, 1.0])
        share = torch.cat([ends[:1], edges[order], ends[1:]])
        values = torch.cat([ends[:1], self.values.double().cpu()[order], ends[1:]])
        return float(torch.trapezoid(height(values), share))


@dataclass(frozen=True, eq=False)
class PartEffects:
    """What taking out parts of a circuit does.

    Attributes:
        labels: Of the parts.
        values: One a part, [part].
    """

    labels: tuple[str, ...]
    values: Float[Tensor, "part"]

    @checked
    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The k parts of largest magnitude, largest first.

        Raises:
            ValueError: k is negative.
        """
        check_at_least(0, k=k)
        order = self.values.abs().argsort(descending=True, stable=True)[:k].tolist()
        return [(self.labels[i], float(self.values[i])) for i in order]


@checked
@left_as_it_was
def faithfulness(
    model: Model,
    tokens: TextOrTokens,
    metric: Metric,
    circuits: Circuit | Sequence[Circuit],
    rest: str = "paired",
    reference: Cache | None = None,
    *,
    mean_over: MeanOver = "batch",
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
    **forward_arguments: Any,
) -> Faithfulness:
    """Run circuits and compare them with the model and with the empty graph.

    In a circuit's run a component sees what the senders with an edge to it make in this run, and
    the rest in the place of all other senders.

    Args:
        model: A looped model.
        tokens: The prompts, [batch, pos], or text.
        metric: Maps the logits [batch, pos, d_vocab] of one circuit to a scalar.
        circuits: One or several circuits of one graph.
        rest: As in :func:`score`.
        reference: As in :func:`score`.
        mean_over: As in :func:`score`.
        seed: As in :func:`score`.
        batch_size: Rows in one forward pass; ``None``: chosen. A circuit needs one row per prompt
            for each set of senders that some component sees.
        progress: Show a progress bar.
        checkpoint: A file to which the metric of every circuit is added once it is run; the same
            call goes on from it, to the same bits.
        shard: ``(k, n)``, ``"auto"`` or ``"distributed"``: which circuits are run here, as for
            :func:`tl_loops.patching.activation_patch`. With ``(k, n)`` numbers are NaN, until the
            checkpoints are merged (:func:`tl_loops.merge_shards`).
        **forward_arguments: ``attention_mask``, ``initial_state``, ``exit_at``,
            ``exit_threshold`` or ``weighted_exit`` of every run.

    Returns:
        The metric of each circuit, of the model and of the empty graph.

    Raises:
        ValueError: Arguments that do not fit; a model that carries hooks; or a metric that is the
            same with all edges and with none, so that there is nothing to explain.
        CheckpointError: The checkpoint is damaged or of another run, or the run can be neither
            resumed nor cut into shards.

    Source: 2403.17806, section 4; for loops as it stands, over the unrolled graph.
    """
    given = [circuits] if isinstance(circuits, Circuit) else list(circuits)
    if not given:
        raise ValueError("there is no circuit to run: give at least one")
    split = Split(shard, checkpoint)
    options = (rest, reference, mean_over, seed, batch_size, forward_arguments, split)
    runs = PrunedRuns(model, given[0].graph, tokens, metric, *options)
    return _compared(runs, given, progress, split)


@checked
@left_as_it_was
def faithfulness_curve(
    model: Model,
    tokens: TextOrTokens,
    metric: Metric,
    scores: EdgeScores,
    rest: str = "paired",
    reference: Cache | None = None,
    *,
    n_edges: Sequence[int] | None = None,
    method: str = "greedy",
    signed: bool = False,
    mean_over: MeanOver = "batch",
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
    **forward_arguments: Any,
) -> Faithfulness:
    """Faithfulness of the circuits of growing size that some scores choose.

    Args:
        model: A looped model.
        tokens: The prompts, [batch, pos], or text.
        metric: As in :func:`faithfulness`.
        scores: What chooses the edges.
        rest: As in :func:`score`.
        reference: As in :func:`score`.
        n_edges: Sizes; ``None``: 0, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50 and 100 percent of edges.
        method: As in :func:`prune`.
        signed: As in :func:`prune`.
        mean_over: As in :func:`score`.
        seed: As in :func:`score`.
        batch_size: As in :func:`faithfulness`.
        progress: Show a progress bar.
        checkpoint: As in :func:`faithfulness`.
        shard: As in :func:`faithfulness`.
        **forward_arguments: As in :func:`faithfulness`.

    Returns:
        One entry a size; ``area`` is the area under the curve.

    Raises:
        ValueError: As :func:`faithfulness` and :func:`prune`.
        CheckpointError: As :func:`faithfulness`.

    Source: 2504.13151, section 4 (sizes and areas).
    """
    every = scores.graph.n_edges
    if n_edges is None:
        percent = (0, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
        n_edges = sorted({round(every * p / 100) for p in percent})
    circuits = [prune(scores, n, method, signed=signed) for n in n_edges]
    if not circuits:
        raise ValueError("n_edges is empty: give at least one size")
    split = Split(shard, checkpoint)
    options = (rest, reference, mean_over, seed, batch_size, forward_arguments, split)
    runs = PrunedRuns(model, scores.graph, tokens, metric, *options)
    return _compared(runs, circuits, progress, split)


@checked
@left_as_it_was
def minimality(
    model: Model,
    tokens: TextOrTokens,
    metric: Metric,
    circuit: Circuit,
    rest: str = "paired",
    reference: Cache | None = None,
    *,
    by: str = "edge",
    mean_over: MeanOver = "batch",
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
    **forward_arguments: Any,
) -> PartEffects:
    """How much faithfulness a circuit loses without each of its parts.

    (m(C) - m(C without v)) / (m(full) - m(empty)). A part of effect 0 is not needed, given all
    others. With ``by="iteration"`` it says which loops the circuit needs.

    Args:
        model: A looped model.
        tokens: The prompts, [batch, pos], or text.
        metric: As in :func:`faithfulness`.
        circuit: C.
        rest: As in :func:`score`.
        reference: As in :func:`score`.
        by: What a part v is: ``"edge"``, ``"node"``, ``"layer"`` or ``"iteration"``; see
            :meth:`Circuit.parts`.
        mean_over: As in :func:`score`.
        seed: As in :func:`score`.
        batch_size: As in :func:`faithfulness`.
        progress: Show a progress bar.
        checkpoint: As in :func:`faithfulness`.
        shard: As in :func:`faithfulness`.
        **forward_arguments: As in :func:`faithfulness`.

    Returns:
        One number a part.

    Raises:
        ValueError: As :func:`faithfulness`.
        CheckpointError: As :func:`faithfulness`.

    Source: 2211.00593, section 4, with K the empty set.
    """
    parts = circuit.parts(by)
    split = Split(shard, checkpoint)
    options = (rest, reference, mean_over, seed, batch_size, forward_arguments, split)
    runs = PrunedRuns(model, circuit.graph, tokens, metric, *options)
    circuits = [circuit, *(circuit.without(edges=edges) for edges in parts.values())]
    values = _compared(runs, circuits, progress, split).values
    return PartEffects(tuple(parts), values[0] - values[1:])


@checked
@left_as_it_was
def completeness(
    model: Model,
    tokens: TextOrTokens,
    metric: Metric,
    circuit: Circuit,
    rest: str = "paired",
    reference: Cache | None = None,
    *,
    by: str = "iteration",
    mean_over: MeanOver = "batch",
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
    **forward_arguments: Any,
) -> PartEffects:
    """Whether the circuit, damaged, behaves as the model does, damaged in the same way.

    (m(C without K) - m(M without K)) / (m(full) - m(empty)) for each part K of the circuit's edges,
    and for K empty, which is called ``"nothing"``. Near 0 everywhere, the circuit is complete;
    above 0, the model does something against it; below 0, the model has other ways that the circuit
    lacks.

    Args:
        model: A looped model, M.
        tokens: The prompts, [batch, pos], or text.
        metric: As in :func:`faithfulness`.
        circuit: C.
        rest: As in :func:`score`.
        reference: As in :func:`score`.
        by: What K is; see :meth:`Circuit.parts`. K is taken out of the model edge by edge: the
            edges of the circuit alone.
        mean_over: As in :func:`score`.
        seed: As in :func:`score`.
        batch_size: As in :func:`faithfulness`.
        progress: Show a progress bar.
        checkpoint: As in :func:`faithfulness`.
        shard: As in :func:`faithfulness`.
        **forward_arguments: As in :func:`faithfulness`.

    Returns:
        One number for ``"nothing"`` and for each part.

    Raises:
        ValueError: As :func:`faithfulness`.
        CheckpointError: As :func:`faithfulness`.

    Source: 2211.00593, section 4.
    """
    parts = {"nothing": torch.zeros_like(circuit.kept), **circuit.parts(by)}
    split = Split(shard, checkpoint)
    options = (rest, reference, mean_over, seed, batch_size, forward_arguments, split)
    runs = PrunedRuns(model, circuit.graph, tokens, metric, *options)
    whole = Circuit.whole(circuit.graph)
    damaged = [one.without(edges=edges) for one in (circuit, whole) for edges in parts.values()]
    values = _compared(runs, damaged, progress, split).values
    return PartEffects(tuple(parts), values[: len(parts)] - values[len(parts) :])


def _compared(
    runs: PrunedRuns, circuits: Sequence[Circuit], progress: bool, split: Split
) -> Faithfulness:
    graph = runs.graph
    metrics = runs.metrics([Circuit.empty(graph), *circuits], progress, split=split)
    empty = float(metrics[0])
    if runs.full == empty:
        raise ValueError(
            f"the metric is {empty:.4g} both with all edges and with none, so there is nothing for "
            "a circuit to explain: choose a metric, or a rest, that tells them apart"
        )
    return Faithfulness(
        metrics[1:],
        torch.tensor([circuit.n_edges for circuit in circuits]),
        runs.full,
        empty,
        graph.n_edges,
    )
