"""Token-choice routing: how many iterations each token takes (Mixture-of-Recursions)."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.nn.context import ForwardContext
from tl_loops.nn.mlp import transposed_parameter


class Router(nn.Module):
    """Scores of every depth for a token: ``softmax(s W)`` or ``sigmoid(s W)``, times a scale."""

    def __init__(self, cfg: LoopedTransformerConfig, device: torch.device | str | None = None):
        super().__init__()
        self.score, self.scale = cfg.router_score, cfg.router_scale
        depths = cfg.max_iterations or cfg.n_iterations
        self.W = transposed_parameter(cfg.d_model, depths, cfg.dtype, device)

    def forward(self, s: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos depth"]:
        scores = F.linear(s, self.W.T)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        squashed = scores.softmax(-1) if self.score == "softmax" else scores.sigmoid()
        return squashed * self.scale


@dataclass
class Routing:
    """The routes of one run.

    With weights g over the depths and the depth i = argmax g of a token (counted from 0), the state
    behind iteration t is

    - g_t f(s_t) for t < i (with ``router_gates="last"``: f(s_t)),
    - g_i f(s_t) + s_0 at t = i, where s_0 is what entered iteration 0,
    - unchanged for t > i.

    f attends to tokens that are still in the loop alone. A token that has left it attends to
    itself, and what it computes is dropped.

    Attributes:
        weights: g, [batch, pos, depth].
        depths: i of the new tokens, [batch, pos].
        key_depths: i of cached and new tokens, [batch, key].
        first: s_0.
        every: Whether every iteration is gated.

    Source: 2507.10524, section 2.2.1, token-choice routing, with recursion-wise keys and values;
    ``router_gates="last"`` is what the released training code computes.
    """

    weights: Float[Tensor, "batch pos depth"]
    depths: Int[Tensor, "batch pos"]
    key_depths: Int[Tensor, "batch key"]
    first: Float[Tensor, "batch pos d_model"]
    every: bool

    def context(self, base: ForwardContext, iteration: int) -> ForwardContext:
        """Positions and masks of one iteration."""
        batch, n_new = self.depths.shape
        n_keys = self.key_depths.shape[1]
        device = self.depths.device
        allowed = base.allowed
        if allowed is None:
            allowed = torch.ones(1, 1, n_new, n_keys, dtype=torch.bool, device=device)
            # One new token behind a cache sees every key: the context then says not causal.
            allowed = allowed.tril(diagonal=n_keys - n_new) if base.causal else allowed
        itself = torch.eye(n_keys, dtype=torch.bool, device=device)[None, None, n_keys - n_new :]
        running = (self.depths >= iteration)[:, None, :, None]
        keys = (self.key_depths >= iteration)[:, None, None, :]
        allowed = torch.where(running, allowed & keys, itself).expand(batch, 1, n_new, n_keys)
        return replace(base, allowed=allowed)

    def weight(self, iteration: int) -> Float[Tensor, "batch pos 1"]:
        """What the core's output is multiplied with; 0 for tokens that have left the loop."""
        gate = self.weights[..., iteration : iteration + 1]
        if not self.every:
            gate = torch.where((self.depths == iteration).unsqueeze(-1), gate, 1.0)
        return gate * (self.depths >= iteration).unsqueeze(-1)

    def update(
        self,
        before: Float[Tensor, "batch pos d_model"],
        core: Float[Tensor, "batch pos d_model"],
        weight: Float[Tensor, "batch pos 1"],
        iteration: int,
    ) -> Float[Tensor, "batch pos d_model"]:
        """The state behind an iteration.

        Args:
            before: The state that entered it.
            core: What the core made of it.
            weight: From :meth:`weight`.
            iteration: Counted from 0.
        """
        depths = self.depths.unsqueeze(-1)
        moved = weight.to(core) * core
        moved = torch.where(depths == iteration, moved + self.first, moved)
        return torch.where(depths >= iteration, moved, before)
