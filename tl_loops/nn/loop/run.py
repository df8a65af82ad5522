"""One pass through the unrolled blocks, with what happens around the core."""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.layout.layout import LoopLayout
from tl_loops.nn.context import ForwardContext
from tl_loops.upstream import KeyValueCache, unshared


@dataclass
class Trajectory:
    """What a run leaves besides the residual stream.

    Attributes:
        resid: The residual stream at the end of the run, [batch, pos, d_model].
        normed: Whether the final norm has already been applied to it.
        states: The state that leaves each iteration that was run, if asked for.
        gates: The halting logit after each of them, [batch, pos, 1].
    """

    resid: Tensor
    normed: bool = False
    states: list[Tensor] = field(default_factory=list)
    gates: list[Tensor] = field(default_factory=list)


@dataclass
class StackRun:
    """One pass through (part of) the unrolled blocks, for a model and the parts of its mechanisms.

    Attributes:
        model: The root module: ``blocks``, ``iter``, and what its mechanisms ask for.
        layout: The layout that they are unrolled to.
        cfg: The model's config.
        context: Positions and masks.
        start: First block.
        initial_state: State before iteration 0; ``None``: the architecture's own rule.
        injection: The prelude output e, when the run starts after the prelude.
        other_state: With two stacks and a start inside the loop, the state of the stack that the
            first call is not of.
        past: Key-value cache, one entry per unrolled block.
        keep_states: Whether the trajectory keeps every state.
    """

    model: Any
    layout: LoopLayout
    cfg: LoopedTransformerConfig
    context: ForwardContext
    start: int = 0
    initial_state: Float[Tensor, "batch pos d_model"] | None = None
    injection: Float[Tensor, "batch pos d_model"] | None = None
    other_state: Float[Tensor, "batch pos d_model"] | None = None
    past: KeyValueCache | None = None
    keep_states: bool = False
    out: Trajectory = field(init=False)

    def run(
        self,
        x: Tensor,
        stop: int | None,
        enter_first: bool = True,
        state_given: bool = False,
    ) -> Trajectory:
        """Run blocks ``start`` to ``stop`` (exclusive).

        Args:
            x: Residual stream before block ``start``.
            stop: The result is what enters block ``stop``; with the unrolled depth, what leaves
                the last block; ``None`` also runs what follows the last block.
            enter_first: Whether what lies before block ``start`` (injection, norm before the coda)
                is still to be done.
            state_given: Whether ``x`` is the state before an iteration rather than what the
                prelude gives.
        """
        out = self.out = Trajectory(x)
        self._parts = [p for m in self.cfg.mechanisms if (p := m.part(self)) is not None]
        self._readout = self.cfg.readout
        end = self.layout.n_layers if stop is None else stop
        for index in range(self.start, end):
            if index > self.start or enter_first:
                begin = index > self.start or not state_given
                out.resid = self._enter(index, out.resid, begin)
            entry = self.past[index] if self.past is not None else None
            context = self._context(index, out.resid)
            out.resid = self.model.blocks[index](out.resid, context, entry)
            if index < self.layout.n_layers - 1 or stop is None:
                self._leave(index, out)
        if stop is None and self.start == end:
            self._leave(end - 1, out)  # a run that stopped after the last block left it out
        if stop is None or self.start < stop < self.layout.n_layers:
            out.resid = self._enter(end, out.resid)
        return out

    def _context(self, index: int, x: Tensor) -> ForwardContext:
        context = self.context
        if not self._parts:
            return context
        at = self.layout.coordinate(index)
        for part in self._parts:
            context = part.layer_context(index, context)
        if at.iteration is None:
            return context
        for part in self._parts:
            context = part.context(at.iteration, at.layer, context, x)
        return context

    def _enter(self, index: int, x: Tensor, begin: bool = True) -> Tensor:
        """What happens between what precedes block ``index`` and the block itself."""
        if index == self.layout.coda_start:
            return self.model.enter_coda(x)
        t = self.layout.begins_at(index)
        if t is None:
            return x
        if t == 0 and begin:
            for part in reversed(self._parts):
                x = part.begin(x)
        for part in reversed(self._parts):
            x = part.read(t, x)
        hooks = self.model.iter[t]
        state = hooks.hook_state_in(unshared(x, hooks.hook_state_in))
        for part in reversed(self._parts):
            state = part.enter(t, state)
        return hooks.hook_injected(unshared(state, hooks.hook_injected))

    def _leave(self, index: int, out: Trajectory) -> None:
        """What happens after block ``index`` when it ends an iteration."""
        t = self.layout.ends_at(index)
        if t is None:
            return
        hooks, state = self.model.iter[t], out.resid
        for part in self._parts:
            state = part.leave(t, state)
        norm = self._readout.iteration_norm(t)
        if norm is not None:
            out.normed = norm == "ln_final"
            state = (self.model.ln_final if out.normed else hooks.norm)(state)
        unhooked = state
        out.resid = hooks.hook_state_out(unshared(state, hooks.hook_state_out))
        if self.keep_states:
            out.states.append(out.resid)
        for part in self._parts:
            out.resid = part.left(t, out.resid, unhooked)
