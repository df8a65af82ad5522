"""Starts inside a run: what they need besides the residual stream, and where they mean nothing."""

from torch import Tensor

from tl_loops.errors import LoopedSemanticsError
from tl_loops.mechanisms.kv_sharing import KVSharing
from tl_loops.model.hooks import CoordinateHooks
from tl_loops.nn.loop.run import StackRun


class Restarts(CoordinateHooks):
    """Checks of the arguments that start a run behind the embedding."""

    def _check_start(
        self,
        start: int,
        start_at_layer: int | None,
        start_at_iteration: int | None,
        sharing: KVSharing | None,
    ) -> None:
        """Refuse a start in a loop that carries more than its state."""
        if self.cfg.state_is_whole and sharing is None:
            return
        layout = self.layout
        inside = max(layout.core_start, 1) <= start < layout.coda_start
        if (start_at_layer is not None and inside) or start_at_iteration:
            raise LoopedSemanticsError(
                "this loop carries more than its state from one iteration to the next (halting "
                "probabilities, routes, residual streams, shared keys, keys of iteration 0 or the "
                "state that a gate mixes in again), so a run cannot start inside it: "
                "start_at_layer=0 or start_at_iteration=0 runs all of it"
            )

    def _check_state(self, name: str, state: Tensor | None, x: Tensor) -> None:
        if state is not None and state.shape != x.shape:
            raise ValueError(
                f"{name} must be [batch, pos, d_model] = {tuple(x.shape)}, got {tuple(state.shape)}"
            )

    def _need_injection(
        self,
        run: StackRun,
        start: int,
        start_at_layer: int | None,
        start_at_iteration: int | None,
        stop: int | None,
        other_state: Tensor | None,
    ) -> None:
        """Refuse a start behind the prelude whose later iterations would lack e."""
        if self._lacks(start, start_at_layer, start_at_iteration, stop):
            if self.cfg.injection is not None and run.injection is None:
                raise ValueError(
                    "this start skips the prelude, whose output the following iterations inject: "
                    "pass injection=cache['hook_injection'] [batch, pos, d_model]"
                )
            if self.cfg.stacks is not None and other_state is None:
                raise ValueError(
                    "this start skips a call of the other stack, whose state the following "
                    "iterations read: pass other_state=cache['iter.{t}.hook_other_in'] "
                    "[batch, pos, d_model] of the iteration t of the start"
                )

    def _lacks(
        self,
        start: int,
        start_at_layer: int | None,
        start_at_iteration: int | None,
        stop: int | None,
    ) -> bool:
        """Whether a start skips what a later iteration of the run reads besides the stream."""
        layout = self.layout
        end = layout.n_layers if stop is None else stop
        if start_at_iteration is None:
            if start_at_layer is None or start < max(layout.core_start, 1):
                return False
            next_entry = layout.core_start + layout.n_core * (
                (start - layout.core_start) // layout.n_core + 1
            )
        else:
            next_entry = start
        return next_entry < layout.coda_start and next_entry <= end
