"""Scoring edges: what the metric loses without each, estimated from gradients or exactly."""

import os
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.attribution.components import Component
from tl_loops.attribution.edges import EdgeAttribution, edge_attribution
from tl_loops.circuits.circuit import Circuit
from tl_loops.circuits.graph import EdgeGraph
from tl_loops.circuits.pruned import PrunedRuns, rest_values
from tl_loops.layout.model import Model
from tl_loops.patching.paths import path_patch
from tl_loops.patching.site import Site
from tl_loops.runs.cells import scalar
from tl_loops.runs.in_batches import Batch, Run, Split, run_in_batches
from tl_loops.runs.removal import MeanOver, check_removal
from tl_loops.runs.rerun import BaseRun
from tl_loops.runs.scoring import Metric, identify_cells, start_run
from tl_loops.runs.shards import Shards
from tl_loops.upstream import Cache, TextOrTokens, left_as_it_was

ScoredBy = Literal["gradient", "integrated_inputs", "exact"]
_READS = {"attn": "attn_out", "mlp": "mlp_out", "query": "q", "key": "k", "value": "v", "head": "z"}


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores(EdgeAttribution):
    """What the metric loses without each edge.

    Attributes:
        senders: Components that write, in the order of the run.
        receivers: Components that read, in the order of the run.
        scores: m(all edges) - m(all but this one), estimated or exact: positive where the edge
            helps, 0 where there is none, [sender, receiver]. Of a folded graph every edge has the
            score of the folded edge that it belongs to.
        n_iterations: Iterations of the run.
        folded: Whether edges are counted over all iterations together.
        parallel: Whether a block's MLP reads what its attention reads.
    """

    folded: bool = False
    parallel: bool = False

    @property
    def graph(self) -> EdgeGraph:
        """The graph whose edges these are."""
        return EdgeGraph(
            self.senders, self.receivers, self.n_iterations, self.folded, self.parallel
        )


@checked
@left_as_it_was
def score(
    model: Model,
    tokens: TextOrTokens,
    metric: Metric,
    rest: str = "paired",
    reference: Cache | None = None,
    *,
    by: str = "integrated_inputs",
    heads: bool = False,
    split_qkv: bool = False,
    folded: bool = False,
    n_steps: int = 8,
    mean_over: MeanOver = "batch",
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
    **forward_arguments: Any,
) -> EdgeScores:
    """Score every edge by what the metric loses when it alone carries the rest.

    Args:
        model: A looped model.
        tokens: The prompts whose circuit is sought, [batch, pos], or text.
        metric: Maps the logits [batch, pos, d_vocab] to a scalar (for gradients a tensor that has
            one).
        rest: What an edge that is left out carries: ``"paired"``: what its sender makes of the
            reference prompt with the same number, a counterfactual; ``"resample"``: of a reference
            prompt drawn at random for each prompt; ``"mean"``: the mean over the reference prompts;
            ``"zero"``.
        reference: Cache of the reference prompts with ``hook_embed``, ``hook_mlp_out`` and
            ``hook_attn_out`` (with ``heads``: ``attn.hook_z``) of every block; none for
            ``"zero"``.
        by: ``"gradient"``: to first order at the prompts. ``"integrated_inputs"``: the gradient
            averaged while the embedding moves to that of the rest. ``"exact"``: one run per edge.
        heads: Tell heads apart, as senders and as receivers.
        split_qkv: Tell queries, keys and values of a receiving head apart; needs ``heads``.
        folded: One node for a layer in all iterations: a folded edge's score is the sum over its
            edges, and with ``"exact"`` what the metric loses without all of them at once.
        n_steps: Points of ``"integrated_inputs"``.
        mean_over: Whether ``"mean"`` is over prompts, or over prompts and positions
            (``"batch_pos"``), which lets reference prompts have another length.
        seed: Of the draw of ``"resample"``.
        batch_size: Rows in one forward pass of ``"exact"``; ``None``: chosen.
        progress: Show a progress bar.
        checkpoint: A file to which the scores of every receiver (``"exact"``: sender) are added
            once they are done; the same call goes on from it, to the same bits.
        shard: ``(k, n)``, ``"auto"`` or ``"distributed"``: which of them are scored here, as for
            :func:`tl_loops.patching.activation_patch`. With ``(k, n)`` scores are NaN, until the
            checkpoints are merged (:func:`tl_loops.merge_shards`).
        **forward_arguments: ``attention_mask`` or ``initial_state`` of every run (exits too).

    Returns:
        Scores in float32 (float64 for a float64 model), without gradients.

    Raises:
        NoLoopError: The model has no loop.
        LoopedSemanticsError: ``"integrated_inputs"`` on a model whose tokens also enter by value
            embeddings.
        ValueError: Arguments that do not fit each other, the prompts or the reference.
        CheckpointError: The checkpoint is damaged or of another run, or the run can be neither
            resumed nor cut into shards.

    Source: edge attribution patching 2310.10348, section 2; with integrated gradients 2403.17806,
    section 3; exact patching of each edge 2304.14997, section 3.
    """
    if by not in get_args(ScoredBy):
        raise ValueError(f"by must be one of {', '.join(get_args(ScoredBy))}, got {by!r}")
    graph = EdgeGraph.of(model, heads=heads, split_qkv=split_qkv, folded=folded)
    check_removal("rest", rest, reference)
    split = Split(shard, checkpoint)
    split.check(model)
    if by == "exact" and folded:
        runs = PrunedRuns(
            model,
            graph,
            tokens,
            metric,
            rest,
            reference,
            mean_over,
            seed,
            batch_size,
            forward_arguments,
        )
        scores = _folded_exact(graph, runs, progress, split)
    else:
        run = start_run(model, tokens, metric, batch_size, forward_arguments)
        values = rest_values(model, graph, rest, reference, run.shape, mean_over, seed)
        if by == "exact":
            scores = _exact(
                run, graph, metric, values, batch_size, progress, forward_arguments, split
            )
        else:
            scores = -edge_attribution(
                model,
                run.tokens,
                values,
                metric,
                heads=heads,
                split_qkv=split_qkv,
                method="gradient" if by == "gradient" else "integrated_inputs",
                n_steps=n_steps,
                progress=progress,
                checkpoint=checkpoint,
                shard=shard,
                **forward_arguments,
            ).scores
        if folded:
            scores = _summed(graph, scores)
    return EdgeScores(
        graph.senders, graph.receivers, scores, graph.n_iterations, folded, graph.parallel
    )


