"""A linear halting gate that reads the state after each iteration (Ouro)."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_loops.errors import ConfigError
from tl_loops.layout.names import spec
from tl_loops.mechanisms.mechanism import Config, Mechanism, OnPath, Part, Run, Setting
from tl_loops.mechanisms.tensors import Tensors, add_parameters, matrix, vector
from tl_loops.mechanisms.words import exactly


class ExitGate(nn.Module):
    """The halting logit ``s W + b`` of a state (positive: stop)."""

    W: nn.Parameter
    b: nn.Parameter

    def __init__(self, cfg: Config, device: torch.device | str | None = None):
        super().__init__()
        add_parameters(self, EXIT_GATE.weights(cfg), "exit_gate", cfg.dtype, device)

    def forward(self, s: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        return F.linear(s, self.W.T, self.b)


class _Read(Part):
    def left(self, t: int, state: Tensor, unhooked: Tensor) -> Tensor:
        model = self.run.model
        self.run.out.gates.append(model.iter[t].hook_exit_gate(model.exit_gate(state)))
        return state


class _ExitGate(Mechanism):
    name = "exit_gate"
    owners = ("exit_gate",)
    reads_out = True
    settings = (
        Setting(
            "exit_gate",
            bool,
            False,
            "A linear halting gate reads the state after each iteration (Ouro).",
        ),
        Setting(
            "exit_step",
            int | None,
            None,
            "The iteration that :meth:`LoopedTransformer.forward` reads out when no exit is asked "
            "for, before ``exit_threshold``; ``None``, or one that a run does not reach: as that "
            "says.",
            at_least=0,
            of_the_weights=False,
        ),
        Setting(
            "exit_threshold",
            float | None,
            None,
            "The exit of :meth:`LoopedTransformer.forward` when none is asked for: the first "
            "iteration whose cumulative exit probability reaches it; ``None``: the last.",
            at_least=0,
            at_most=1,
            of_the_weights=False,
        ),
    )
    points = (spec("hook_exit_gate", "iteration", "batch pos one"),)
    with_stacks = False

    def check(self, cfg: Config) -> None:
        for name in ("exit_step", "exit_threshold"):
            if getattr(cfg, name) is not None and not cfg.exit_gate:
                raise ConfigError(f"{name} needs exit_gate=True")

    def phrases(self, cfg: Config) -> dict[str, str]:
        return {"after": "gate(s)"}

    def describe(self, cfg: Config) -> list[str]:
        exits = [f"after iteration {cfg.exit_step}"] if cfg.exit_step is not None else []
        if cfg.exit_threshold is not None:
            threshold = exactly(cfg.exit_threshold)
            exits.append(f"where the cumulative exit probability reaches {threshold}")
        return [f"exit     {', or else '.join(exits)}"] if exits else []

    def weights(self, cfg: Config) -> Tensors:
        return {"exit_gate.W": matrix(cfg.d_model, 1), "exit_gate.b": vector(1)}

    def modules(self, cfg: Config, device: Any) -> dict[str, nn.Module]:
        return {"exit_gate": ExitGate(cfg, device)}

    def part(self, run: Run) -> Part:
        return _Read(run)

    def path(self, cfg: Config) -> OnPath:
        return OnPath()  # it only reads


EXIT_GATE = _ExitGate()
