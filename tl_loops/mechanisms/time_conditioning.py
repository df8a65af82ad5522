"""Blocks that know how far the loop is (LoopFormer, TMLT) and how large its steps are."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_loops.errors import ConfigError
from tl_loops.layout.names import spec
from tl_loops.mechanisms.block_parts import BlockPart, Branch, Context
from tl_loops.mechanisms.mechanism import Config, Mechanism, OnPath, Part, Run, Setting
from tl_loops.mechanisms.tensors import Tensors, add_parameters, matrix, vector
from tl_loops.upstream import HookPoint

N_FREQUENCIES = 256
"""Width of the sinusoids that time conditioning embeds."""

_MAX_PERIOD = 10_000.0


class TimeEmbedding(nn.Module):
    """``silu(sinusoids(t) W_in + b_in) W_out + b_out`` of a number t."""

    W_in: nn.Parameter
    b_in: nn.Parameter
    W_out: nn.Parameter
    b_out: nn.Parameter

    def __init__(self, cfg: Config, name: str, device: torch.device | str | None = None):
        super().__init__()
        add_parameters(self, TIME_CONDITIONING.weights(cfg), name, cfg.dtype, device)

    def forward(self, time: float) -> Float[Tensor, "d_model"]:
        half = N_FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device="cpu")
        frequencies = torch.exp(-math.log(_MAX_PERIOD) * steps / half)
        angles = (time * frequencies).to(self.W_in.device)
        sinusoids = torch.cat([angles.cos(), angles.sin()]).to(self.W_in.dtype)
        hidden = F.silu(F.linear(sinusoids, self.W_in.T, self.b_in))
        return F.linear(hidden, self.W_out.T, self.b_out)


class TimeConditioning(nn.Module):
    """``c = time(t / T) + step(1 / T)`` for iteration t of T, or ``c = time(t)``."""

    def __init__(self, cfg: Config, device: torch.device | str | None = None):
        super().__init__()
        self.time = TimeEmbedding(cfg, "time_conditioning.time", device)
        self.step = None
        if cfg.time_conditioning != "iteration":
            self.step = TimeEmbedding(cfg, "time_conditioning.step", device)

    def forward(self, iteration: int, n_iterations: int) -> Float[Tensor, "d_model"]:
        if self.step is None:
            return self.time(float(iteration))
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

    W: nn.Parameter
    b: nn.Parameter

    def __init__(self, cfg: Config, device: torch.device | str | None = None):
        super().__init__()
        weights = TIME_CONDITIONING.block_weights(cfg, 0)
        add_parameters(self, weights, "modulation", cfg.dtype, device)
        self.hook_attn_gate = HookPoint()
        self.hook_mlp_gate = HookPoint()
        self.hook_attn_scale = HookPoint()
        self.hook_mlp_scale = HookPoint()

    def forward(self, condition: Float[Tensor, "batch 1 d_model"]) -> Modulations:
        parts = F.linear(F.silu(condition), self.W.T, self.b).chunk(4, dim=-1)
        hooks = (self.hook_attn_gate, self.hook_mlp_gate, self.hook_attn_scale, self.hook_mlp_scale)
        return Modulations(*(hook(part) for hook, part in zip(hooks, parts, strict=True)))


class _Condition(Part):
    """Makes what modulates the blocks, once per iteration."""

    def __init__(self, run: Run):
        super().__init__(run)
        self._conditions: dict[int, Tensor] = {}

    def context(self, t: int, layer: int, context: Any, x: Tensor) -> Any:
        if t not in self._conditions:
            model = self.run.model
            condition = model.time_conditioning(t, self.run.layout.n_iterations).to(x)
            condition = condition.expand(x.shape[0], 1, -1)
            self._conditions = {t: model.iter[t].hook_condition(condition)}
        notes = {**context.notes, TIME_CONDITIONING.name: self._conditions[t]}
        return replace(context, notes=notes)


class _Modulate(BlockPart):
    def __init__(self, modulations: Modulations):
        self._scales = {"attn": modulations.attn_scale, "mlp": modulations.mlp_scale}
        self._gates = {"attn": modulations.attn_gate, "mlp": modulations.mlp_gate}

    def read(self, branch: Branch, x: Tensor) -> Tensor:
        scale = self._scales[branch]
        return x * (1 + (scale if x.ndim == 3 else scale.unsqueeze(2)))

    def write(self, branch: Branch, out: Tensor) -> Tensor:
        return self._gates[branch] * out


class _TimeConditioning(Mechanism):
    name = "time_conditioning"
    owners = ("time_conditioning",)
    settings = (
        Setting(
            "time_conditioning",
            bool | str,
            False,
            "Blocks are modulated, with gates on what they write and scales on what they read. "
            "``True``: by how far the loop is (t / T) and by the size of its steps (1 / T) "
            '(LoopFormer). ``"iteration"``: by the number t of the iteration alone (TMLT).',
            choices=(False, True, "iteration"),
        ),
    )
    points = (
        spec("hook_condition", "iteration", "batch one d_model", moment="first"),
        *(
            spec(f"modulation.hook_{name}", "block", "batch one d_model")
            for name in ("attn_gate", "mlp_gate", "attn_scale", "mlp_scale")
        ),
    )
    with_stacks = False

    def check(self, cfg: Config) -> None:
        outside = cfg.n_prelude or cfg.n_coda or cfg.block_norm != "pre"
        if cfg.time_conditioning and outside:
            raise ConfigError(
                "time_conditioning needs pre-norm blocks that are all in the loop: "
                "block_norm='pre', n_prelude=0 and n_coda=0"
            )

    def describe(self, cfg: Config) -> list[str]:
        whole = "time(t / T) + step(1 / T)"
        condition = "time(t)" if cfg.time_conditioning == "iteration" else whole
        return [f"time     c = {condition}; each branch: x += g(c)·branch(ln(x)·(1 + a(c)))"]

    def weights(self, cfg: Config) -> Tensors:
        d, found = cfg.d_model, {}
        parts = ("time",) if cfg.time_conditioning == "iteration" else ("time", "step")
        for name in (f"time_conditioning.{part}" for part in parts):
            found[f"{name}.W_in"] = matrix(N_FREQUENCIES, d)
            found[f"{name}.W_out"] = matrix(d, d)
            found[f"{name}.b_in"] = found[f"{name}.b_out"] = vector(d)
        return found

    def block_weights(self, cfg: Config, number: int) -> Tensors:
        d = cfg.d_model
        return {"modulation.W": matrix(d, 4 * d), "modulation.b": vector(4 * d)}

    def modules(self, cfg: Config, device: Any) -> dict[str, nn.Module]:
        return {"time_conditioning": TimeConditioning(cfg, device)}

    def block_modules(self, cfg: Config, number: int, device: Any = None) -> dict[str, nn.Module]:
        return {"modulation": Modulation(cfg, device)}

    def part(self, run: Run) -> Part:
        return _Condition(run)

    def block_part(self, block: Any, context: Context) -> BlockPart:
        return _Modulate(block.modulation(context.notes[self.name]))

    def scales_branches(self, cfg: Config) -> bool:
        return True

    def path(self, cfg: Config) -> OnPath:
        return OnPath()  # it acts inside the branches


TIME_CONDITIONING = _TimeConditioning()
