"""Training of a looped model on a corpus or a task: one call, exact to resume."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_loops.arguments import check_at_least, checked
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout
from tl_loops.training.checkpoint import Progress, load_progress, run_identity, save_progress
from tl_loops.training.data import (
    UNTRAINED,
    AdaptiveData,
    TrainingBatch,
    TrainingData,
    check_repeatable,
    draw_batch,
)
from tl_loops.training.evaluation import evaluate_batches
from tl_loops.training.inputs import batches_identity, held_out_batches, training_data
from tl_loops.training.log import TrainingLog
from tl_loops.training.looks import look_at
from tl_loops.training.losses import attention_for, check_can_train, right_answers, step_losses
from tl_loops.training.radius import RadiusRule
from tl_loops.training.settings import TrainingSettings
from tl_loops.training.trajectory import TrainingPass, training_pass
from tl_loops.upstream import left_as_it_was
from tl_loops.writing import check_writable, in_use


class NotFiniteError(FloatingPointError):
    """The loss or its gradient is NaN or infinite; the weights are those before the step."""


@checked
@left_as_it_was
def train(
    model: Model,
    data: Int[Tensor, "token"] | TrainingData,
    settings: TrainingSettings,
    *,
    evaluation: Int[Tensor, "held_out"] | TrainingData | None = None,
    evaluate_every: int | None = None,
    evaluation_iterations: Sequence[int] = (1, 2, 4, 8),
    n_evaluation: int = 32,
    look: Callable[[int], Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    stop_after: int | None = None,
    progress: bool = True,
) -> TrainingLog:
    """Train a looped model in place.

    Each step draws its batch, its number of iterations and (with ``cfg.state_seed=None``) its
    initial states from the seed and the step's number alone, so that a run that was killed goes on
    from its checkpoint to the same weights, byte for byte, on the same machine with the same
    number of threads. Torch's own random state is left as it was.

    Args:
        model: The model, with weights that have gradients. It comes back in the mode it was in.
        data: Token ids in one line, for next-token prediction in contexts of
            ``settings.n_context``; or :class:`TrainingData`, such as a task with its targets.
        settings: Of the run.
        evaluation: Held-out tokens, or data that held-out batches are drawn from, once; ``None``:
            no evaluation.
        evaluate_every: Steps between evaluations; ``None``: at the end alone.
        evaluation_iterations: Numbers of iterations that are evaluated.
        n_evaluation: Contexts of an evaluation at most; of drawn data, rows.
        look: Called after every step with the number of steps done. What it gives, in JSON's types,
            is kept in the log and in the checkpoint; ``None`` is not. The model stands in eval
            mode meanwhile, without gradients and with initial states as for seed 0.
        checkpoint: File of the run. If it is there the run goes on from it, else it begins; it
            stays when the run is done. Make the model as it was at the start: its weights tell
            whose the file is.
        checkpoint_every: Steps between two writings.
        stop_after: End after this many steps of the plan, at the plan's learning rate there;
            ``None``: after ``settings.n_steps``.
        progress: Whether to show a bar with loss and tokens per second.

    Returns:
        The log of the whole run.

    Raises:
        NoLoopError: The model has no loop.
        LoopedSemanticsError: The settings train what the model lacks.
        ValueError: The corpus is shorter than one context; the data give no tokens of the model,
            nothing that is trained, or with a checkpoint other batches for the same random numbers;
            or the rule for the state's radius scales a weight that is not trained.
        NotFiniteError: A loss or gradient is NaN or infinite; the message says at which step and
            after which iteration.
        CheckpointError: The file belongs to another run or is damaged.
        FileInUseError: Another process trains with this file.
    """
    require_layout(model)
    check_can_train(model, settings)
    check_at_least(1, evaluate_every=evaluate_every, checkpoint_every=checkpoint_every)
    check_at_least(1, stop_after=stop_after, n_evaluation=n_evaluation)
    drawn_from = training_data(data, settings, model)
    held_out = held_out_batches(evaluation, settings, n_evaluation, model)
    parameters = _trained(model)
    rule = RadiusRule(model, settings, parameters)
    optimiser = _optimiser(list(parameters.values()), settings)
    described = {
        "every": evaluate_every,
        "n_iterations": list(evaluation_iterations),
        "batches": batches_identity(held_out),
        "look": look is not None,
    }
    done = Progress(0, TrainingLog(), drawn_from)
    end = min(settings.n_steps, settings.n_steps if stop_after is None else stop_after)
    mode = model.training
    with ExitStack() as stack:
        stack.callback(model.train, mode)
        identity = {}
        if checkpoint is not None:
            check_repeatable(drawn_from, settings.batch_size)
            check_writable(checkpoint)
            stack.enter_context(in_use(checkpoint))
            model.train()
            identity = run_identity(model, drawn_from, settings, described)
            found = load_progress(
                checkpoint, identity, parameters, optimiser, settings.n_steps, drawn_from
            )
            done = found or done
        bar = stack.enter_context(
            tqdm(total=end, initial=done.n_done, desc="training", disable=not progress)
        )
        stack.enter_context(torch.enable_grad())
        while done.n_done < end:
            model.train()
            row = _step(model, parameters, optimiser, settings, rule, done)
            done.n_done += 1
            shown = f"{row['loss']:.4f}"
            bar.set_postfix(loss=shown, tokens_per_s=f"{row['tokens_per_second']:.0f}")
            bar.update()
            last = done.n_done == end
            due = evaluate_every is not None and done.n_done % evaluate_every == 0
            if held_out and (due or last):
                evaluated = evaluate_batches(model, held_out, evaluation_iterations)
                done.log.add_evaluation(done.n_done, evaluated)
            if look is not None:
                look_at(model, look, done.n_done, done.log)
            if checkpoint is not None and (last or done.n_done % checkpoint_every == 0):
                save_progress(checkpoint, identity, parameters, optimiser, done)
    return done.log


def _step(
    model: Model,
    parameters: dict[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    settings: TrainingSettings,
    rule: RadiusRule,
    done: Progress,
) -> dict[str, float | int]:
    """One step of the optimiser; returns its row of the log."""
    step, began = done.n_done, time.perf_counter()
    device = next(iter(parameters.values())).device
    generator = torch.Generator().manual_seed(_mixed(settings.seed, step))
    n_iterations = settings.iterations.draw(generator)
    drawn = draw_batch(done.data, settings.batch_size, generator, model)
    n_iterations, n_gradient = _iterations(drawn, settings, n_iterations)
    batch = drawn.to(device)
    tokens, targets = batch.tokens, batch.targets
    rate = settings.learning_rate_at(step)
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    narrow = settings.autocast_dtype
    autocast = nullcontext() if narrow is None else torch.autocast(device.type, dtype=narrow)
    devices = [device] if device.type == "cuda" else []
    with model.iterations(n_iterations), torch.random.fork_rng(devices), attention_for(settings):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        with autocast:
            run = training_pass(model, tokens, n_iterations, n_gradient)
            for state in run.states:
                state.retain_grad()
            parts = step_losses(model, tokens, run, settings, generator, targets)
        total = torch.stack(list(parts.values())).sum()
        if not bool(total.isfinite()):
            raise NotFiniteError(_where(step, settings, run, parts))
        for state in run.states:
            state.grad = None  # what the Jacobian's penalty left
        total.backward()
    norm = nn.utils.clip_grad_norm_(parameters.values(), settings.clip_norm)
    if not bool(norm.isfinite()):
        raise NotFiniteError(
            f"the gradient of step {step + 1} of {settings.n_steps} is {float(norm)} though the "
            f"loss is {float(total.detach()):.4g}: lower learning_rate or clip_norm, or cut "
            "gradients with n_gradient"
        )
    optimiser.step()
    rule.hold(model, step)
    answers = batch.after(n_iterations - 1)
    right = right_answers(run.logits, answers)
    if isinstance(done.data, AdaptiveData):
        done.data.after_step(drawn, right.cpu())
    seconds = time.perf_counter() - began
    row: dict[str, float | int] = {
        "step": step + 1,
        "n_iterations": n_iterations,
        **{name: float(part.detach()) for name, part in parts.items()},
        "accuracy": float(right.sum() / (answers != UNTRAINED).sum()),
        "gradient_norm": float(norm),
        "learning_rate": rate,
        "tokens_per_second": tokens.numel() / seconds,
    }
    missing = [float("nan")] * run.first
    norms = [float("nan") if s.grad is None else float(s.grad.float().norm()) for s in run.states]
    done.log.add(row, missing + norms)
    return row


def _iterations(
    batch: TrainingBatch, settings: TrainingSettings, drawn: int
) -> tuple[int, int | None]:
    """How many iterations a batch runs, and through how many of them gradients flow.

    Raises:
        ValueError: The batch cuts gradients under a loss that needs them all.
    """
    if batch.n_gradient is not None and settings.exit_loss == "expected":
        raise ValueError(
            "exit_loss='expected' weights the losses of all iterations, so gradients flow through "
            f"all: leave n_gradient={batch.n_gradient} out of the batches"
        )
    n_gradient = settings.n_gradient if batch.n_gradient is None else batch.n_gradient
    return drawn if batch.n_iterations is None else batch.n_iterations, n_gradient


def _where(
    step: int, settings: TrainingSettings, run: TrainingPass, parts: dict[str, Tensor]
) -> str:
    """Which step, part and iteration a loss that is not finite comes from."""
    values = ", ".join(f"{name} {float(part.detach())}" for name, part in parts.items())
    bad = [t for t, state in enumerate(run.states, run.first) if not bool(state.isfinite().all())]
    entering = run.entering.get(run.first)
    if run.first and entering is not None and not bool(entering.isfinite().all()):
        place = f"the state already is not finite before iteration {run.first}"
    elif bad:
        place = f"the state is first not finite after iteration {bad[0]} (counted from 0)"
    else:
        place = "all states are finite, so that it comes from what follows the loop"
    return (
        f"the loss of step {step + 1} of {settings.n_steps} is not finite ({values}): {place}. "
        "Lower learning_rate, or keep the state small with growth_weight; the weights are those "
        "before this step"
    )


def _trained(model: Model) -> dict[str, nn.Parameter]:
    """The weights with gradients, each once, by physical name.

    Raises:
        ValueError: None has gradients.
    """
    named = model.physical_named_parameters()
    found = {name: p for name, p in named if p.requires_grad}
    if not found:
        raise ValueError("no weight of the model has requires_grad=True: there is nothing to train")
    return found


def _optimiser(parameters: list[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas)


def _mixed(seed: int, step: int) -> int:
    """One number of both, so that neighbouring seeds and steps give unrelated draws."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    mixed ^= mixed >> 31
    return (mixed * 0x94D049BB133111EB) % 2**63
