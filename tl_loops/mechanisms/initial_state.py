"""The state before iteration 0: what the prelude gives, a draw, zeros, or a trained vector."""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_loops.errors import ConfigError
from tl_loops.layout.names import spec
from tl_loops.mechanisms.mechanism import Config, Mechanism, OnPath, Part, Run, Setting
from tl_loops.mechanisms.tensors import Tensors, add_parameters, vector
from tl_loops.mechanisms.words import exactly
from tl_loops.upstream import unshared

TRUNCATION = 3.0
"""Bound of the truncated normal initial state, in standard deviations."""

RULES = ("embed", "normal", "zeros", "learned", "hashed_normal")


class InitialState(nn.Module):
    """The state before iteration 0, by one of the rules of ``cfg.initial_state``.

    Args:
        cfg: The config.
        rule: One of :data:`RULES`.
        device: Where the weights go.
    """

    state: nn.Parameter

    def __init__(self, cfg: Config, rule: str, device: torch.device | str | None = None):
        super().__init__()
        self.cfg, self.rule = cfg, rule
        add_parameters(self, state_weights("it", rule, cfg.d_model), "it", cfg.dtype, device)
        self._drawn: tuple[tuple, Tensor] | None = None  # one object, as threads share it

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
        if rule == "hashed_normal":
            return hashed_normal(positions, self.cfg).to(e)
        if self.cfg.state_seed is None:
            uniform = torch.rand(e.shape, dtype=torch.float32, device="cpu")
            return self._truncated_normal(uniform).to(e)
        return self._by_position(int(positions.max()) + 1)[positions.cpu()].to(e)

    def _truncated_normal(self, uniform: Tensor) -> Tensor:
        """Map uniforms on [0, 1) to a normal cut at ±3σ, by the inverse distribution function."""
        # P(|Z| < 3) = erf(3 / √2); float64 keeps the tails exact.
        mass = math.erf(TRUNCATION / math.sqrt(2.0))
        z = math.sqrt(2.0) * torch.erfinv((2.0 * uniform.double() - 1.0) * mass)
        return (z * self.cfg.initial_state_std).float()

    def _by_position(self, n_positions: int) -> Float[Tensor, "n_positions d_model"]:
        """One draw per position, each from a generator of its own.

        So the state at a position depends on the seed and the position alone: not on batch
        neighbours, the length of the prompt, or on what a key-value cache already holds.
        """
        key = (self.cfg.state_seed, self.cfg.initial_state_std, self.cfg.d_model)
        drawn = self._drawn
        known = drawn[1] if drawn is not None and drawn[0] == key else None
        first = 0 if known is None else known.shape[0]
        if n_positions > first:
            # Grown ahead, so that decoding token by token does not draw at every step.
            last = max(n_positions, 2 * first, 16)
            # The draw is of float32 on the CPU, whatever torch's default dtype and device are.
            shape = (last - first, self.cfg.d_model)
            uniforms = torch.empty(shape, dtype=torch.float32, device="cpu")
            generator = torch.Generator(device="cpu")
            for position in range(first, last):
                generator.manual_seed(_mix(int(self.cfg.state_seed or 0), position))
                uniforms[position - first].uniform_(generator=generator)
            new = self._truncated_normal(uniforms)
            known = new if known is None else torch.cat([known, new])
            if known.is_inference():
                return known
            self._drawn = key, known
        assert known is not None
        return known


