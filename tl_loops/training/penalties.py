"""Penalties that make a loop settle: on its state's growth, its step, and its map's Jacobian."""

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.metrics.padding import statistic_dtype


@checked
def growth_penalty(states: Float[Tensor, "iteration batch pos d_model"]) -> Float[Tensor, ""]:
    """Mean over steps and positions of (log ‖s_{t+1}‖/‖s_t‖)², where the state grows.

    0 where no state is longer than the one before. A norm before the readout does not see the
    length of the state, so that nothing else keeps it from growing (2606.24898).

    Args:
        states: At least two.

    Raises:
        ValueError: There is no step between states.
    """
    norms = _checked(states).norm(dim=-1)
    tiny = torch.finfo(norms.dtype).tiny
    growth = norms[1:].clamp_min(tiny).log() - norms[:-1].clamp_min(tiny).log()
    return growth.relu().square().mean()


@checked
def settling_penalty(states: Float[Tensor, "iteration batch pos d_model"]) -> Float[Tensor, ""]:
    """Mean over steps and positions of ‖s_{t+1} - s_t‖²/‖s_t‖², 0 at a fixed point.

    ‖s_t‖ has no gradient, so that the penalty cannot be lowered by longer states.

    Args:
        states: At least two.

    Raises:
        ValueError: There is no step between states.
    """
    states = _checked(states)
    length = states[:-1].detach().square().sum(-1)
    step = (states[1:] - states[:-1]).square().sum(-1)
    return (step / length.clamp_min(torch.finfo(length.dtype).tiny)).mean()


@checked
def jacobian_penalty(
    entering: Float[Tensor, "batch pos d_model"],
    leaving: Float[Tensor, "batch pos d_model"],
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """‖J‖_F² per dimension of the state, by one direction of Hutchinson's estimate.

    E‖vᵀJ‖² = ‖J‖_F² for v ~ N(0, I), where J is the Jacobian of the map from ``entering`` to
    ``leaving``; 1 for the identity.

    Args:
        entering: A state in the graph of ``leaving``.
        leaving: The state one iteration later.
        generator: Of v, on the CPU.

    Raises:
        ValueError: ``leaving`` has no gradient with respect to ``entering``.

    Source: 2605.26733 penalises this norm in training.
    """
    shape, dtype = leaving.shape, statistic_dtype(leaving)
    v = torch.randn(shape, generator=generator, dtype=dtype, device="cpu").to(leaving)
    if not (leaving.requires_grad and entering.requires_grad):
        raise ValueError("the Jacobian needs states with a graph: run with gradients enabled")
    (product,) = torch.autograd.grad(
        leaving, entering, v, create_graph=True, retain_graph=True, allow_unused=True
    )
    if product is None:
        raise ValueError("leaving does not depend on entering: pass the states of one iteration")
    return product.to(dtype).square().mean()


def _checked(states: Tensor) -> Tensor:
    if states.shape[0] < 2:
        raise ValueError(f"a step needs two states, got {states.shape[0]}")
    return states.to(statistic_dtype(states))
