"""How much of an iteration a state takes on, and a halting head on how much it would change."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.nn.mlp import transposed_parameter

_EPS = 1e-5
"""Of the halting head's LayerNorm."""


class StateGate(nn.Module):
    """LoopUS's selective gate: ``exp(-softplus((new - old) W_in W_out + b_out) · exp(A_log))``.

    An iteration leaves ``gate · new + (1 - gate) · old``. Computed in float32.
    """

    def __init__(self, cfg: LoopedTransformerConfig, device: torch.device | str | None = None):
        super().__init__()
        d, rank = cfg.d_model, cfg.state_gate_rank
        assert rank is not None
        self.W_in = transposed_parameter(d, rank, cfg.dtype, device)
        self.W_out = transposed_parameter(rank, d, cfg.dtype, device)
        self.b_out = nn.Parameter(torch.zeros(d, dtype=cfg.dtype, device=device))
        self.A_log = nn.Parameter(torch.zeros(d, dtype=cfg.dtype, device=device))

    def forward(self, change: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The gate, in (0, 1), for a change ``new - old``."""
        low = F.linear(_working(change), _working(self.W_in).T)
        delta = F.softplus(F.linear(low, _working(self.W_out).T, _working(self.b_out)))
        return torch.exp(-delta * torch.exp(_working(self.A_log))).to(change.dtype)


class HaltHead(nn.Module):
    """LoopUS's confidence logit ``LayerNorm(new - old) W + b_out`` (positive: halt)."""

    def __init__(self, cfg: LoopedTransformerConfig, device: torch.device | str | None = None):
        super().__init__()
        d = cfg.d_model
        self.w = nn.Parameter(torch.ones(d, dtype=cfg.dtype, device=device))
        self.b = nn.Parameter(torch.zeros(d, dtype=cfg.dtype, device=device))
        self.W = transposed_parameter(d, 1, cfg.dtype, device)
        self.b_out = nn.Parameter(torch.zeros(1, dtype=cfg.dtype, device=device))

    def forward(self, change: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        normed = F.layer_norm(change, change.shape[-1:], self.w, self.b, _EPS)
        return F.linear(normed, self.W.T, self.b_out)


def _working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
