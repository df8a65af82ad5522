"""What happens between iterations: initial state, injection, state hooks, exit gate."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.nn.mlp import transposed_parameter
from tl_loops.nn.norm import Norm
from tl_loops.upstream import HookPoint

TRUNCATION = 3.0
"""Bound of the truncated normal initial state, in standard deviations."""


class IterationHooks(nn.Module):
    """Hook points of one iteration, and the norm that ends it where there is one.

    Hook points: ``hook_state_in`` (before injection), ``hook_injected`` (what enters the first
    layer), ``hook_state_out`` (behind the norm between iterations), ``hook_exit_gate`` (the
    halting logit); all [batch, pos, d_model] but the last, [batch, pos, 1]. By the config also
    ``hook_step_embedding`` [batch, pos, d_model], ``hook_halting`` (the halting probability) and
    ``hook_router_weight``, both [batch, pos, 1], ``hook_hyper_read``, ``hook_hyper_write`` and
    ``hook_hyper_keep`` [batch, pos, stream], and with two stacks ``hook_other_in`` (what this call
    reads of the other stack's state) [batch, pos, d_model]. ``hook_state_gate`` [batch, pos,
    d_model] is how much of the iteration the state takes on, ``hook_halt_logit`` [batch, pos, 1]
    what the head says of it, and ``hook_condition`` [batch, 1, d_model] what modulates its blocks.
    """

    def __init__(self, cfg: LoopedTransformerConfig, norm: Norm | None):
        super().__init__()
        self.hook_state_in = HookPoint()
        if cfg.stacks is not None:
            self.hook_other_in = HookPoint()
        self.hook_injected = HookPoint()
        if norm is not None:
            self.norm = norm
        self.hook_state_out = HookPoint()
        if cfg.exit_gate:
            self.hook_exit_gate = HookPoint()
        if cfg.time_conditioning:
            self.hook_condition = HookPoint()
        if cfg.state_gate_rank is not None:
            self.hook_state_gate = HookPoint()
        if cfg.halt_head:
            self.hook_halt_logit = HookPoint()
        if cfg.step_embedding is not None:
            self.hook_step_embedding = HookPoint()
        if cfg.halting is not None:
            self.hook_halting = HookPoint()
        if cfg.router is not None:
            self.hook_router_weight = HookPoint()
        if cfg.hyper_connections is not None:
            self.hook_hyper_read = HookPoint()
            self.hook_hyper_write = HookPoint()
            self.hook_hyper_keep = HookPoint()


class InitialState(nn.Module):
    """The state before iteration 0, by ``cfg.initial_state``.

    Args:
        cfg: The config.
        device: Where the weights go.
        rule: Used instead of ``cfg.initial_state``.
    """

    def __init__(
        self,
        cfg: LoopedTransformerConfig,
        device: torch.device | str | None = None,
        rule: str | None = None,
    ):
        super().__init__()
        self.cfg, self.rule = cfg, cfg.initial_state if rule is None else rule
        if self.rule == "learned":
            self.state = nn.Parameter(torch.empty(cfg.d_model, dtype=cfg.dtype, device=device))
        self._drawn: Tensor | None = None
        self._drawn_for: tuple = ()

    def forward(
        self, e: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        rule = self.rule
        if rule == "embed":
            return e
        if rule == "zeros":
            return torch.zeros_like(e)
        if rule == "learned":
            return self.state.expand_as(e).clone()
        if self.cfg.state_seed is None:
            return self._truncated_normal(torch.rand(e.shape)).to(e)
        return self._by_position(int(positions.max()) + 1)[positions.cpu()].to(e)

    def _truncated_normal(self, uniform: Tensor) -> Tensor:
        """Map uniforms on [0, 1) to a normal cut at ±3σ, by the inverse distribution function."""
        # P(|Z| < 3) = erf(3 / √2); float64 keeps the tails exact.
        mass = math.erf(TRUNCATION / math.sqrt(2.0))
        z = math.sqrt(2.0) * torch.erfinv((2.0 * uniform.double() - 1.0) * mass)
        return (z * self.cfg.initial_state_std).float()

    def _by_position(self, n_positions: int) -> Float[Tensor, "n_positions d_model"]:
        """One draw a position, each from a generator of its own.

        So the state at a position depends on the seed and the position alone: not on batch
        neighbours, the length of the prompt, or on what a key-value cache already holds.
        """
        key = (self.cfg.state_seed, self.cfg.initial_state_std, self.cfg.d_model)
        known = self._drawn if self._drawn_for == key else None
        first = 0 if known is None else known.shape[0]
        if n_positions > first:
            # Grown ahead, so that decoding token by token does not draw at every step.
            last = max(n_positions, 2 * first, 16)
            uniforms = torch.empty(last - first, self.cfg.d_model)
            generator = torch.Generator()
            for position in range(first, last):
                generator.manual_seed(_mix(int(self.cfg.state_seed or 0), position))
                uniforms[position - first].uniform_(generator=generator)
            new = self._truncated_normal(uniforms)
            known = new if known is None else torch.cat([known, new])
            if known.is_inference():
                return known
            self._drawn, self._drawn_for = known, key
        assert known is not None
        return known


def _mix(seed: int, position: int) -> int:
    """A seed for one position, by SplitMix64's finaliser: neighbouring seeds do not overlap."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + position + 1) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) & ((1 << 63) - 1)