def _exact(
    run: BaseRun,
    graph: EdgeGraph,
    metric: Metric,
    values: dict[str, Tensor],
    batch_size: int | None,
    progress: bool,
    arguments: dict[str, Any],
    split: Split,
) -> Tensor:
    """One edge at a time: path patching from each sender to each receiver."""
    model, senders = run.model, graph.senders
    receivers = ["logits" if c.kind == "logits" else _site(c) for c in graph.receivers]
    freeze = ("attn_out",) if model.cfg.attn_only else ("attn_out", "mlp_out")
    rows: dict[int, Tensor] = {}

    def compute(number: int) -> Batch:
        without = path_patch(
            model,
            run.tokens,
            values,
            metric,
            [_site(senders[number])],
            receivers,
            freeze=freeze,
            batch_size=batch_size,
            progress=False,
            **arguments,
        )
        return {"losses": full.to(without) - without[0]}

    def take(number: int, batch: Batch) -> None:
        rows[number] = batch["losses"].to(run.tokens.device)

    def identify() -> dict[str, Any]:
        # Which edges there are is in what senders and receivers are called.
        labels = [c.label for c in (*senders, *graph.receivers)]
        return identify_cells(run, metric, values, nodes=labels, batch_size=batch_size)

    with torch.no_grad():
        full = scalar(metric(model(run.tokens, **arguments)), run.tokens.float())
        units = Run("exact edges", [1] * len(senders), identify, unit="sender")
        run_in_batches(units, compute, take, split, progress)
    nothing = torch.full((len(receivers),), torch.nan, dtype=full.dtype, device=full.device)
    losses = torch.stack([rows.get(number, nothing) for number in range(len(senders))])
    return torch.where(graph.exists.to(losses.device), losses, 0.0)


def _site(component: Component) -> Site:
    if component.kind == "embed":
        return Site("embed")
    return Site(_READS[component.kind], block=component.block, head=component.head)


def _folded_exact(graph: EdgeGraph, runs: PrunedRuns, progress: bool, split: Split) -> Tensor:
    """All edges that a folded one stands for at a time."""
    classes, whole = graph.edge_classes, Circuit.whole(graph)
    circuits = [whole.without(edges=classes == number) for number in range(graph.n_edges)]
    losses = runs.full - runs.metrics(circuits, progress, "folded edges", split)
    return torch.where(graph.exists.to(losses.device), losses[classes.to(losses.device)], 0.0)


def _summed(graph: EdgeGraph, scores: Tensor) -> Tensor:
    """Each folded edge's sum, at all edges that it stands for."""
    classes, exists = graph.edge_classes.to(scores.device), graph.exists.to(scores.device)
    sums = scores.new_zeros(graph.n_edges).index_add(0, classes[exists], scores[exists])
    return torch.where(exists, sums[classes], 0.0)
