"""Training losses of loops that halt or route: ponder costs, expected losses, load balance."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.arguments import check_at_least, checked
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.model import Model
from tl_loops.upstream import left_as_it_was


@checked
def act_ponder_cost(
    halting: Float[Tensor, "iteration *batch"],
) -> Float[Tensor, "*batch"]:
    """The ponder cost N + R of ACT: iterations until halting plus the remainder.

    Only R has a gradient. Add its mean times a small τ to the loss.

    Args:
        halting: Halting probabilities p_t, at least 0, summing to 1 over the iterations
            (``iter.{t}.hook_halting`` of a model with ``halting="act"``).

    Raises:
        ValueError: There is no iteration.

    Source: Graves 2016 (1603.08983), equations 6 and 9.
    """
    if not halting.shape[0]:
        raise ValueError("halting has no iterations; pass the probability of at least one")
    counted = halting > 0
    numbers = torch.arange(1, halting.shape[0] + 1, device=halting.device)
    numbers = numbers.view(-1, *[1] * (halting.ndim - 1)) * counted
    n_steps, last = numbers.max(dim=0)
    remainder = halting.gather(0, last.unsqueeze(0)).squeeze(0)
    return n_steps.to(halting.dtype) + remainder


@checked
def geometric_prior(n_iterations: int, rate: float) -> Float[Tensor, "iteration"]:
    """The geometric distribution λ (1 - λ)^t over the iterations, renormalised.

    Args:
        n_iterations: At least 1.
        rate: λ, above 0 and at most 1; 1/λ iterations are expected before truncation.

    Source: PonderNet (2107.05407), section 2.3.
    """
    check_at_least(1, n_iterations=n_iterations)
    if not 0.0 < rate <= 1.0:
        raise ValueError(f"rate is a probability above 0, got {rate}")
    weights = rate * (1.0 - rate) ** torch.arange(n_iterations, dtype=torch.float64)
    return (weights / weights.sum()).float()


@checked
def ponder_loss(
    losses: Float[Tensor, "iteration *batch"],
    halting: Float[Tensor, "iteration *batch"],
    rate: float = 0.2,
    beta: float = 0.01,
) -> Float[Tensor, ""]:
    """PonderNet's objective: the expected loss, plus β times a divergence from a geometric prior.

    mean over all tokens of Σ_t p_t L_t + β KL(p ‖ geometric(λ)).

    Args:
        losses: L_t, the loss of the output read after each iteration.
        halting: p_t, summing to 1 over the iterations.
        rate: λ of the prior.
        beta: β.

    Raises:
        ValueError: ``rate`` is no probability above 0.

    Source: PonderNet (2107.05407), equation 4.
    """
    prior = geometric_prior(halting.shape[0], rate).to(halting)
    prior = prior.view(-1, *[1] * (halting.ndim - 1))
    tiny = _tiny(halting)
    ratio = halting.clamp_min(tiny).log() - prior.clamp_min(tiny).log()
    divergence = torch.where(halting > 0, halting * ratio, 0.0).sum(0)
    return ((halting * losses).sum(0) + beta * divergence).mean()


@checked
def expected_exit_loss(
    losses: Float[Tensor, "iteration *batch"],
    probabilities: Float[Tensor, "iteration *batch"],
    beta: float = 0.05,
) -> Float[Tensor, ""]:
    """Ouro's first objective: the expected loss minus β times the entropy of the exits.

    mean over all tokens of Σ_t p_t L_t - β H(p), the evidence bound with a uniform prior; without
    the entropy the gate falls onto one iteration.

    Args:
        losses: L_t, the loss of the output read after each iteration.
        probabilities: p_t of leaving there, summing to 1
            (:func:`tl_loops.metrics.exit_distribution` of the gates).
        beta: β, in nats.

    Source: Ouro (2510.25741), the objective of its first stage.
    """
    entropy = -torch.xlogy(probabilities, probabilities.clamp_min(_tiny(probabilities))).sum(0)
    return ((probabilities * losses).sum(0) - beta * entropy).mean()


@checked
@left_as_it_was
def ponder_training_loss(
    model: Model, tokens: Int[Tensor, "batch pos"], rate: float = 0.2, beta: float = 0.01
) -> Float[Tensor, ""]:
    """:func:`ponder_loss` of next-token prediction, in one forward pass.

    Args:
        model: A model with ``halting="ponder"``.
        tokens: At least 2 positions.
        rate: λ of the prior.
        beta: β.

    Raises:
        LoopedSemanticsError: The model halts otherwise, or not at all.
    """
    halts = getattr(model.cfg, "halting", None)
    if halts != "ponder":
        raise LoopedSemanticsError(
            f"this model has halting={halts!r}: the expected loss needs "
            "halting='ponder'; with 'act' add act_ponder_cost to the model's own loss"
        )
    kept: dict[str, list[Tensor]] = {"hook_state_out": [], "hook_halting": []}

    def keep(value: Tensor, hook: Any) -> None:
        kept[hook.name.rsplit(".", 1)[-1]].append(value)

    with model.hooks([(lambda name: name.endswith(tuple(kept)), keep)]):
        model(tokens, return_type=None)
    losses = []
    for state in kept["hook_state_out"]:
        logits = model.state_logits(state)[:, :-1]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(wide.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        losses.append(loss.view(tokens.shape[0], -1))
    halting = torch.stack(kept["hook_halting"]).squeeze(-1)[..., :-1]
    return ponder_loss(torch.stack(losses).to(halting), halting, rate, beta)


@checked
def routing_balance_loss(weights: Float[Tensor, "*batch depth"]) -> Float[Tensor, ""]:
    """How unevenly a router shares tokens out: n Σ_i f_i P_i, which is 1 when all depths are equal.

    f_i is the part of the tokens that takes depth i, P_i the mean weight of depth i.

    Args:
        weights: ``hook_router_weights`` of a model with ``router="token_choice"``.

    Raises:
        ValueError: There is no depth.

    Source: the balancing loss of 2507.10524 (token-choice routing), after Fedus et al. 2021
    (2101.03961), equation 4.
    """
    n_depths = weights.shape[-1]
    if not n_depths:
        raise ValueError("weights has no depths to share tokens between")
    flat = weights.reshape(-1, n_depths)
    chosen = F.one_hot(flat.argmax(-1), n_depths).to(flat).mean(0)
    return n_depths * (chosen * flat.mean(0)).sum()


def _tiny(values: Tensor) -> float:
    """The least normal number of a dtype, below which a logarithm is cut."""
    return torch.finfo(values.dtype).tiny
