"""Running a loop whose iterations call one of two stacks, each with a state of its own (HRM)."""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from tl_loops.nn.loop.run import StackRun, Trajectory
from tl_loops.upstream import unshared


@dataclass
class TwoStackRun(StackRun):
    """A :class:`StackRun` over ``cfg.stacks``.

    An iteration is one call: it reads the sum of both states (and with an injection, in calls of
    the fast stack, e) and replaces the state of its stack. The residual stream between iterations
    is the state that the call before has left.

    Attributes:
        other_state: For a start inside the loop, the state of the stack that the first call is not
            of.
    """

    other_state: Float[Tensor, "batch pos d_model"] | None = None
    _states: dict[str, Tensor] = field(default_factory=dict)

    def run(
        self,
        x: Tensor,
        start: int,
        stop: int | None,
        enter_first: bool = True,
        state_given: bool = False,
    ) -> Trajectory:
        """As :meth:`StackRun.run`."""
        at = self.layout.coordinate(start) if start < self.layout.n_layers else None
        if at is not None and at.stack is not None:
            if state_given:
                self._states[at.stack] = x
            if self.other_state is not None:
                self._states[self._other(at.stack)] = self.other_state
        return super().run(x, start, stop, enter_first, state_given)

    def _other(self, stack: str) -> str:
        assert self.cfg.stacks is not None
        return next(name for name in self.cfg.stacks if name != stack)

    def _begin_loop(self, x: Tensor) -> Tensor:
        model, slow = self.model, self.cfg.slow_stack
        fast_state = super()._begin_loop(x)
        if self.cfg.slow_initial_state == "learned":
            x = model.slow_initial_state(x, self.context.positions)
        hook = model.hook_slow_initial_state
        assert slow is not None
        self._states = {self._other(slow): fast_state, slow: hook(unshared(x, hook))}
        return fast_state

    def _inject(self, t: int, state: Tensor) -> Tensor:
        hooks, cfg = self.model.iter[t], self.cfg
        assert self.layout.stacks is not None
        stack = self.layout.stacks[t]
        own, other = self._states[stack], self._states[self._other(stack)]
        own = hooks.hook_state_in(unshared(own, hooks.hook_state_in))
        entering = own + hooks.hook_other_in(unshared(other, hooks.hook_other_in))
        if cfg.injection is not None and stack != cfg.slow_stack:
            assert self._injected is not None
            entering = entering + self._injected
        return hooks.hook_injected(unshared(entering, hooks.hook_injected))

    def _leave(self, index: int, out: Trajectory) -> None:
        super()._leave(index, out)
        at = self.layout.coordinate(index)
        if at.stack is not None and at.layer == self.layout.n_core - 1:
            self._states[at.stack] = out.resid
