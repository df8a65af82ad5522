"""The map of one iteration of a model at the state of a run, as a function of the state alone."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout
from tl_loops.layout.selection import Selection, distinct_indices, one_index
from tl_loops.metrics.jacobian import differentiable_attention
from tl_loops.runs.batches import tokens_alone
from tl_loops.runs.cells import hooked, named_hooks
from tl_loops.upstream import can_restart, has_hooks, left_as_it_was

Hooks = list[tuple[str, Callable[..., Any]]]


@dataclass(frozen=True, eq=False)
class ModelLoopMap:
    """One or several iterations of a model on one prompt, from state to state.

    Call it with a state of the shape of ``state`` (and, where the model injects, another injection
    of the shape of ``injection``). It is differentiable in both, forwards and backwards (attention
    is computed unfused), and everything of :mod:`tl_loops.metrics` that takes a loop map takes it.
    Hooks that are on the model act, those on its first ``hook_state_in`` included.

    Attributes:
        state: The state of the run where the map begins: what comes to
            ``iter.{t}.hook_state_in``, [pos, d_model]; of the chosen positions alone, if some were
            chosen; with two stacks both states, [stack, pos, d_model].
        injection: e of the run, [pos, d_model]; ``None`` where nothing is injected.
        iteration: The first iteration that is run.
        span: How many are.
        stacks: Names of the stacks along the first axis of a joint state; empty: one state.
        pos: The positions that the state holds; ``None``: all.
    """

    state: Float[Tensor, "..."]
    injection: Float[Tensor, "pos d_model"] | None
    iteration: int
    span: int
    stacks: tuple[str, ...]
    pos: tuple[int, ...] | None
    _model: Model = field(repr=False)
    _layout: LoopLayout = field(repr=False)
    _tokens: Int[Tensor, "1 pos"] = field(repr=False)
    _initial_state: Float[Tensor, "1 pos d_model"] | None = field(repr=False)
    _whole: Float[Tensor, "stack pos d_model"] = field(repr=False)

    @checked
    def __call__(
        self, state: Float[Tensor, "..."], injection: Float[Tensor, "pos d_model"] | None = None
    ) -> Float[Tensor, "..."]:
        """The state after ``span`` iterations.

        Args:
            state: Of the shape of ``self.state``.
            injection: In place of the run's e, for these iterations.

        Raises:
            ValueError: A tensor of another shape, an injection for a model that has none, or
                another number of iterations than when the map was made.
        """
        if state.shape != self.state.shape:
            raise ValueError(
                f"state must have shape {list(self.state.shape)}, got {list(state.shape)}"
            )
        if injection is None:
            injection = self.injection
        elif self.injection is None:
            raise ValueError("this model injects nothing, so its map takes a state alone")
        elif injection.shape != self.injection.shape:
            raise ValueError(
                f"injection must have shape {list(self.injection.shape)}, "
                f"got {list(injection.shape)}"
            )
        whole = state if self.stacks else state.unsqueeze(0)
        if self.pos is not None:
            index = torch.tensor(self.pos, device=whole.device)
            whole = self._whole.index_copy(1, index, whole)
        if require_layout(self._model) != self._layout:
            raise ValueError(
                f"the model now has {require_layout(self._model)!r}, but this map was made with "
                f"{self._layout!r}: use it inside `with model.iterations(n):`, as it was made"
            )
        after = _iterated(self._model, self, whole, injection)
        if self.pos is not None:
            after = after[:, list(self.pos)]
        return after if self.stacks else after[0]

    def __repr__(self) -> str:
        last = self.iteration + self.span - 1
        which = f"iteration {last}" if self.span == 1 else f"iterations {self.iteration} to {last}"
        joint = f", stacks {' and '.join(self.stacks)}" if self.stacks else ""
        return f"ModelLoopMap({which} of {list(self.state.shape)}{joint})"

    @property
    def n_dimensions(self) -> int:
        """Number of entries of the state."""
        return self.state.numel()

    def _run(self, whole: Tensor, injection: Tensor | None) -> Tensor:
        """The states of all stacks after the last iteration of the span."""
        layout, model = self._layout, self._model
        last = self.iteration + self.span - 1
        states = dict(zip(self.stacks or ("",), whole, strict=True))
        found: dict[str, Tensor] = {}

        def keep(stack: str, value: Tensor, hook: Any) -> None:
            found[stack] = value[0]

        hooks: Hooks = [
            (f"iter.{t}.hook_state_out", partial(keep, _stack(layout, t) if self.stacks else ""))
            for t in range(self.iteration, last + 1)
        ]
        arguments: dict[str, Any] = {"return_type": None, **_stop(layout, last)}
        if _restarts(model):
            own, other = _own_and_other(layout, self.iteration, self.stacks)
            start = states[own].unsqueeze(0)
            arguments["start_at_iteration"] = self.iteration
            if other is not None:
                arguments["other_state"] = states[other].unsqueeze(0)
            if injection is not None:
                arguments["injection"] = injection.unsqueeze(0)
            if getattr(model.cfg, "value_embeddings", False):
                arguments["tokens"] = self._tokens
            with hooked(model, hooks):
                model(start, **arguments)
        else:
            given = self._given(layout, states, injection)
            if self._initial_state is not None:
                arguments["initial_state"] = self._initial_state
            with hooked(model, given, before_others=True), hooked(model, hooks):
                model(self._tokens, attention_mask=torch.ones_like(self._tokens), **arguments)
        return torch.stack([found.get(name, state) for name, state in states.items()])

    def _given(
        self, layout: LoopLayout, states: dict[str, Tensor], injection: Tensor | None
    ) -> Hooks:
        """Hooks that put states and injection in place of those of a whole run."""

        def put(given: Tensor, value: Tensor, hook: Any) -> Tensor:
            return given.unsqueeze(0)

        own, other = _own_and_other(layout, self.iteration, self.stacks)
        hooks: Hooks = [(f"iter.{self.iteration}.hook_state_in", partial(put, states[own]))]
        if other is not None:
            hooks.append((f"iter.{self.iteration}.hook_other_in", partial(put, states[other])))
        if injection is not None:
            hooks.append(("hook_injection", partial(put, injection)))
        return hooks


@left_as_it_was
def _iterated(model: Model, step: ModelLoopMap, whole: Tensor, injection: Tensor | None) -> Tensor:
    with differentiable_attention():
        return step._run(whole, injection)


@checked
@left_as_it_was
def loop_map(
    model: Model,
    prompt: str | Int[Tensor, "pos"],
    iteration: SupportsIndex = -1,
    *,
    span: int | None = None,
    pos: Selection | None = None,
    initial_state: Float[Tensor, "pos d_model"] | None = None,
) -> ModelLoopMap:
    """The map of one iteration of a model, at the state of a run on a prompt.

    Where the model can start inside its loop, a call runs the iteration alone; where it cannot (a
    model with hooks of its own, with an exit in its config, a bridge) it runs all that comes
    before, too, to the same numbers.

    Args:
        model: A looped model whose state is all that goes from one iteration to the next, with two
            stacks their two states.
        prompt: One text, or the tokens of one.
        iteration: The first iteration of the map; negative counts from the last.
        span: How many iterations the map runs; ``None``: one, so that with two stacks the other
            state is passed on as it is. A whole cycle of two stacks is ``len(model.cfg.stacks)``.
        pos: Positions that the state holds. The others keep what they have in the run when the map
            begins; with several iterations they move on from there.
        initial_state: The state before iteration 0; ``None``: the model's rule.

    Returns:
        The map.

    Raises:
        NoLoopError: The model has no loop.
        LoopedSemanticsError: The loop carries more than its state, or a bridge does not give a
            hook point that is needed.
        ValueError: The prompt cannot be fed, or the span goes beyond the last iteration.
        IndexError: There is no such iteration or position.
    """
    layout = require_layout(model)
    t = one_index("iteration", iteration, layout.n_iterations)
    span = 1 if span is None else span
    if not 1 <= span <= layout.n_iterations - t:
        raise ValueError(
            f"span={span} does not fit: from iteration {t} there are {layout.n_iterations - t}"
        )
    return _loop_maps(model, prompt, [t], span, pos, initial_state)[0]


@checked
@left_as_it_was
def loop_maps(
    model: Model,
    prompt: str | Int[Tensor, "pos"],
    *,
    pos: Selection | None = None,
    initial_state: Float[Tensor, "pos d_model"] | None = None,
) -> list[ModelLoopMap]:
    """The map of every iteration, from one run; see :func:`loop_map`.

    With all positions, the map of iteration t takes its state to that of iteration t + 1.

    Args:
        model: As for :func:`loop_map`.
        prompt: One text, or the tokens of one.
        pos: Positions that the states hold.
        initial_state: The state before iteration 0; ``None``: the model's rule.

    Returns:
        One map an iteration.

    Raises:
        NoLoopError: The model has no loop.
        LoopedSemanticsError: As for :func:`loop_map`.
        ValueError: The prompt cannot be fed.
        IndexError: There is no such position.
    """
    every = range(require_layout(model).n_iterations)
    return _loop_maps(model, prompt, every, 1, pos, initial_state)


def _loop_maps(
    model: Model,
    prompt: str | Tensor,
    iterations: Iterable[int],
    span: int,
    pos: Selection | None,
    initial_state: Tensor | None,
) -> list[ModelLoopMap]:
    """Run the prompt once, and take the states that enter the iterations."""
    layout, cfg = require_layout(model), model.cfg
    if carried := getattr(cfg, "carried", ()):
        raise LoopedSemanticsError(
            "this loop carries more than its state from one iteration to the next "
            f"({', '.join(carried)}), so an iteration is no map of the state alone: measure its "
            "trajectory (tl_loops.measure, cache.stack_activation('state_out')) instead"
        )
    tokens = tokens_alone(model, "prompt", prompt).to(next(model.parameters()).device)[None]
    chosen = None if pos is None else distinct_indices("position", tokens.shape[1], pos)
    stacks = tuple(dict.fromkeys(cfg.stacks)) if getattr(cfg, "stacks", None) else ()
    names = {t: [f"iter.{t}.hook_state_in"] for t in iterations}
    if stacks:
        for t, name in names.items():
            name.append(f"iter.{t}.hook_other_in")
    wanted = [name for both in names.values() for name in both]
    injects = getattr(cfg, "injection", None) is not None
    drawn = initial_state is None and getattr(cfg, "initial_state", None) == "normal"
    extra = ["hook_injection"] * injects + ["hook_initial_state"] * drawn
    _check_points(model, [*wanted, *extra, *(f"iter.{t}.hook_state_out" for t in names)])
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        found[name] = value.detach().clone()

    given = None if initial_state is None else initial_state.unsqueeze(0)
    arguments: dict[str, Any] = {"attention_mask": torch.ones_like(tokens), "return_type": None}
    if given is not None:
        arguments["initial_state"] = given
    # Tensors of inference mode could not be differentiated later.
    with torch.inference_mode(False), torch.no_grad():
        hooks = named_hooks(dict.fromkeys([*wanted, *extra]), keep)
        with hooked(model, hooks, before_others=True):
            model(tokens.clone(), **arguments, **_stop(layout, max(names)))
    made = []
    for t, (state_in, *other_in) in names.items():
        own, _ = _own_and_other(layout, t, stacks)
        both = {own: found[state_in][0]}
        if other_in:
            both[_own_and_other(layout, t, stacks)[1] or ""] = found[other_in[0]][0]
        whole = torch.stack([both[name] for name in stacks or ("",)])
        state = whole if chosen is None else whole[:, list(chosen)]
        made.append(
            ModelLoopMap(
                state if stacks else state[0],
                found["hook_injection"][0] if injects else None,
                t,
                span,
                stacks,
                chosen,
                model,
                layout,
                tokens,
                found["hook_initial_state"] if drawn else given,
                whole,
            )
        )
    return made


def _check_points(model: Model, names: Iterable[str]) -> None:
    """Raise on a bridge that lacks a hook point.

    Raises:
        LoopedSemanticsError: It does.
    """
    missing = [name for name in names if name not in model.hook_dict]
    if missing:
        raise LoopedSemanticsError(
            f"this model has no hook point {missing[0]!r}, which the map of an iteration needs"
            + (": call model.looped()" if hasattr(model, "looped") else "")
        )


def _restarts(model: Model) -> bool:
    """Whether an iteration can be run alone, to the numbers of a whole run."""
    cfg = model.cfg
    return (
        can_restart(model)
        and not any(has_hooks(point) for point in model.hook_dict.values())
        and all(getattr(cfg, name, None) is None for name in ("exit_step", "exit_threshold"))
        and cfg.positional_embedding_type in ("rotary", "standard", "none")
    )


def _stop(layout: LoopLayout, last: int) -> dict[str, int]:
    """Where a run stops that needs nothing after an iteration."""
    blocks = layout.iteration_blocks(last)
    return {} if blocks[-1] == layout.n_layers - 1 else {"stop_at_layer": blocks[-1] + 1}


def _stack(layout: LoopLayout, t: int) -> str:
    assert layout.stacks is not None
    return layout.stacks[t]


def _own_and_other(layout: LoopLayout, t: int, stacks: tuple[str, ...]) -> tuple[str, str | None]:
    """The stack that an iteration calls, and the other one; ``""`` and ``None`` without stacks."""
    if not stacks:
        return "", None
    own = _stack(layout, t)
    return own, next(name for name in stacks if name != own)
