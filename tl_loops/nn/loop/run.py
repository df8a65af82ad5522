"""The unrolled stack: physical blocks, unrolled by tying, run with the loop's boundaries."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.layout.layout import LoopLayout
from tl_loops.nn.context import ForwardContext
from tl_loops.nn.loop.halting import Halting
from tl_loops.nn.loop.routing import Routing
from tl_loops.upstream import KeyValueCache, unshared


@dataclass
class Trajectory:
    """What a run leaves behind besides the residual stream.

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
    """One pass through (part of) the unrolled stack.

    Attributes:
        model: The root module: ``blocks``, ``iter``, and what the config asks for between them.
        layout: The layout that they are unrolled to.
        cfg: The model's config.
        context: Positions and masks.
        initial_state: State before iteration 0; ``None``: the architecture's own rule.
        injection: The prelude output e, when the run starts behind the prelude.
        past: Key-value cache, one entry an unrolled block.
        keep_states: Whether the trajectory keeps every state.
    """

    model: Any
    layout: LoopLayout
    cfg: LoopedTransformerConfig
    context: ForwardContext
    initial_state: Float[Tensor, "batch pos d_model"] | None = None
    injection: Float[Tensor, "batch pos d_model"] | None = None
    past: KeyValueCache | None = None
    keep_states: bool = False

    def run(
        self,
        x: Tensor,
        start: int,
        stop: int | None,
        enter_first: bool = True,
        state_given: bool = False,
    ) -> Trajectory:
        """Run blocks ``start`` to ``stop`` (exclusive).

        Args:
            x: Residual stream before block ``start``.
            start: First block.
            stop: The result is what enters block ``stop``; with the unrolled depth, what leaves
                the last block; ``None`` also runs what follows the last block.
            enter_first: Whether what lies before block ``start`` (injection, norm before the coda)
                is still to be done.
            state_given: Whether ``x`` is the state before an iteration rather than what the
                prelude gives.
        """
        out = Trajectory(x)
        end = self.layout.n_layers if stop is None else stop
        self._injected = None if self.injection is None else self._prepare(self.injection)
        self._halting = Halting(self.cfg.halting or "", self.cfg.act_epsilon)
        self._halted: Tensor | None = None
        self._routing: Routing | None = None
        self._conditions: dict[int, Tensor] = {}
        for index in range(start, end):
            if index > start or enter_first:
                begin = index > start or not state_given
                out.resid = self._enter(index, out.resid, begin)
            entry = self.past[index] if self.past is not None else None
            context = self.context
            if self._routing is not None and self.layout.coordinate(index).phase == "core":
                context = self._routed
            if self.cfg.time_conditioning:
                context = self._conditioned(context, index, out.resid)
            if self.cfg.first_pass_window is not None:
                at = self.layout.coordinate(index)
                place = None if at.iteration is None else (at.iteration, at.layer)
                context = replace(context, place=place)
            out.resid = self.model.blocks[index](out.resid, context, entry)
            if index < self.layout.n_layers - 1 or stop is None:
                self._leave(index, out)
        if stop is None or start < stop < self.layout.n_layers:
            out.resid = self._enter(end, out.resid)
        return out

    def _conditioned(self, context: ForwardContext, index: int, x: Tensor) -> ForwardContext:
        """The context with what modulates the block, made once an iteration."""
        t = self.layout.coordinate(index).iteration
        assert t is not None  # such a model has no prelude and no coda
        if t not in self._conditions:
            condition = self.model.time_conditioning(t, self.layout.n_iterations).to(x)
            condition = condition.expand(x.shape[0], 1, -1)
            self._conditions = {t: self.model.iter[t].hook_condition(condition)}
        return replace(context, condition=self._conditions[t])

    def _prepare(self, e: Tensor) -> Tensor | None:
        return self.model.injection.prepare(e) if self.cfg.injection is not None else None

    def _enter(self, index: int, x: Tensor, begin: bool = True) -> Tensor:
        """What happens between what precedes block ``index`` and the block itself."""
        layout, model = self.layout, self.model
        if index == layout.coda_start:
            return model.enter_coda(x)
        in_core = layout.core_start <= index < layout.coda_start
        if not in_core or (index - layout.core_start) % layout.n_core:
            return x
        t = (index - layout.core_start) // layout.n_core
        if t == 0 and begin:
            x = self._begin_loop(x)
        return self._inject(t, x)

    def _inject(self, t: int, x: Tensor) -> Tensor:
        """What enters the first layer of iteration ``t``, from the state before it."""
        model, hooks = self.model, self.model.iter[t]
        state = hooks.hook_state_in(unshared(x, hooks.hook_state_in))
        self._before = state
        if self.cfg.router is not None:
            self._route(state, t)
        if self.cfg.hyper_connections is not None:
            state = self._read_streams(x, state, t)
        if self.cfg.step_embedding is not None:
            embedding = model.step_embedding(state, t, self.context.positions)
            state = state + hooks.hook_step_embedding(embedding)
        if self.cfg.injection is not None:
            assert self._injected is not None
            state = model.injection(state, self._injected)
        return hooks.hook_injected(unshared(state, hooks.hook_injected))

    def _begin_loop(self, x: Tensor) -> Tensor:
        """Fix e and the initial state from what the prelude (or the embedding) gives."""
        model = self.model
        if self.cfg.injection is not None:
            x = model.ln_injection(x) if self.cfg.norm_injection else x
            x = model.hook_injection(unshared(x, model.hook_injection))
            self._injected = self._prepare(x)
        if self.initial_state is not None:
            state = self.initial_state.to(x)
        else:
            state = model.initial_state(x, self.context.positions)
        return model.hook_initial_state(unshared(state, model.hook_initial_state))

    def _route(self, state: Tensor, t: int) -> None:
        """Fix every token's depth before iteration 0, and the masks of iteration t."""
        self._entered = state
        if t == 0 or self._routing is None:
            weights = self.model.hook_router_weights(self.model.router(state))
            depths = key_depths = weights.argmax(-1)
            if self.past is not None:
                # Which cached keys are there depends on the depths of their tokens.
                known = getattr(self.past, "router_depths", None)
                key_depths = depths if known is None else torch.cat([known, depths], dim=1)
                if not self.past.frozen:
                    self.past.router_depths = key_depths  # type: ignore[attr-defined]
            every = self.cfg.router_gates == "every"
            self._routing = Routing(weights, depths, key_depths, state, every)
        self._routed = self._routing.context(self.context, t)

    def _read_streams(self, x: Tensor, state: Tensor, t: int) -> Tensor:
        """What the core reads of the streams; an edit of the state moves all of them alike."""
        hyper, hooks = self.model.hyper_connections, self.model.iter[t]
        if t == 0:
            self._streams = hyper.start(state)
        else:
            self._streams = self._streams + (state - x).unsqueeze(-2)
        gates = hyper.gates(self._streams, t)
        self._write = hooks.hook_hyper_write(gates.write)
        self._keep = hooks.hook_hyper_keep(gates.keep)
        return hyper.read(self._streams, hooks.hook_hyper_read(gates.read))

    def _write_streams(self, core: Tensor, t: int) -> Tensor:
        """The mean of the streams behind an iteration: what the coda would read."""
        hyper = self.model.hyper_connections
        self._streams = hyper.write(self._streams, core, self._write, self._keep, t)
        return self._streams.mean(-2)

    def _leave(self, index: int, out: Trajectory) -> None:
        """What happens behind block ``index`` when it ends an iteration."""
        layout = self.layout
        behind_core = index - layout.core_start + 1
        if not layout.core_start <= index < layout.coda_start or behind_core % layout.n_core:
            return
        t = behind_core // layout.n_core - 1
        hooks = self.model.iter[t]
        state = out.resid
        last = t == layout.n_iterations - 1
        if self._routing is not None:
            weight = hooks.hook_router_weight(self._routing.weight(t))
            state = self._routing.update(self._entered, state, weight, t)
        if self.cfg.hyper_connections is not None:
            state = self._write_streams(state, t)
        if self.cfg.halt_head:
            hooks.hook_halt_logit(self.model.halt_head(state - self._before))
        if self.cfg.state_gate_rank is not None:
            gate = hooks.hook_state_gate(self.model.state_gate(state - self._before))
            state = gate * state + (1 - gate) * self._before
        norm = self.cfg.readout.over(layout).iteration_norm(t)
        if norm is not None:
            out.normed = norm == "ln_final"
            state = (self.model.ln_final if out.normed else hooks.norm)(state)
        out.resid = hooks.hook_state_out(unshared(state, hooks.hook_state_out))
        if self.cfg.hyper_connections is not None:
            self._streams = self._streams + (out.resid - state).unsqueeze(-2)
        if self.cfg.exit_gate:
            out.gates.append(hooks.hook_exit_gate(self.model.exit_gate(out.resid)))
        if self.keep_states:
            out.states.append(out.resid)
        if self.cfg.halting is not None:
            weight = hooks.hook_halting(self._halting.step(out.gates[-1], last))
            if self.cfg.halting == "act":
                counted = weight.to(out.resid) * out.resid
                self._halted = counted if self._halted is None else self._halted + counted
                if last:
                    out.resid = self.model.hook_halted_state(self._halted)
