"""Adaptive halting: how much each iteration's state counts in what leaves the loop."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass
class Halting:
    """The halting distribution of one run, iteration by iteration.

    ``"act"`` (Graves 2016, 1603.08983, equations 5 to 8, for each position as in the Universal
    Transformer): with λ_t = sigmoid(gate(s_t)) and N the first t with Σ_{j≤t} λ_j ≥ 1 - ε, or the
    last, p_t is λ_t before N, the remainder R = 1 - Σ_{j<N} λ_j at N, and 0 behind it. All
    positions run all iterations; a position that has halted counts no further state.

    ``"ponder"`` (PonderNet, 2107.05407, equation 3): p_t = λ_t Π_{j<t} (1 - λ_j), and the last
    iteration has what is left.

    Attributes:
        kind: ``"act"`` or ``"ponder"``.
        epsilon: ε of ``"act"``.
    """

    kind: str
    epsilon: float
    _given: Float[Tensor, "batch pos 1"] | None = None
    _running: Bool[Tensor, "batch pos 1"] | None = None
    _left: Float[Tensor, "batch pos 1"] | None = None

    def step(self, gate: Float[Tensor, "batch pos 1"], last: bool) -> Float[Tensor, "batch pos 1"]:
        """The probability of halting behind this iteration, in float32 or better.

        Args:
            gate: The halting logit of this iteration.
            last: Whether it is the last, which takes the rest.
        """
        working = gate.dtype if gate.dtype == torch.float64 else torch.float32
        rate = torch.sigmoid(gate.to(working))
        if self.kind == "ponder":
            left = torch.ones_like(rate) if self._left is None else self._left
            self._left = left * (1 - rate)
            return left if last else left * rate
        if self._given is None or self._running is None:
            self._given = torch.zeros_like(rate)
            self._running = torch.ones_like(rate, dtype=torch.bool)
        halts = torch.ones_like(self._running) if last else self._given + rate >= 1 - self.epsilon
        weight = torch.where(halts, 1 - self._given, rate) * self._running
        self._given = self._given + weight
        self._running = self._running & ~halts
        return weight