def _mix(seed: int, position: int) -> int:
    """A seed for one position, by SplitMix64's finaliser: neighbouring seeds do not overlap."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + position + 1) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) & ((1 << 63) - 1)


def hashed_normal(
    positions: Int[Tensor, "batch pos"], cfg: Config
) -> Float[Tensor, "batch pos d_model"]:
    """The deterministic stand-in for a normal draw of the IFM LoopedLM models.

    u = frac(43758.5453123 · sin x) with x = 0.013579 · i + 0.021713 · p + phase + 0.123457 for
    channel i at position p, kept within [1e-6, 1 - 1e-6]; the state is √2 · std · erfinv(2u - 1).

    The factor magnifies the last digit of the sine, so the arithmetic is float32 in the order of
    the reference, on the CPU. A sine of another library gives states that differ by some
    thousandths of std, in the reference as well.

    Args:
        positions: Absolute positions, counted from 0.
        cfg: Its ``initial_state_std`` and ``state_phase``.
    """
    where = positions.to(device="cpu", dtype=torch.float32)[..., None]
    channels = torch.arange(cfg.d_model, dtype=torch.float32, device="cpu")
    x = channels * 0.013579 + where * 0.021713
    x = x + torch.tensor(cfg.state_phase, dtype=torch.float32) + 0.123457
    u = x.sin() * 43758.5453123
    u = (u - u.floor()).clamp(1e-6, 1.0 - 1e-6)
    return torch.erfinv(2.0 * u - 1.0) * (math.sqrt(2.0) * cfg.initial_state_std)


def example_phase(example_id: int, seed: int = 42) -> float:
    """The ``state_phase`` that IFM's evaluation gives to an example, in [0, 2π).

    Args:
        example_id: Number of the example, counted from 0.
        seed: Of the evaluation; the published one is 42.

    Source: 2610.06833; its released evaluation code.
    """
    modulus = 16_777_213
    mixed = (example_id % modulus * 104_729 + seed % modulus * 130_363) % modulus
    return float(torch.tensor(mixed, dtype=torch.float32) * (2.0 * math.pi / modulus))


def state_weights(owner: str, rule: str, d_model: int) -> Tensors:
    """The weights of a state before iteration 0 that follows a rule."""
    return {f"{owner}.state": vector(d_model)} if rule == "learned" else {}


class _Begin(Part):
    def begin(self, x: Tensor) -> Tensor:
        model, given = self.run.model, self.run.initial_state
        if given is not None:
            state = given.to(x)
        else:
            state = model.initial_state(x, self.run.context.positions)
        return model.hook_initial_state(unshared(state, model.hook_initial_state))


def initial_state_in_words(cfg: Config) -> str:
    """What the state before iteration 0 is, for ``describe()``: ``"= e"``."""
    seed = f"seed {cfg.state_seed}" if cfg.state_seed is not None else "drawn afresh"
    return {
        "embed": "= e",
        "normal": f"~ N(0, {exactly(cfg.initial_state_std)}²), truncated at 3σ, {seed}",
        "zeros": "= 0",
        "learned": "= learned vector",
        "hashed_normal": f"~ N(0, {exactly(cfg.initial_state_std)}²), hashed from channel and "
        f"position, phase {exactly(cfg.state_phase)}",
    }[cfg.initial_state]


class _InitialState(Mechanism):
    name = "initial_state"
    owners = ("initial_state",)
    settings = (
        Setting(
            "initial_state",
            str,
            "embed",
            '``"embed"``: what the prelude, or else the embedding, gives. ``"normal"``: normal '
            'with ``initial_state_std``, truncated at three standard deviations. ``"zeros"``. '
            '``"learned"``: one trained vector. ``"hashed_normal"``: close to normal with '
            "``initial_state_std``, by a fixed hash of channel, position and ``state_phase`` (IFM "
            "LoopedLM).",
            choices=RULES,
            of_the_weights=False,
        ),
        Setting(
            "initial_state_std",
            float,
            0.02,
            'Standard deviation of ``"normal"`` (before truncation) and ``"hashed_normal"``.',
            at_least=0,
            of_the_weights=False,
        ),
        Setting(
            "state_seed",
            int | None,
            0,
            'Seed of the ``"normal"`` draw, which is a function of the seed and the absolute '
            "position alone; ``None`` draws afresh from torch's default generator at each call.",
            of_the_weights=False,
        ),
        Setting(
            "state_phase",
            float,
            0.0,
            'What ``"hashed_normal"`` adds to the argument of its hash, in radians: another phase '
            "is another state. :func:`example_phase` gives those of the published evaluation.",
            at_least=0,
            of_the_weights=False,
        ),
    )
    points = (spec("hook_initial_state", "run", "batch pos d_model", moment="loop", residual=True),)

    def active(self, cfg: Config) -> bool:
        return True

    def check(self, cfg: Config) -> None:
        if cfg.initial_state == "normal" and not cfg.initial_state_std >= 0:
            raise ConfigError(f"initial_state_std must be at least 0, got {cfg.initial_state_std}")

    def phrases(self, cfg: Config) -> dict[str, str]:
        return {"begin": f"s {initial_state_in_words(cfg)}"}

    def weights(self, cfg: Config) -> Tensors:
        return state_weights("initial_state", cfg.initial_state, cfg.d_model)

    def modules(self, cfg: Config, device: Any) -> dict[str, nn.Module]:
        return {"initial_state": InitialState(cfg, cfg.initial_state, device)}

    def part(self, run: Run) -> Part:
        return _Begin(run)

    def path(self, cfg: Config) -> OnPath:
        return OnPath()  # decompositions have it as a component


INITIAL_STATE = _InitialState()
