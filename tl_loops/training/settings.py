"""What decides a training run: data as settings, checked when they are made."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tl_loops.arguments import check_at_least, checked, checked_fields
from tl_loops.errors import did_you_mean
from tl_loops.training.iteration_draws import ConstantIterations, IterationDraw

_AUTOCAST: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}

_ABOVE_ZERO = ("n_steps", "batch_size", "learning_rate", "clip_norm")
_NOT_NEGATIVE = (
    "weight_decay",
    "warmup_steps",
    "entropy_weight",
    "growth_weight",
    "settling_weight",
    "jacobian_weight",
)
_SHARES = ("decay", "state_radius_share")


@checked_fields
@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training run.

    Attributes:
        n_steps: Steps of the optimiser.
        batch_size: Contexts per step.
        n_context: Tokens per context of a corpus, of which the loss reads all but the first;
            ``None`` where the data are no corpus.
        iterations: How many iterations each step runs.
        n_gradient: Gradients flow through this many iterations, the last of the step (truncated
            backpropagation); ``None``: through all. Earlier ones run without a graph. The prelude
            keeps its gradient through the injection; without an injection it has none in a step
            that is cut.
        exit_loss: Which readouts are trained. ``"last"``: the last iteration's. ``"mean"``: of
            every iteration with gradient, each through all that follows the loop. ``"expected"``:
            these weighted by the exit gate's probabilities, minus ``entropy_weight`` times their
            entropy (Ouro, 2510.25741); gradients then flow through all iterations.
        entropy_weight: β of the expected loss.
        growth_weight: Of :func:`growth_penalty` over the iterations with gradient.
        settling_weight: Of :func:`settling_penalty` over the iterations with gradient.
        jacobian_weight: Of :func:`jacobian_penalty` at the last iteration.
        state_radius: After each step the part of the injection that reads the state is scaled so
            that its spectral radius is at most this (:func:`limit_state_radius`): below 1 the state
            cannot grow without bound (after Parcae, 2604.12946). ``None``: no bound.
        state_radius_share: Share of the steps over which the bound falls, in a straight line, from
            the radius at the start.
        learning_rate: Peak of AdamW's.
        warmup_steps: Steps of linear warm-up.
        decay: Share of the steps, at the end, over which the rate falls to zero.
        decay_shape: ``"linear"`` or ``"cosine"``.
        weight_decay: Of weights with two or more axes; gains and biases have none.
        betas: Of AdamW.
        clip_norm: Largest norm of the whole gradient.
        autocast: ``"bfloat16"`` or ``"float16"``: the forward pass in this type, losses in
            float32; ``None``: all in the weights' type. No loss scaling is done for float16.
        seed: Decides contexts, numbers of iterations, initial states and penalties' directions,
            each step's on its own.
        first_token: Put before every context of a corpus, such as the id of BOS; ``None``: nothing
            is.

    Raises:
        ValueError: A setting is out of its range; the message names it.
    """

    n_steps: int
    batch_size: int
    n_context: int | None = None
    iterations: IterationDraw = field(default_factory=lambda: ConstantIterations(4))
    n_gradient: int | None = None
    exit_loss: str = "last"
    entropy_weight: float | int = 0.05
    growth_weight: float | int = 0.0
    settling_weight: float | int = 0.0
    jacobian_weight: float | int = 0.0
    state_radius: float | int | None = None
    state_radius_share: float | int = 0.6
    learning_rate: float | int = 1e-3
    warmup_steps: int = 100
    decay: float | int = 0.4
    decay_shape: str = "linear"
    weight_decay: float | int = 0.01
    betas: tuple[float | int, float | int] = (0.9, 0.98)
    clip_norm: float | int = 1.0
    autocast: str | None = None
    seed: int = 0
    first_token: int | None = None

    def __post_init__(self) -> None:
        for name in _ABOVE_ZERO:
            self._check(name, above=True)
        for name in _NOT_NEGATIVE:
            self._check(name)
        if self.state_radius is not None:
            self._check("state_radius", above=True)
        if self.n_context is not None and self.n_context < 2:
            raise ValueError(
                f"n_context must be at least 2, since every token but the first is predicted, got "
                f"{self.n_context}"
            )
        if self.n_gradient is not None and self.n_gradient < 1:
            raise ValueError(f"n_gradient must be at least 1 or None, got {self.n_gradient}")
        check_at_least(0, first_token=self.first_token)
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas are two numbers from 0 to below 1, got {self.betas}")
        for name in _SHARES:
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is a share of the steps, from 0 to 1, got {value}")
        for name, known in (
            ("exit_loss", ("last", "mean", "expected")),
            ("decay_shape", ("linear", "cosine")),
            ("autocast", (None, *_AUTOCAST)),
        ):
            value = getattr(self, name)
            if value not in known:
                names = [str(one) for one in known]
                raise ValueError(f"{name} is {value!r}; {did_you_mean(str(value), names)}")
        if self.exit_loss == "expected" and self.n_gradient is not None:
            raise ValueError(
                "exit_loss='expected' weights the losses of all iterations, so gradients flow "
                f"through all: leave n_gradient={self.n_gradient} out"
            )
        if not isinstance(self.iterations, IterationDraw):
            raise ValueError(
                "iterations must say how a number is drawn, for example "
                f"ConstantIterations(4), got {self.iterations!r}"
            )

    def _check(self, name: str, above: bool = False) -> None:
        value = getattr(self, name)
        low_enough = value > 0 if above else value >= 0
        if not (low_enough and value < math.inf):
            bound = "above 0" if above else "at least 0"
            raise ValueError(f"{name} must be a number {bound}, got {value}")

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The type of ``autocast``."""
        return None if self.autocast is None else _AUTOCAST[self.autocast]

    @checked
    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: warm-up, constant, decay to zero.

        Raises:
            ValueError: ``step`` is below 0.
        """
        check_at_least(0, step=step)
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        n_decay = self.decay * self.n_steps
        left = min(1.0, (self.n_steps - step) / n_decay) if n_decay else 1.0
        if self.decay_shape == "cosine":
            left = (1.0 - math.cos(math.pi * left)) / 2.0
        return self.learning_rate * min(warm, left)

    def identity(self) -> dict[str, Any]:
        """All settings in JSON's types."""
        return {**asdict(self), "iterations": repr(self.iterations), "betas": list(self.betas)}
