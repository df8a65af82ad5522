"""Adaptive halting: how much each iteration's state counts in what leaves the loop."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_loops.errors import ConfigError
from tl_loops.layout.names import HookSpec, Place, spec
from tl_loops.mechanisms.mechanism import (
    LEAVES_LOOP,
    MIXES_STATES,
    Config,
    Mechanism,
    OnPath,
    Part,
    Run,
    Setting,
)
from tl_loops.mechanisms.words import exactly


@dataclass
class Halting:
    """The halting distribution of one run, iteration by iteration.

    ``"act"`` (Graves 2016, 1603.08983, equations 5 to 8, for each position as in the Universal
    Transformer): with λ_t = sigmoid(gate(s_t)) and N the first t with Σ_{j≤t} λ_j ≥ 1 - ε, or the
    last, p_t is λ_t before N, the remainder R = 1 - Σ_{j<N} λ_j at N, and 0 after it. All
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
        """The probability of halting after this iteration, in float32 or better.

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


class _Halt(Part):
    def __init__(self, run: Run):
        super().__init__(run)
        self._halting = Halting(run.cfg.halting, run.cfg.act_epsilon)
        self._sum: Tensor | None = None

    def left(self, t: int, state: Tensor, unhooked: Tensor) -> Tensor:
        run, last = self.run, t == self.run.layout.n_iterations - 1
        weight = run.model.iter[t].hook_halting(self._halting.step(run.out.gates[-1], last))
        if run.cfg.halting != "act":
            return state
        counted = weight.to(state) * state
        self._sum = counted if self._sum is None else self._sum + counted
        return run.model.hook_halted_state(self._sum) if last else state


class _Halting(Mechanism):
    name = "halting"
    settings = (
        Setting(
            "halting",
            str | None,
            None,
            "What the exit gate decides. ``None``: nothing in the forward pass; exits are asked "
            'for by call. ``"act"``: what leaves the loop is the sum of all states by their '
            'halting probabilities. ``"ponder"``: the halting distribution of PonderNet, for its '
            "loss.",
            choices=(None, "act", "ponder"),
            of_the_weights=False,
        ),
        Setting(
            "act_epsilon",
            float,
            0.01,
            '``"act"`` halts when the probabilities sum to 1 minus this.',
            of_the_weights=False,
        ),
    )
    points = (
        spec("hook_halted_state", "run", "batch pos d_model", moment="end"),
        spec("hook_halting", "iteration", "batch pos one"),
    )

    def said(self, cfg: Config) -> str:
        return f"halting={cfg.halting!r}"

    def decides(self, cfg: Config) -> dict[str, str]:
        return LEAVES_LOOP if cfg.halting == "act" else {}

    def check(self, cfg: Config) -> None:
        if cfg.halting is not None and not cfg.exit_gate:
            raise ConfigError(f"halting={cfg.halting!r} needs exit_gate=True, which it reads")
        if cfg.halting == "ponder" and cfg.n_coda:
            raise ConfigError(
                "halting='ponder' reads every state out, but n_coda is "
                f"{cfg.n_coda}: a coda would run once per iteration; use n_coda=0"
            )
        for name in ("exit_step", "exit_threshold"):
            if cfg.halting == "act" and getattr(cfg, name) is not None:
                raise ConfigError(f"halting='act' and {name} exclude each other")
        if not 0.0 <= cfg.act_epsilon < 1.0:
            raise ConfigError(f"act_epsilon must be at least 0 and below 1, got {cfg.act_epsilon}")

    def describe(self, cfg: Config) -> list[str]:
        if cfg.halting == "act":
            return [
                "halting  p_t = σ(gate(s_t)) until the sum reaches "
                f"{exactly(1 - cfg.act_epsilon)}, then the rest; s = Σ p_t s_t"
            ]
        return ["halting  p_t = σ(gate(s_t)) Π_{j<t} (1 - σ(gate(s_j))); the last: the rest"]

    def points_of(self, cfg: Config, place: Place) -> tuple[HookSpec, ...]:
        if place == "run" and cfg.halting != "act":
            return ()
        return super().points_of(cfg, place)

    def sums_states(self, cfg: Config) -> bool:
        return cfg.halting == "act"

    def part(self, run: Run) -> Part:
        return _Halt(run)

    def path(self, cfg: Config) -> OnPath:
        return OnPath()  # it sums the states after the loop

    def path_after_loop(self, cfg: Config) -> OnPath:
        return OnPath(refused=MIXES_STATES) if cfg.halting == "act" else OnPath()

    def carries(self, cfg: Config) -> str | None:
        return "halting probabilities" if cfg.halting == "act" else None


HALTING = _Halting()
