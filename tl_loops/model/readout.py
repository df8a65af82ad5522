"""From states to logits: what follows the loop, early exits, and what a call returns."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.cache.places import check_width
from tl_loops.model.exits import ExitMode, exit_probabilities, select_state, threshold_iteration
from tl_loops.upstream import Output, apply_softcap


def enter_coda(
    self: Any, state: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """What happens to the last state between core and coda: a norm, a linear map, or nothing.

    Raises:
        ValueError: The state is none of this model.
    """
    check_width("state", state, self.cfg.d_model)
    for step in self.cfg.readout.before_coda:
        state = getattr(self, step.prefix)(state)
    return state


def unembed(
    model: Any, x: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch read d_vocab"]:
    """Logits of what leaves the final norm, at all positions unless a run reads only some."""
    return apply_softcap(model.unembed(x), model.cfg.output_logits_soft_cap)


def state_logits(
    self: Any, state: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch read d_vocab"]:
    """Logits of a state that leaves an iteration, of a model without a coda.

    Raises:
        LoopedSemanticsError: A coda stands between the states and the logits.
        ValueError: The state is none of this model.
    """
    after = self.cfg.readout
    after.refuse_coda()
    state = enter_coda(self, state)
    state = state.to(self.unembed.W_U.dtype)  # a cache may have been made in another
    return unembed(self, self.ln_final(state) if after.final_steps(normed=True) else state)


def logits_of(model: Any, mode: ExitMode, trajectory: Any, needed: bool) -> Tensor | None:
    """Logits of a run that went to its end, by its exit.

    Args:
        model: The model that ran.
        mode: Which state is read out.
        trajectory: What the run gave.
        needed: Whether logits are returned. If not, the final norm still runs, for its hooks.
    """
    if mode.early:
        return _exit_logits(model, mode, trajectory.states, trajectory.gates)
    x = trajectory.resid if trajectory.normed else model.ln_final(trajectory.resid)
    return unembed(model, x) if needed else None


def _exit_logits(model: Any, mode: ExitMode, states: list[Tensor], gates: list[Tensor]) -> Tensor:
    if mode.at is not None:
        return state_logits(model, states[mode.at])
    stacked = torch.stack(gates)
    if mode.threshold is not None:
        iteration = threshold_iteration(stacked, mode.threshold)
        return state_logits(model, select_state(torch.stack(states), iteration))
    weights = exit_probabilities(stacked).to(states[0].dtype).unsqueeze(-1)
    logits = [w * state_logits(model, s) for w, s in zip(weights, states, strict=True)]
    return torch.stack(logits).sum(0)


def output(
    model: Any,
    return_type: str | None,
    logits: Tensor | None,
    tokens: Tensor | None,
    mask: Tensor | None,
    per_token: bool,
) -> Any:
    """What a call returns: logits, loss, both or nothing.

    Args:
        model: Gives the loss.
        return_type: ``"logits"``, ``"loss"``, ``"both"`` or ``None``.
        logits: [batch, pos, d_vocab].
        tokens: [batch, pos].
        mask: [batch, pos], 0 at padding, which the loss leaves out.
        per_token: Whether the loss keeps its position axis.

    Raises:
        ValueError: A loss without tokens.
    """
    if return_type in (None, "logits"):
        return None if return_type is None else logits
    assert logits is not None
    if tokens is None:
        raise ValueError("a loss needs tokens: pass tokens=[batch, pos]")
    loss = model.loss_fn(logits, tokens, mask, per_token=per_token)
    return loss if return_type == "loss" else Output(logits, loss)
