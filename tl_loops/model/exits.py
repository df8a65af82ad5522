"""Exit modes of models with a halting gate: which iteration's state becomes the logits."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_loops.arguments import is_index
from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import LoopedSemanticsError
from tl_loops.metrics.exits import exit_distribution


@dataclass(frozen=True)
class ExitMode:
    """How one forward pass leaves the loop; at most one field is set.

    Attributes:
        at: The state of this iteration (counted from 0), for every position.
        threshold: Per position, the first iteration whose cumulative exit probability reaches it,
            else the last.
        weighted: The logits of all iterations, weighted by the exit probabilities.

    Source: Ouro's modelling file (2510.25741): ``exit_at_step``, ``exit_threshold`` and
    ``use_weighted_exit``.
    """

    at: int | None = None
    threshold: float | None = None
    weighted: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.weighted, bool):
            raise ValueError(f"weighted_exit must be True or False, got {self.weighted!r}")

    def or_of(self, cfg: LoopedTransformerConfig) -> "ExitMode":
        """This mode, or the config's where a call leaves it open.

        As in Ouro's modelling file, an iteration that the config names comes before a threshold,
        also one that the call gives.
        """
        if self.at is not None or self.weighted:
            return self
        if cfg.exit_step is not None and cfg.exit_step < cfg.n_iterations:
            if self.threshold is not None:
                warnings.warn(
                    f"exit_threshold={self.threshold} has no effect: cfg.exit_step="
                    f"{cfg.exit_step} comes first, as in Ouro's reference; set cfg.exit_step = "
                    "None, or pass exit_at",
                    stacklevel=3,
                )
            return ExitMode(at=cfg.exit_step)
        return self if self.early else ExitMode(threshold=cfg.exit_threshold)

    @property
    def early(self) -> bool:
        """Whether anything but the last iteration is asked for."""
        return self.at is not None or self.threshold is not None or self.weighted

    def check(self, cfg: LoopedTransformerConfig, from_iteration: int) -> None:
        """Raise on what this model cannot do, before anything runs.

        Raises:
            ValueError: More than one mode, an iteration or a threshold out of range, a model
                without a gate.
            LoopedSemanticsError: The model has a coda, so that a state alone is no readout; or the
                run does not start at iteration 0.
        """
        if (self.at is not None) + (self.threshold is not None) + self.weighted > 1:
            raise ValueError("give one of exit_at, exit_threshold and weighted_exit, not several")
        if not self.early:
            return
        if cfg.segments is not None:
            raise LoopedSemanticsError(
                f"{cfg.notation} has several loops, so that other loops follow the states of one: "
                "read states out with tl_loops.lens"
            )
        readout = cfg.readout
        readout.refuse_sum_of_states()
        readout.refuse_coda()
        if from_iteration > 0:
            raise LoopedSemanticsError(
                "an exit needs every iteration; do not combine it with a start inside the loop"
            )
        if self.at is not None and not (is_index(self.at) and 0 <= self.at < cfg.n_iterations):
            raise ValueError(
                f"exit_at={self.at!r} is out of range: there are {cfg.n_iterations} iterations, "
                "counted from 0"
            )
        if self.at is not None:
            readout.refuse_fast_stack(self.at)
        if self.at is None and not cfg.exit_gate:
            raise ValueError("exit_threshold and weighted_exit need a model with an exit gate")
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if self.threshold is not None and not (number and 0.0 <= self.threshold <= 1.0):
            raise ValueError(
                f"exit_threshold is a probability, a number from 0 to 1, got {self.threshold!r}"
            )


def exit_probabilities(
    gates: Float[Tensor, "iteration batch pos 1"],
) -> Float[Tensor, "iteration batch pos"]:
    """The probability of leaving after each iteration, in float32 or better."""
    return exit_distribution(gates.squeeze(-1))


def threshold_iteration(
    gates: Float[Tensor, "iteration batch pos 1"], threshold: float
) -> Int[Tensor, "batch pos"]:
    """The first iteration whose cumulative exit probability reaches a threshold, else the last.

    Worked in float64: summed in bfloat16 the cumulative probability rounds up to 1 before the last
    iteration, which the reference implementation mistakes for an exit.
    """
    reached = exit_probabilities(gates.double()).cumsum(0) >= threshold
    reached[-1] = True
    return reached.int().argmax(0)


def select_state(
    states: Float[Tensor, "iteration batch pos d_model"], iteration: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_model"]:
    """The state of each position at its own iteration."""
    index = iteration[None, :, :, None].expand(1, *states.shape[1:])
    return torch.gather(states, 0, index).squeeze(0)


class SampledExits:
    """The iteration whose state each sampled token is read from, step by step.

    Attributes:
        found: The exits of each step, [batch]; -1 where a sequence had ended.

    Args:
        model: The looped model that samples.
        arguments: Of each forward pass; its exits count as in :class:`ExitMode`.

    Raises:
        LoopedSemanticsError: A token is read from several states.
    """

    def __init__(self, model: Any, arguments: Mapping[str, Any]):
        given = {name: arguments.get(f"exit_{name}") for name in ("at", "threshold")}
        mode = ExitMode(**given, weighted=bool(arguments.get("weighted_exit"))).or_of(model.cfg)
        mode.check(model.cfg, 0)
        if mode.weighted or model.cfg.halting == "act":
            why = "weighted_exit=True" if mode.weighted else "cfg.halting='act'"
            raise LoopedSemanticsError(
                f"with {why} every token is read from all states, so it leaves the loop at no one "
                "iteration: leave out return_exits, or give exit_threshold or exit_at"
            )
        self._model, self._mode = model, mode
        self._gates: list[Tensor] = []
        self.found: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A block of code in which one forward pass is run."""
        self._gates.clear()
        if self._mode.threshold is None:
            yield
            return

        def keep(gate: Tensor, hook: Any) -> None:
            self._gates.append(gate[:, -1:])

        n_iterations = self._model.cfg.n_iterations
        names = [f"iter.{t}.hook_exit_gate" for t in range(n_iterations)]
        with self._model.hooks(fwd_hooks=[(name, keep) for name in names]):
            yield

    def note(self, finished: Bool[Tensor, "batch"]) -> None:
        """Add the exits of the pass that was run; ``finished`` sequences have none."""
        mode = self._mode
        if mode.threshold is not None:
            left = threshold_iteration(torch.stack(self._gates), mode.threshold)[:, 0]
        else:
            last = self._model.cfg.n_iterations - 1
            left = torch.full_like(
                finished, last if mode.at is None else int(mode.at), dtype=torch.int64
            )
        self.found.append(torch.where(finished, -1, left.to(finished.device)))
