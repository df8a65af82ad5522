"""How much of an iteration a state takes on, and a halting head on what it then is."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_loops.layout.names import HookSpec, Place, spec
from tl_loops.mechanisms.mechanism import (
    LEAVES_ITERATION,
    Config,
    Mechanism,
    OnPath,
    Part,
    Run,
    Setting,
)
from tl_loops.mechanisms.tensors import Tensors, add_parameters, matrix, vector

_EPS = 1e-5
"""Of the halting head's LayerNorm."""


class StateGate(nn.Module):
    """LoopUS's selective gate: ``exp(-softplus((new - old) W_in W_out + b_out) · exp(A_log))``.

    An iteration leaves ``gate · new + (1 - gate) · old``. Computed in float32.
    """

    W_in: nn.Parameter
    W_out: nn.Parameter
    b_out: nn.Parameter
    A_log: nn.Parameter

    def __init__(self, cfg: Config, device: torch.device | str | None = None):
        super().__init__()
        add_parameters(self, STATE_GATE.weights(cfg), "state_gate", cfg.dtype, device)

    def forward(self, change: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The gate, in (0, 1), for a change ``new - old``."""
        low = F.linear(_working(change), _working(self.W_in).T)
        delta = F.softplus(F.linear(low, _working(self.W_out).T, _working(self.b_out)))
        return torch.exp(-delta * torch.exp(_working(self.A_log))).to(change.dtype)


class HaltHead(nn.Module):
    """LoopUS's confidence logit ``LayerNorm(s) W + b_out`` (positive: halt).

    The released forward pass reads it on the state that an iteration leaves, after the gate;
    training reads it on the change ``new - old``.
    """

    w: nn.Parameter
    b: nn.Parameter
    W: nn.Parameter
    b_out: nn.Parameter

    def __init__(self, cfg: Config, device: torch.device | str | None = None):
        super().__init__()
        add_parameters(self, STATE_GATE.weights(cfg), "halt_head", cfg.dtype, device)

    def forward(self, s: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        normed = F.layer_norm(s, s.shape[-1:], self.w, self.b, _EPS)
        return F.linear(normed, self.W.T, self.b_out)


def _working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Gate(Part):
    def enter(self, t: int, state: Tensor) -> Tensor:
        self._before = state
        return state

    def leave(self, t: int, state: Tensor) -> Tensor:
        model, cfg, hooks = self.run.model, self.run.cfg, self.run.model.iter[t]
        if cfg.state_gate_rank is not None:
            gate = hooks.hook_state_gate(model.state_gate(state - self._before))
            state = gate * state + (1 - gate) * self._before
        if cfg.halt_head:
            hooks.hook_halt_logit(model.halt_head(state))
        return state


class _StateGate(Mechanism):
    name = "state_gate_rank"
    owners = ("state_gate", "halt_head")
    settings = (
        Setting(
            "state_gate_rank",
            int | None,
            None,
            "An iteration leaves g·new + (1 - g)·old, with a gate g in each dimension that a map "
            "of this rank gives of new - old (LoopUS); ``None``: new.",
            at_least=1,
        ),
        Setting(
            "halt_head",
            bool,
            False,
            "A head reads what an iteration leaves into a halting logit (LoopUS).",
        ),
    )
    points = (
        spec("hook_state_gate", "iteration", "batch pos d_model"),
        spec("hook_halt_logit", "iteration", "batch pos one"),
    )
    with_stacks = False

    def active(self, cfg: Config) -> bool:
        return cfg.state_gate_rank is not None or cfg.halt_head

    def said(self, cfg: Config) -> str:
        return "state_gate_rank and halt_head"

    def decides(self, cfg: Config) -> dict[str, str]:
        return LEAVES_ITERATION

    def phrases(self, cfg: Config) -> dict[str, str]:
        if cfg.state_gate_rank is None:
            return {}
        return {"leave": "x = g·x + (1 - g)·s, g = exp(-softplus(W(x - s))·exp(A))"}

    def describe(self, cfg: Config) -> list[str]:
        lines = []
        if cfg.state_gate_rank is not None:
            lines.append(f"gate     g reads x - s through a map of rank {cfg.state_gate_rank}")
        if cfg.halt_head:
            lines.append("halting  a head reads what an iteration leaves into a halting logit")
        return lines

    def points_of(self, cfg: Config, place: Place) -> tuple[HookSpec, ...]:
        if place != "iteration":
            return ()
        gate, halt = self.points
        return (
            *((gate,) if cfg.state_gate_rank is not None else ()),
            *((halt,) if cfg.halt_head else ()),
        )

    def weights(self, cfg: Config) -> Tensors:
        d, rank, found = cfg.d_model, cfg.state_gate_rank, {}
        if rank is not None:
            found["state_gate.W_in"] = matrix(d, rank)
            found["state_gate.W_out"] = matrix(rank, d)
            found["state_gate.b_out"] = found["state_gate.A_log"] = vector(d)
        if cfg.halt_head:
            found["halt_head.w"] = found["halt_head.b"] = vector(d)
            found["halt_head.W"] = matrix(d, 1)
            found["halt_head.b_out"] = vector(1)
        return found

    def modules(self, cfg: Config, device: Any) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        if cfg.state_gate_rank is not None:
            found["state_gate"] = StateGate(cfg, device)
        if cfg.halt_head:
            found["halt_head"] = HaltHead(cfg, device)
        return found

    def part(self, run: Run) -> Part:
        return _Gate(run)

    def carries(self, cfg: Config) -> str:
        return "the state that a gate mixes in again"

    def remixes(self, cfg: Config) -> bool:
        return cfg.state_gate_rank is not None

    def path(self, cfg: Config) -> OnPath:
        return super().path(cfg) if self.remixes(cfg) else OnPath()  # the head only reads


STATE_GATE = _StateGate()
