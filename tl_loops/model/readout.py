"""From states to logits: what follows the loop, early exits, and what a call returns."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.mechanisms.coda_input import CodaInput
from tl_loops.model.exits import ExitMode, exit_probabilities, select_state, threshold_iteration
from tl_loops.model.hooks import CoordinateHooks
from tl_loops.nn.norm import Norm
from tl_loops.upstream import Output, apply_softcap


class LoopedReadout(CoordinateHooks):
    """Reads states out."""

    ln_coda: Norm
    coda_in: CodaInput

    def enter_coda(
        self, state: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """What happens to the last state between core and coda: a norm, a linear map, or nothing.

        Args:
            state: What leaves the last iteration.

        Returns:
            What enters the first block of the coda; without a coda, the final norm.
        """
        for step in self.cfg.readout.before_coda:
            state = self.ln_coda(state) if step.kind == "norm" else self.coda_in(state)
        return state

    def _unembed(self, x: Tensor) -> Float[Tensor, "batch pos d_vocab"]:
        return apply_softcap(self.unembed(x), self.cfg.output_logits_soft_cap)

    def state_logits(
        self, state: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of a state that leaves an iteration, of a model without a coda.

        ``model.state_logits(cache["state_out", t])`` is ``model(tokens, exit_at=t)``.

        Raises:
            LoopedSemanticsError: A coda stands between the states and the logits.
        """
        readout = self.cfg.readout
        readout.refuse_coda()
        state = self.enter_coda(state)
        return self._unembed(self.ln_final(state) if readout.final_steps(normed=True) else state)

    def _exit_logits(self, mode: ExitMode, states: list[Tensor], gates: list[Tensor]) -> Tensor:
        if mode.at is not None:
            return self.state_logits(states[mode.at])
        stacked = torch.stack(gates)
        if mode.threshold is not None:
            iteration = threshold_iteration(stacked, mode.threshold)
            return self.state_logits(select_state(torch.stack(states), iteration))
        weights = exit_probabilities(stacked).to(states[0].dtype).unsqueeze(-1)
        logits = [w * self.state_logits(s) for w, s in zip(weights, states, strict=True)]
        return torch.stack(logits).sum(0)

    def _output(
        self,
        return_type: str | None,
        logits: Tensor | None,
        tokens: Tensor | None,
        attention_mask: Tensor | None,
        per_token: bool,
    ) -> Any:
        if return_type in (None, "logits"):
            return None if return_type is None else logits
        assert logits is not None
        if tokens is None:
            raise ValueError("a loss needs tokens: pass tokens=[batch, pos]")
        loss = self.loss_fn(logits, tokens, attention_mask, per_token=per_token)
        return loss if return_type == "loss" else Output(logits, loss)
