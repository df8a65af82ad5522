"""Step-decomposed influence (SDI): training examples on queries, split by iteration."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_loops.arguments import checked
from tl_loops.attribution.gradients import (
    Metric,
    check_arguments,
    check_differentiable,
    run_metric,
)
from tl_loops.attribution.split_gradients import IterationGradients
from tl_loops.attribution.weight_uses import WeightUses, split_weights
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout
from tl_loops.metrics.padding import statistic_dtype
from tl_loops.runs.batches import check_batch_size, token_prompts
from tl_loops.runs.inputs import run_inputs
from tl_loops.runs.scoring import logits_shape
from tl_loops.upstream import TextOrTokens, left_as_it_was

ExampleLoss = Callable[[Tensor, Tensor], Tensor]
"""Maps the logits [1, pos, d_vocab] and tokens [1, pos] of one example to a scalar."""


@checked
@left_as_it_was
def iteration_gradients(
    model: Model,
    input: TextOrTokens,
    metric: Metric,
    weights: str | Sequence[str] = "core",
    **forward_arguments: Any,
) -> IterationGradients:
    """Gradients of a metric with respect to shared weights, through each iteration alone.

    One forward and one backward pass. For a scalar of something else than the logits, run the model
    inside of :func:`split_weights`.

    Args:
        model: A looped model that runs its own blocks.
        input: Text, or tokens [batch, pos] or [pos].
        metric: Maps the logits [batch, pos, d_vocab] to a scalar tensor with a gradient. It is
            called once on random numbers beforehand.
        weights: As for :func:`split_weights`.
        **forward_arguments: ``attention_mask``, ``initial_state``, ``exit_at``,
            ``exit_threshold`` or ``weighted_exit`` of the run.

    Raises:
        NoLoopError: The model has no loop.
        LoopedSemanticsError: A bridge, whose iterations have one module.
        ValueError: Prompts that cannot be fed, a weight that is not known, or a metric that cannot
            be differentiated.
        TypeError: An argument that the forward pass does not take.

    Source: the gradients of 2602.10097.
    """
    require_layout(model)
    check_arguments(forward_arguments)
    fed = run_inputs(model, input, forward_arguments)
    check_differentiable(metric, model, logits_shape(model, fed.tokens))
    with split_weights(model, weights) as uses:
        value = run_metric(model, fed.tokens, metric, [], fed.forward_arguments)
        return uses.gradients(value)


@dataclass(frozen=True, eq=False)
class StepInfluence:
    """Inner products of the gradients of training examples and queries, by iteration.

    Results of several checkpoints add up: TracIn is the sum of their matrices times their learning
    rates.

    Attributes:
        matrix: M[i, j, s, t] = Σ_p ⟨φ_{i,s}, φ_{j,t}⟩, [train, query, iteration, iteration]: how a
            step on example i through iteration s acts on the loss of query j through iteration t,
            over weights p.
    """

    matrix: Float[Tensor, "train query iteration iteration"]

    @property
    def sdi(self) -> Float[Tensor, "train query iteration"]:
        """SDI[i, j, t] = Σ_p ⟨Σ_s φ_{i,s}, φ_{j,t}⟩: through which iteration of the query."""
        return self.matrix.sum(2)

    @property
    def by_training_iteration(self) -> Float[Tensor, "train query iteration"]:
        """Σ_p ⟨φ_{i,s}, Σ_t φ_{j,t}⟩: through which iteration of the training example."""
        return self.matrix.sum(3)

    @property
    def tracin(self) -> Float[Tensor, "train query"]:
        """⟨∇L_i, ∇L_j⟩, the sum of SDI over iterations: what TracIn gives for these weights."""
        return self.matrix.sum((2, 3))

    def __repr__(self) -> str:
        n_train, n_query, T, _ = self.matrix.shape
        return f"StepInfluence({n_train} examples on {n_query} queries, {T} iterations)"


@checked
@left_as_it_was
def step_influence(
    model: Model,
    train: Iterable[Any],
    queries: Iterable[Any],
    loss: ExampleLoss | None = None,
    *,
    weights: str | Sequence[str] = "core",
    n_queries_at_once: int = 8,
    progress: bool = False,
) -> StepInfluence:
    """How each training example acts on each query, through which iterations.

    One forward and one backward pass an example, and the gradients of ``n_queries_at_once`` queries
    (iterations times the weights, each) in memory; examples are run again for each such group.

    Args:
        model: A looped model that runs its own blocks.
        train: Strings, or 1-D tensors of tokens.
        queries: Likewise.
        loss: Maps logits [1, pos, d_vocab] and tokens [1, pos] of one example to a scalar;
            ``None``: the model's own loss of predicting the next token.
        weights: Which, as for :func:`split_weights`; only such as iterations alone use, so that the
            sum is exact.
        n_queries_at_once: How many queries' gradients are held.
        progress: Whether to show a progress bar.

    Returns:
        In float32 (float64 for a float64 model).

    Raises:
        NoLoopError: The model has no loop.
        LoopedSemanticsError: A bridge, whose iterations have one module.
        ValueError: A prompt cannot be fed, a weight is not known or is used outside of the
            iterations, too, or the loss gives no scalar with a gradient.
        TypeError: Prompts are neither text nor tensors, or both.

    Source: step-decomposed influence, 2602.10097; TracIn, 2002.08484.
    """
    check_batch_size(n_queries_at_once)
    examples = token_prompts(model, train, at_least=2 if loss is None else 1)
    asked = token_prompts(model, queries, at_least=2 if loss is None else 1)
    device = next(model.parameters()).device
    columns = []
    with split_weights(model, weights) as uses:

        def gradients(tokens: Int[Tensor, "pos"]) -> IterationGradients:
            found = uses.gradients(_loss(model, tokens[None].to(device), loss))
            for name in found.outside:
                raise ValueError(
                    f"{name!r} is used outside of the iterations, too, so the influence through "
                    "iterations would not sum to all of it: leave it out of weights"
                )
            return found

        starts = range(0, len(asked), n_queries_at_once)
        with tqdm(
            total=len(asked) + len(starts) * len(examples), desc="influence", disable=not progress
        ) as bar:
            for start in starts:
                held = []
                for tokens in asked[start : start + n_queries_at_once]:
                    held.append(gradients(tokens))
                    bar.update()
                rows = []
                for tokens in examples:
                    own = gradients(tokens)
                    rows.append(torch.stack([_products(own, other, uses) for other in held]))
                    bar.update()
                columns.append(torch.stack(rows))
    return StepInfluence(torch.cat(columns, dim=1))


def _loss(model: Model, tokens: Int[Tensor, "1 pos"], loss: ExampleLoss | None) -> Tensor:
    # With an explicit mask no token is taken for padding because it has the padding's id.
    mask = torch.ones_like(tokens)
    if loss is None:
        return model(tokens, return_type="loss", attention_mask=mask)
    return loss(model(tokens, attention_mask=mask), tokens)


def _products(
    a: IterationGradients, b: IterationGradients, uses: WeightUses
) -> Float[Tensor, "iteration iteration"]:
    """Σ_p ⟨φ_{a,s}, φ_{b,t}⟩ for all pairs of iterations."""
    total = None
    for name in uses.names:
        x, y = (g.by_iteration[name].flatten(1) for g in (a, b))
        dtype = statistic_dtype(x)
        part = x.to(dtype) @ y.to(dtype).T
        total = part if total is None else total + part
    assert total is not None
    return total
