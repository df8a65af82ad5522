"""Blocks that know how far the loop is and how large its steps are (LoopFormer)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.config.weights import N_FREQUENCIES
from tl_loops.nn.mlp import transposed_parameter
from tl_loops.upstream import HookPoint

_MAX_PERIOD = 10_000.0


class TimeEmbedding(nn.Module):
    """``silu(sinusoids(t) W_in + b_in) W_out + b_out`` of a number t."""

    def __init__(self, cfg: LoopedTransformerConfig, device: torch.device | str | None = None):
        super().__init__()
        d = cfg.d_model
        self.W_in = transposed_parameter(N_FREQUENCIES, d, cfg.dtype, device)
        self.b_in = nn.Parameter(torch.zeros(d, dtype=cfg.dtype, device=device))
        self.W_out = transposed_parameter(d, d, cfg.dtype, device)
        self.b_out = nn.Parameter(torch.zeros(d, dtype=cfg.dtype, device=device))

    def forward(self, time: float) -> Float[Tensor, "d_model"]:
        half = N_FREQUENCIES // 2
        frequencies = torch.exp(-math.log(_MAX_PERIOD) * torch.arange(half) / half)
        angles = (time * frequencies).to(self.W_in.device)
        sinusoids = torch.cat([angles.cos(), angles.sin()]).to(self.W_in.dtype)
        hidden = F.silu(F.linear(sinusoids, self.W_in.T, self.b_in))
        return F.linear(hidden, self.W_out.T, self.b_out)


class TimeConditioning(nn.Module):
    """``c = time(t / T) + step(1 / T)`` for iteration t of T."""

    def __init__(self, cfg: LoopedTransformerConfig, device: torch.device | str | None = None):
        super().__init__()
        self.time = TimeEmbedding(cfg, device)
        self.step = TimeEmbedding(cfg, device)

    def forward(self, iteration: int, n_iterations: int) -> Float[Tensor, "d_model"]:
        return self.time(iteration / n_iterations) + self.step(1.0 / n_iterations)


class Modulations(NamedTuple):
    """What a block makes of the condition; each [batch, 1, d_model]."""

    attn_gate: Tensor
    mlp_gate: Tensor
    attn_scale: Tensor
    mlp_scale: Tensor


class Modulation(nn.Module):
    """``silu(c) W + b``, in four parts.

    A block then adds ``gate · branch(norm(x) · (1 + scale))``. Hook points: ``hook_attn_gate``,
    ``hook_mlp_gate``, ``hook_attn_scale`` and ``hook_mlp_scale`` [batch, 1, d_model].
    """

    def __init__(self, cfg: LoopedTransformerConfig, device: torch.device | str | None = None):
        super().__init__()
        d = cfg.d_model
        self.W = transposed_parameter(d, 4 * d, cfg.dtype, device)
        self.b = nn.Parameter(torch.zeros(4 * d, dtype=cfg.dtype, device=device))
        self.hook_attn_gate = HookPoint()
        self.hook_mlp_gate = HookPoint()
        self.hook_attn_scale = HookPoint()
        self.hook_mlp_scale = HookPoint()

    def forward(self, condition: Float[Tensor, "batch 1 d_model"]) -> Modulations:
        parts = F.linear(F.silu(condition), self.W.T, self.b).chunk(4, dim=-1)
        hooks = (self.hook_attn_gate, self.hook_mlp_gate, self.hook_attn_scale, self.hook_mlp_scale)
        return Modulations(*(hook(part) for hook, part in zip(hooks, parts, strict=True)))
