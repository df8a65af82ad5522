"""Attention of later iterations to the keys and values of iteration 0 (IQuest-Coder Loop)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.upstream import HookPoint


class FirstPassGate(nn.Module):
    """How much each head takes of iteration 0: ``sigmoid(q · W + b)``, q behind the rotation.

    From iteration 1 on a head writes ``g · A(q, K₀, V₀) + (1 - g) · A_window(q, K, V)``.

    Hook points, which fire from iteration 1 on: ``hook_gate`` [batch, pos, head];
    ``hook_attn_scores`` and ``hook_pattern`` [batch, head, query, key] of the attention to
    iteration 0 (those of the attention itself are of the window).
    """

    def __init__(self, cfg: LoopedTransformerConfig, device: torch.device | str | None = None):
        super().__init__()
        self.W = nn.Parameter(torch.empty(cfg.n_heads, cfg.d_head, dtype=cfg.dtype, device=device))
        self.b = nn.Parameter(torch.zeros(cfg.n_heads, dtype=cfg.dtype, device=device))
        self.hook_gate = HookPoint()
        self.hook_attn_scores = HookPoint()
        self.hook_pattern = HookPoint()

    def forward(self, q: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head"]:
        return self.hook_gate(torch.sigmoid((q * self.W).sum(-1) + self.b))