class Injection(nn.Module):
    """How the prelude output e enters each iteration with the state s, by ``cfg.injection``.

    Every kind is affine in s once e is fixed, so the part that depends on e alone is computed once
    a forward pass (:meth:`prepare`) and shared by all iterations.
    """

    def __init__(self, cfg: LoopedTransformerConfig, device: torch.device | str | None = None):
        super().__init__()
        self.kind, d = cfg.injection, cfg.d_model
        if self.kind in ("concat", "concat_injection_first"):
            self.W = transposed_parameter(2 * d, d, cfg.dtype, device)
        elif self.kind == "gated_diagonal":
            self.A_log = nn.Parameter(torch.empty(d, dtype=cfg.dtype, device=device))
            self.dt_bias = nn.Parameter(torch.empty(d, dtype=cfg.dtype, device=device))
            self.W_B = transposed_parameter(d, d, cfg.dtype, device)

    @property
    def W_state(self) -> Float[Tensor, "d_model d_model"]:
        """The rows of the concatenation's map that the state meets."""
        d = self.W.shape[1]
        return self.W[:d] if self.kind == "concat" else self.W[d:]

    @property
    def W_injection(self) -> Float[Tensor, "d_model d_model"]:
        """The rows of the concatenation's map that e meets."""
        d = self.W.shape[1]
        return self.W[d:] if self.kind == "concat" else self.W[:d]

    def prepare(self, e: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The additive part of the injected input, which e alone decides."""
        if self.kind == "add":
            return e
        if self.kind == "gated_diagonal":
            return F.softplus(self.dt_bias) * F.linear(e, self.W_B.T)
        return F.linear(e, self.W_injection.T)

    def carry(self, s: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The linear map that the state goes through; ``carry(s) + prepare(e)`` is the input."""
        if self.kind == "add":
            return s
        if self.kind == "gated_diagonal":
            return s * torch.exp(-F.softplus(self.dt_bias) * torch.exp(self.A_log))
        return F.linear(s, self.W_state.T)

    def forward(
        self, s: Float[Tensor, "*batch d_model"], prepared: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        return self.carry(s) + prepared


class CodaInput(nn.Module):
    """The linear map ``s W`` of the state between core and coda (Parcae)."""

    def __init__(self, cfg: LoopedTransformerConfig, device: torch.device | str | None = None):
        super().__init__()
        self.W = transposed_parameter(cfg.d_model, cfg.d_model, cfg.dtype, device)

    def forward(self, s: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return F.linear(s, self.W.T)


class ExitGate(nn.Module):
    """The halting logit ``s W + b`` of a state (positive: stop)."""

    def __init__(self, cfg: LoopedTransformerConfig, device: torch.device | str | None = None):
        super().__init__()
        self.W = transposed_parameter(cfg.d_model, 1, cfg.dtype, device)
        self.b = nn.Parameter(torch.zeros(1, dtype=cfg.dtype, device=device))

    def forward(self, s: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        return F.linear(s, self.W.T, self.b)
