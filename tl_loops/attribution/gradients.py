"""Gradients of a metric at hook points, along a path from the corrupted to the clean run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.model import Model
from tl_loops.runs.cells import named_hooks
from tl_loops.runs.inputs import FORWARD_ARGUMENTS
from tl_loops.runs.read_positions import ReadPositions

Metric = Callable[[Tensor], Any]
Method = Literal["gradient", "integrated_inputs", "integrated_activation"]
Hooks = list[tuple[str, Callable]]


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise on keyword arguments that the model's forward pass would not get.

    Raises:
        TypeError: There is one; the message lists those that it gets.
    """
    for name in arguments:
        if name not in FORWARD_ARGUMENTS:
            raise TypeError(
                f"unknown argument {name!r}; runs can be given {', '.join(FORWARD_ARGUMENTS)}"
            )


def check_integrates(model: Model, method: Method) -> None:
    """Raise on a path of the embedding alone where tokens enter elsewhere, too.

    Raises:
        LoopedSemanticsError: ``"integrated_inputs"`` on a model with value embeddings.
    """
    if method == "integrated_inputs" and getattr(model.cfg, "value_embeddings", False):
        raise LoopedSemanticsError(
            "method='integrated_inputs' moves the embedding from the corrupted to the clean "
            "prompt, but in this model tokens also enter through value embeddings; use 'gradient' "
            "or 'integrated_activation'"
        )


def check_differentiable(metric: Metric, model: Model, shape: tuple[int, ...]) -> None:
    """Call a metric once on random logits, so that one without a gradient fails before any pass.

    Args:
        metric: Maps [batch, pos, d_vocab] to a scalar.
        model: Gives device and dtype.
        shape: Of the logits.

    Raises:
        ValueError: The metric is not callable, or gives no scalar tensor that can be
            differentiated.
    """
    if not callable(metric):
        raise ValueError(f"metric must be a function of the logits, got {type(metric).__name__}")
    like = model.embed.W_E
    with differentiating():
        draw = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.detach())
        value = metric(draw.requires_grad_())
    if not isinstance(value, Tensor):
        raise ValueError(
            f"metric must return a tensor that can be differentiated, got {type(value).__name__}; "
            "leave out .item()"
        )
    if value.numel() != 1:
        raise ValueError(
            f"metric must map the logits {list(shape)} to a scalar, but it returns a tensor of "
            f"shape {list(value.shape)}: reduce over batch and positions, for example with .mean()"
        )
    if value.is_complex():
        raise ValueError("metric must give a real number, got a complex one")
    if not value.requires_grad:
        raise ValueError(
            "metric has no gradient with respect to the logits (an argmax, a rank, .detach()); "
            "use a smooth one such as a logit difference"
        )


@contextmanager
def differentiating() -> Iterator[None]:
    """A block of code in which gradients are recorded, whatever the mode outside."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def recordable(value: Any) -> Any:
    """A copy of a tensor made in inference mode, which autograd cannot take; or the value."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def keeping(names: Iterable[str], kept: dict[str, Tensor]) -> Hooks:
    """Hooks that keep activations such that the metric can be differentiated by them.

    With frozen weights the first activation starts the graph, and the later ones continue it.
    """

    def keep(name: str, x: Tensor) -> Tensor:
        kept[name] = x if x.requires_grad else x.detach().requires_grad_()
        return kept[name]

    return named_hooks(names, keep)


def path_nodes(method: Method, n_steps: int) -> list[tuple[float, float]]:
    """Where along the path gradients are taken, and with which weight.

    Args:
        method: ``"gradient"``: once, at the corrupted run. Else Gauss-Legendre nodes on (0, 1),
            which are exact for polynomials up to degree ``2 * n_steps - 1``.
        n_steps: Number of nodes.

    Returns:
        Pairs (alpha, weight); the weights sum to 1.

    Raises:
        ValueError: Unknown method, or no step.
    """
    if method not in ("gradient", "integrated_inputs", "integrated_activation"):
        raise ValueError(
            "method must be 'gradient', 'integrated_inputs' or 'integrated_activation', "
            f"got {method!r}"
        )
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, got {n_steps}")
    if method == "gradient":
        return [(0.0, 1.0)]
    nodes, weights = np.polynomial.legendre.leggauss(n_steps)
    return [
        ((1.0 + x) / 2.0, w / 2.0) for x, w in zip(nodes.tolist(), weights.tolist(), strict=True)
    ]


def moved(clean: Tensor, alpha: float) -> Callable:
    """A hook that moves an activation the fraction ``alpha`` of its way to the clean one."""

    def hook_function(x: Tensor, hook: Any) -> Tensor | None:
        return x + alpha * difference(clean.to(x), x) if alpha else None

    return hook_function


def difference(clean: Tensor, corrupted: Tensor) -> Tensor:
    """``clean - corrupted``, 0 where both are one infinity (masked attention scores)."""
    return torch.where(clean == corrupted, 0.0, clean - corrupted)


def run_metric(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    metric: Metric,
    hooks: Hooks,
    arguments: Mapping[str, Any],
    where: ReadPositions | None = None,
) -> Float[Tensor, ""]:
    """The metric of one run with hooks; gradients are recorded where they are enabled."""
    given = {name: recordable(value) for name, value in arguments.items()}
    call = partial(model.run_with_hooks, recordable(tokens), fwd_hooks=hooks, **given)
    return metric((where or ReadPositions()).run(model, call)).reshape(())


def metric_gradients(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    metric: Metric,
    names: Iterable[str],
    arguments: Mapping[str, Any],
    where: ReadPositions,
    before: Sequence[tuple[str, Callable]] = (),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Activations of one run and the metric's gradient by each, through all later iterations.

    Args:
        model: A looped model or a plain HookedTransformer.
        tokens: The prompt.
        metric: Of the logits.
        names: Canonical hook names.
        arguments: Of the forward pass.
        where: Where the metric reads logits.
        before: Hooks that act before activations are kept.

    Returns:
        Activations and gradients by name, detached. A gradient is 0 where the metric does not
        depend on the activation.
    """
    names = list(names)
    kept: dict[str, Tensor] = {}
    hooks: Hooks = [*before, *keeping(names, kept)]
    with differentiating():
        value = run_metric(model, tokens, metric, hooks, arguments, where)
        gradients = torch.autograd.grad(value, [kept[name] for name in names], allow_unused=True)
    return (
        {name: kept[name].detach() for name in names},
        {
            name: torch.zeros_like(kept[name]) if gradient is None else gradient
            for name, gradient in zip(names, gradients, strict=True)
        },
    )


def effect(
    gradient: Float[Tensor, "..."], delta: Float[Tensor, "..."], kept_dims: int
) -> Float[Tensor, "..."]:
    """Sum of ``gradient * delta`` over the batch and the trailing axes, in float32 or better.

    Where nothing changes the effect is 0, also where the gradient is undefined (the scores of a
    padded query that sees no key).

    Args:
        gradient: [batch, ...].
        delta: The same shape.
        kept_dims: How many axes after the batch are kept.
    """
    working = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    product = gradient.to(working) * delta.to(working)
    product = torch.where(delta == 0, 0.0, product).sum(0)
    return product.flatten(kept_dims).sum(-1) if product.ndim > kept_dims else product
