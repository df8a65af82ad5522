"""Edge attribution: what each component sends to each later one, across iterations."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.attribution.components import Component, receivers_of, senders_of
from tl_loops.attribution.gradients import (
    Hooks,
    Metric,
    check_arguments,
    check_differentiable,
    check_integrates,
    differentiating,
    effect,
    metric_gradients,
    moved,
    path_nodes,
    run_metric,
)
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout
from tl_loops.printing import prints_short
from tl_loops.runs.activations import check_cache, find_activation, take
from tl_loops.runs.cells import named_hooks
from tl_loops.runs.in_batches import Batch, Run, Split, run_in_batches
from tl_loops.runs.inputs import Positions, run_inputs
from tl_loops.runs.read_positions import ReadPositions
from tl_loops.runs.scoring import identify_runs, logits_shape, read_at
from tl_loops.runs.shards import Shards
from tl_loops.upstream import Cache, TextOrTokens, left_as_it_was

_EMBED = "hook_embed"


@prints_short
@dataclass(frozen=True, eq=False)
class EdgeAttribution:
    """Estimated effect of every edge, and the components that it joins.

    Attributes:
        senders: Components that write, in the order of the run.
        receivers: Components that read, in the order of the run.
        scores: Change of the metric if the receiver alone saw the sender's clean output, to first
            order; 0 where the sender does not come before the receiver, [sender, receiver].
        n_iterations: Iterations of the run.
    """

    senders: tuple[Component, ...]
    receivers: tuple[Component, ...]
    scores: Float[Tensor, "sender receiver"]
    n_iterations: int

    @checked
    def top(self, k: int = 10) -> list[tuple[Component, Component, float]]:
        """The k edges of largest magnitude, largest first.

        Raises:
            ValueError: ``k`` is below 0.
        """
        if k < 0:
            raise ValueError(f"k must be at least 0, got {k}")
        order = self.scores.abs().flatten().argsort(descending=True, stable=True)[:k].tolist()
        rows = [divmod(index, len(self.receivers)) for index in order]
        return [(self.senders[s], self.receivers[r], float(self.scores[s, r])) for s, r in rows]

    def by_iteration(self) -> Float[Tensor, "from_iteration to_iteration"]:
        """Sum of the scores from one iteration's components to another's; the core alone."""
        total = self.scores.new_zeros(self.n_iterations, self.n_iterations)
        for s, sender in enumerate(self.senders):
            for r, receiver in enumerate(self.receivers):
                if sender.iteration is not None and receiver.iteration is not None:
                    total[sender.iteration, receiver.iteration] += self.scores[s, r]
        return total


@checked
@left_as_it_was
def edge_attribution(
    model: Model,
    corrupted_tokens: TextOrTokens,
    clean_cache: Cache,
    metric: Metric,
    *,
    heads: bool = False,
    split_qkv: bool = False,
    method: Literal["gradient", "integrated_inputs"] = "gradient",
    n_steps: int = 8,
    progress: bool = True,
    logits_at: Positions = "all",
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
    **forward_arguments: Any,
) -> EdgeAttribution:
    """Attribute a metric to the edges between components at (iteration, layer), all at once.

    An edge from u to v is the path along the residual stream alone: past the norms on it, the norm
    between iterations, the injection and the norm before the coda, but through no other attention
    or MLP. Its score is (clean output of u - corrupted output) times the derivative of v's output
    along that path times the gradient of the metric by v's output. The stream is linearised where
    it is not linear. In a linear model a receiver's scores sum to its own attribution.

    Args:
        model: A looped model.
        corrupted_tokens: [batch, pos], or text.
        clean_cache: The clean run's cache with ``hook_embed``, ``hook_mlp_out`` and
            ``hook_attn_out`` (with ``heads``: ``attn.hook_z``) of every block.
        metric: Maps the logits [batch, pos, d_vocab] to a scalar tensor with a gradient.
        heads: Tell heads apart, as senders and as receivers.
        split_qkv: Tell queries, keys and values of a receiving head apart; needs ``heads``.
        method: ``"gradient"``: at the corrupted run. ``"integrated_inputs"``: averaged while the
            embedding moves from the corrupted to the clean prompt.
        n_steps: Number of points on that path.
        progress: Whether to show a progress bar.
        logits_at: As in :func:`tl_loops.patching.activation_patch`.
        checkpoint: A file to which the edges of every receiver are added once they are done; the
            same call goes on from it, to the same bits.
        shard: As in :func:`tl_loops.attribution.attribution_patch`.
        **forward_arguments: ``attention_mask`` or ``initial_state`` of every run (exits too).

    Returns:
        Scores in float32 (float64 for a float64 model), without gradients. One backward pass a
        receiver, along the residual stream.

    Raises:
        TypeError: The model has no layout, or an argument that the forward pass does not take.
        ValueError: Prompts of different length, a cache that lacks an activation or comes from
            another number of iterations, a metric that cannot be differentiated, ``split_qkv``
            without ``heads``. Nothing has been run then.
        CheckpointError: As in :func:`tl_loops.attribution.attribution_patch`.

    Source: edge attribution patching, 2310.10348, section 2; with integrated gradients 2403.17806.
    """
    check_arguments(forward_arguments)
    layout = require_layout(model)
    split = Split(shard, checkpoint)
    split.check(model)
    if split_qkv and not heads:
        raise ValueError("split_qkv tells apart what a head reads: also pass heads=True")
    if method not in ("gradient", "integrated_inputs"):
        raise ValueError(f"method must be 'gradient' or 'integrated_inputs', got {method!r}")
    nodes = path_nodes(method, n_steps)
    check_integrates(model, method)
    fed = run_inputs(model, corrupted_tokens, forward_arguments)
    tokens, forward_arguments = fed.tokens, fed.forward_arguments
    senders = senders_of(model, layout, heads)
    receivers = receivers_of(model, layout, heads, split_qkv)
    written = list(dict.fromkeys(sender.name for sender in senders))
    check_cache(clean_cache, model, written)
    clean = {name: _clean(model, clean_cache, name, fed.shape) for name in written}
    where = read_at(logits_at, fed)
    shape = logits_shape(model, tokens, where)
    check_differentiable(metric, model, shape)

    read = list(dict.fromkeys(receiver.name for receiver in receivers if receiver.name))
    corrupted, _ = metric_gradients(model, tokens, metric, written, forward_arguments, where)
    delta = {name: clean[name].to(corrupted[name]) - corrupted[name] for name in written}
    columns = [torch.full((len(senders),), torch.nan)] * len(receivers)
    graphs: dict[int, _Graph] = {}  # of the present point of the path alone
    pairs = [(node, receiver) for node in range(len(nodes)) for receiver in range(len(receivers))]

    def compute(number: int) -> Batch:
        node, receiver = pairs[number]
        alpha, weight = nodes[node]
        if node not in graphs:
            graphs.clear()
            before: Hooks = [(_EMBED, moved(clean[_EMBED], alpha))]
            given = (model, tokens, metric)
            _, gradients = metric_gradients(*given, read, forward_arguments, where, before)
            graphs[node] = _Graph(
                *given, read, written, gradients, forward_arguments, where, before
            )
        pulled = graphs[node].pull_back(receivers[receiver])
        return {"scores": weight * _column(senders, pulled, delta)}

    def take(number: int, batch: Batch) -> None:
        node, receiver = pairs[number]
        column = batch["scores"].to(tokens.device)
        columns[receiver] = columns[receiver] + column if node else column

    def identify() -> dict[str, Any]:
        what = {"method": method, "n_steps": n_steps, "heads": heads, "split_qkv": split_qkv}
        return identify_runs(model, fed, metric, clean, shape, where, **what)

    run = Run("edges", [1] * len(pairs), identify, unit="receiver")
    if run_in_batches(run, compute, take, split, progress) is not None:
        columns = [torch.full_like(columns[0], torch.nan)] * len(receivers)
    return EdgeAttribution(senders, receivers, torch.stack(columns, dim=1), layout.n_iterations)


class _Graph:
    """The graph of one run in which every sender's output is cut from what made it.

    So a sender reaches a receiver along the residual stream alone.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tensor,
        metric: Metric,
        read: Sequence[str],
        written: Sequence[str],
        gradients: Mapping[str, Tensor],
        arguments: Mapping[str, Any],
        where: ReadPositions,
        before: Hooks,
    ):
        self.gradients = gradients
        self.leaves: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

        def cut(name: str, x: Tensor) -> Tensor:
            self.outputs[name] = x
            self.leaves[name] = x.detach().requires_grad_()
            return self.leaves[name]

        hooks: Hooks = [*before, *named_hooks(written, cut)]
        hooks += named_hooks([n for n in read if n not in written], self.outputs.__setitem__)
        with differentiating():
            self.value = run_metric(model, tokens, metric, hooks, arguments, where)

    def pull_back(self, receiver: Component) -> dict[str, Tensor | None]:
        """What a receiver's gradient is at each sender's output, by hook name."""
        if receiver.kind == "logits":
            output, cotangent = self.value, torch.ones_like(self.value)
        else:
            output = self.outputs[receiver.name]
            cotangent = self.gradients[receiver.name]
            if receiver.head is not None:
                only = torch.zeros_like(cotangent)
                only[:, :, receiver.head] = cotangent[:, :, receiver.head]
                cotangent = only
        if not output.requires_grad:
            return dict.fromkeys(self.leaves)
        with differentiating():
            found = torch.autograd.grad(
                output,
                list(self.leaves.values()),
                cotangent,
                retain_graph=True,
                allow_unused=True,
            )
        return dict(zip(self.leaves, found, strict=True))


def _column(
    senders: tuple[Component, ...],
    pulled: Mapping[str, Tensor | None],
    delta: Mapping[str, Tensor],
) -> Float[Tensor, "sender"]:
    """Each sender's (clean - corrupted) times what one receiver pulls back to it."""
    effects: dict[str, Tensor] = {}
    for name, gradient in pulled.items():
        if gradient is not None:
            # [pos, head] of z, else [pos]
            kept = 2 if name.endswith("hook_z") else 1
            effects[name] = effect(gradient, delta[name].expand_as(gradient), kept).sum(0)
    like = next(iter(delta.values()))
    working = torch.float64 if like.dtype == torch.float64 else torch.float32
    nothing = torch.zeros((), dtype=working, device=like.device)
    return torch.stack(
        [
            nothing
            if sender.name not in effects
            else effects[sender.name]
            if sender.head is None
            else effects[sender.name][sender.head]
            for sender in senders
        ]
    )


def _clean(model: Model, cache: Cache, name: str, shape: tuple[int, int]) -> Tensor:
    short = name.rsplit("hook_", 1)[-1]
    activation = find_activation(model, short)
    return take(cache, activation, name, shape, activation.n_heads(model.cfg))
