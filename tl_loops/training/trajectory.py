"""One training pass: states, gates and readouts of the iterations that gradients flow through."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.arguments import check_at_least, checked
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout
from tl_loops.lens.decode import CodaLens
from tl_loops.lens.points import select_points
from tl_loops.runs.inputs import LensInputs
from tl_loops.upstream import left_as_it_was


@dataclass(eq=False)
class TrainingPass:
    """What a pass with a graph leaves.

    Attributes:
        first: The first iteration with gradient, counted from 0.
        logits: [batch, pos, d_vocab], the model's own output after the last iteration.
        states: The state that leaves each iteration from ``first`` on, [batch, pos, d_model].
        entering: The state that enters iteration ``first``, and the last iteration.
        gates: The exit gate's logit after each of these iterations, [batch, pos, 1]; empty where
            the model has no gate.
    """

    first: int
    logits: Float[Tensor, "batch pos d_vocab"]
    states: list[Tensor] = field(default_factory=list)
    entering: dict[int, Tensor] = field(default_factory=dict)
    gates: list[Tensor] = field(default_factory=list)


@checked
@left_as_it_was
def training_pass(
    model: Model, tokens: Int[Tensor, "batch pos"], n_iterations: int, n_gradient: int | None = None
) -> TrainingPass:
    """Run a model so that gradients flow through its last iterations alone.

    The prelude has its gradient through the injection, which every iteration reads. The iterations
    before run without a graph, so that memory does not grow with them.

    Args:
        model: A looped model that already runs ``n_iterations``.
        tokens: [batch, pos], without padding.
        n_iterations: Its number of iterations.
        n_gradient: How many of the last iterations have gradients; ``None``: all.

    Raises:
        NoLoopError: The model has no loop.
        LoopedSemanticsError: Gradients are cut in a loop that carries more than its state.
        ValueError: The model runs another number of iterations, or ``n_gradient`` is below 1.
    """
    layout = require_layout(model)
    check_at_least(1, n_gradient=n_gradient)
    if n_iterations != layout.n_iterations:
        raise ValueError(
            f"n_iterations is {n_iterations}, but the model runs {layout.n_iterations}: train "
            "within `with model.iterations(n):`"
        )
    first = 0 if n_gradient is None else max(0, n_iterations - n_gradient)
    if first and not getattr(model.cfg, "state_is_whole", True):
        raise LoopedSemanticsError(
            "this loop carries more than its state from one iteration to the next "
            f"({', '.join(model.cfg.carried)}), so gradients cannot be cut at the state alone: "
            "leave n_gradient out"
        )
    kept = TrainingPass(first, torch.empty(0, 0, 0))
    with_gradient = torch.is_grad_enabled()

    def enter(state: Tensor, hook: Any) -> Tensor | None:
        t = int(hook.name.split(".")[1])
        if first and t == 0:
            torch.set_grad_enabled(False)
        if t == first and first:
            torch.set_grad_enabled(with_gradient)
            state = state.detach()
        if t not in (first, n_iterations - 1):
            return state if t == first else None
        if with_gradient and not state.requires_grad:
            state.requires_grad_()
        # A node of its own: what else reads this tensor is no part of the loop's Jacobian.
        kept.entering[t] = state.view_as(state)
        return kept.entering[t]

    def leave(state: Tensor, hook: Any) -> None:
        if int(hook.name.split(".")[1]) >= first:
            kept.states.append(state)

    def gate(value: Tensor, hook: Any) -> None:
        if int(hook.name.split(".")[1]) >= first:
            kept.gates.append(value)

    hooks = [(f"iter.{t}.hook_state_in", enter) for t in range(n_iterations)]
    hooks += [(f"iter.{t}.hook_state_out", leave) for t in range(n_iterations)]
    if getattr(model.cfg, "exit_gate", False):
        hooks += [(f"iter.{t}.hook_exit_gate", gate) for t in range(n_iterations)]
    try:
        with model.hooks(fwd_hooks=hooks):
            kept.logits = model(tokens)
    finally:
        torch.set_grad_enabled(with_gradient)
    return kept


@checked
def exit_logits(
    model: Model, tokens: Int[Tensor, "batch pos"], run: TrainingPass
) -> list[Float[Tensor, "batch pos d_vocab"]]:
    """What the model would have said had it left the loop after each iteration with gradient.

    The last is the run's own output.

    Raises:
        LoopedSemanticsError: The sum of all states leaves the loop, and no single one.
        ValueError: The run is of other tokens, or of another model.
    """
    state = run.states[-1]
    if (*tokens.shape, model.cfg.d_model) != tuple(state.shape):
        raise ValueError(
            f"the run's states are [batch, pos, d_model] = {list(state.shape)}, but the tokens are "
            f"{list(tokens.shape)} and the model is {model.cfg.d_model} wide: pass those of the run"
        )
    lens = CodaLens()
    points = select_points(model, "states")[run.first :]
    lens.check(model, points)
    everywhere = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    inputs = LensInputs(tokens, None, everywhere)
    before = zip(points[:-1], run.states[:-1], strict=True)
    return [*(lens.logits(model, state, point, inputs) for point, state in before), run.logits]
