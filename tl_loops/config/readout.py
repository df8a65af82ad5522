"""The end of a loop: what ends an iteration, and what stands between a state and the logits."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.layout import LoopLayout

if TYPE_CHECKING:
    from tl_loops.config.config import LoopedTransformerConfig


class ReadoutStep(NamedTuple):
    """One step between a place on the residual stream and the unembedding.

    Attributes:
        kind: ``"norm"`` (with the weights of the final norm, but for a norm of its own between
            iterations), ``"linear"`` (the map before the coda) or ``"coda"`` (all of its blocks).
        prefix: Of the hook names: ``"ln_final"``, ``"ln_coda"`` or ``"iter.3.norm"`` for a norm;
            ``"coda_in"`` for the linear map; empty for the coda, whose blocks have their own.
    """

    kind: Literal["norm", "linear", "coda"]
    prefix: str


@dataclass(frozen=True)
class Readout:
    """What follows the blocks of an iteration, as data. Reached as ``cfg.readout``.

    Attributes:
        layout: The layout whose end is described.
        norm_between_iterations: The final norm ends every iteration.
        own_norm_between_iterations: The norm that ends iterations is one without a gain instead.
        norm_before_coda: The final norm stands before the coda, or in the place of one.
        linear_before_coda: A linear map stands before the coda.
        final_norm: There is a final norm.
        sums_states: The weighted sum of all states leaves the loop, and not the last of them.
        mixes_states: A state is more than what its last block gives (routes, streams, a gate).
        injected: An injection stands between a state and the blocks that read it.
        slow_stack: With two stacks, the one whose state is read out.
    """

    layout: LoopLayout
    norm_between_iterations: bool = False
    own_norm_between_iterations: bool = False
    norm_before_coda: bool = False
    linear_before_coda: bool = False
    final_norm: bool = True
    sums_states: bool = False
    mixes_states: bool = False
    injected: bool = False
    slow_stack: str | None = None

    @classmethod
    def of(cls, cfg: "LoopedTransformerConfig") -> "Readout":
        """The end of the loop that a config describes."""
        mechanisms = cfg.mechanisms
        return cls(
            cfg.layout,
            norm_between_iterations=cfg.norm_between_iterations,
            own_norm_between_iterations=cfg.own_norm_between_iterations,
            norm_before_coda=cfg.norm_before_coda,
            linear_before_coda=cfg.linear_before_coda,
            final_norm=cfg.final_norm and cfg.normalization_type is not None,
            sums_states=any(mechanism.sums_states(cfg) for mechanism in mechanisms),
            mixes_states=any(mechanism.remixes(cfg) for mechanism in mechanisms),
            injected=cfg.injection is not None,
            slow_stack=cfg.slow_stack,
        )

    def over(self, layout: LoopLayout) -> "Readout":
        """The same for a run with another number of iterations."""
        return replace(self, layout=layout)

    @property
    def has_coda(self) -> bool:
        """Whether blocks stand between the loop and the logits."""
        return self.layout.n_coda > 0

    @property
    def state_is_normed(self) -> bool:
        """Whether a state that leaves the loop has been through the final norm already.

        Without a coda the norm that ends the last iteration is the final norm itself.
        """
        own = self.own_norm_between_iterations
        return self.norm_between_iterations and not own and not self.has_coda

    @property
    def final_norm_feeds_blocks(self) -> bool:
        """Whether the final norm's weights act elsewhere than right before the unembedding."""
        between = self.norm_between_iterations and not self.own_norm_between_iterations
        return between or self.norm_before_coda

    def iteration_norm(self, iteration: int) -> str | None:
        """The prefix of the norm that ends an iteration, counted from 0; ``None``: none does."""
        if not self.norm_between_iterations:
            return None
        last = iteration == self.layout.n_iterations - 1
        return "ln_final" if last and self.state_is_normed else f"iter.{iteration}.norm"

    def is_normed(
        self,
        kind: str,
        phase: str | None = None,
        iteration: int | None = None,
        layer: int | None = None,
    ) -> bool:
        """Whether the norm between iterations is the last thing that happened at a point.

        Args:
            kind: The hook point without ``hook_``: ``"state_out"``, ``"state_in"``,
                ``"injected"``, ``"resid_pre"``, ...
            phase: Of the block; ``"core"`` for a point between iterations.
            iteration: Counted from 0; ``None`` outside of the loop.
            layer: Inside the phase; ``None`` between iterations.
        """
        if not self.norm_between_iterations:
            return False
        if kind == "state_out":
            return True
        if phase != "core" or not iteration:
            return False
        stacks = self.layout.stacks
        if self.slow_stack is not None and stacks is not None:
            # A call reads the sum of both states, and a state is new until its stack was called.
            return kind == "state_in" and stacks[iteration] in stacks[:iteration]
        enters = kind == "injected" or (kind == "resid_pre" and layer == 0)
        return kind == "state_in" or (enters and not self.injected)

    def end_of_iteration(self, normed: bool = False) -> tuple[ReadoutStep, ...]:
        """The norm that ends the last iteration, where it is not the final norm itself.

        Args:
            normed: Whether it is the last thing that happened.
        """
        name = self.iteration_norm(self.layout.n_iterations - 1)
        done = normed or name is None or self.state_is_normed
        return () if done else (ReadoutStep("norm", name or ""),)

    @property
    def before_coda(self) -> tuple[ReadoutStep, ...]:
        """The steps between what leaves the loop and the coda, or what stands in its place."""
        norm = (ReadoutStep("norm", "ln_coda"),) if self.norm_before_coda else ()
        return (*norm, ReadoutStep("linear", "coda_in")) if self.linear_before_coda else norm

    def final_steps(self, normed: bool = False) -> tuple[ReadoutStep, ...]:
        """The steps between the end of the blocks and the unembedding.

        Args:
            normed: Whether the norm between iterations is the last thing that happened.
        """
        done = not self.final_norm or (normed and self.state_is_normed)
        return () if done else (ReadoutStep("norm", "ln_final"),)

    def steps(self, normed: bool = False) -> tuple[ReadoutStep, ...]:
        """The steps from the residual stream in the loop to the unembedding, if it ended there.

        Args:
            normed: Whether the norm between iterations is the last thing that happened to it.
        """
        coda = (ReadoutStep("coda", ""),) if self.has_coda else ()
        ends = self.end_of_iteration(normed)
        return (*ends, *self.before_coda, *coda, *self.final_steps(normed))

    @property
    def last_hook(self) -> str:
        """The hook point of what leaves the last block, or without a coda the loop.

        See :attr:`last_is_normed` for whether the final norm still follows.
        """
        if not self.has_coda and self.sums_states:
            return "hook_halted_state"
        if not self.has_coda and self.mixes_states:
            return f"iter.{self.layout.n_iterations - 1}.hook_state_out"
        return f"blocks.{self.layout.n_layers - 1}.hook_resid_post"

    @property
    def last_is_normed(self) -> bool:
        """Whether what :attr:`last_hook` holds goes to the unembedding as it is."""
        return self.state_is_normed and (self.sums_states or self.mixes_states)

    # What cannot be read out.

    def refuse_coda(self) -> None:
        """Raise on to read a state out as it is where a coda follows.

        Raises:
            LoopedSemanticsError: There is a coda.
        """
        if self.has_coda:
            raise LoopedSemanticsError(
                "a coda stands between the states and the logits of this model: run it with "
                "n_iterations=t + 1, use the coda lens of tl_loops.lens, or decompose the end of "
                "the model (layer=None)"
            )

    def refuse_sum_of_states(self) -> None:
        """Raise on to read one state as what leaves the loop, where the sum of all of them does.

        Raises:
            LoopedSemanticsError: The model has ``halting="act"``.
        """
        if self.sums_states:
            raise LoopedSemanticsError(
                "with halting='act' the sum of all states leaves the loop, weighted by "
                "cache['halting', t], so no single state is read out: read cache['state_out', t], "
                "use logit_lens, or run the model with n_iterations=t + 1 for an earlier end"
            )

    def refuse_fast_stack(self, iteration: int) -> None:
        """Raise on to read out the state of the stack that is not read out.

        Raises:
            LoopedSemanticsError: The iteration is a call of the fast one of two stacks.
        """
        stacks = self.layout.stacks
        if self.slow_stack is None or stacks is None or stacks[iteration] == self.slow_stack:
            return
        raise LoopedSemanticsError(
            f"iteration {iteration} is a call of stack {stacks[iteration]}, but the state of "
            f"{self.slow_stack} is read out: take the last iteration of a cycle (for a lens "
            "points=['iter.3.hook_state_out'], say), or use logit_lens"
        )
