"""The loss of one training step: targets at the trained exits, plus the penalties."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.model import Model
from tl_loops.loop_losses import expected_exit_loss
from tl_loops.metrics.exits import exit_distribution
from tl_loops.metrics.jacobian import differentiable_attention
from tl_loops.metrics.padding import statistic_dtype
from tl_loops.training.data import UNTRAINED, TrainingBatch
from tl_loops.training.penalties import growth_penalty, jacobian_penalty, settling_penalty
from tl_loops.training.settings import TrainingSettings
from tl_loops.training.trajectory import TrainingPass, exit_logits


@checked
def token_losses(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos_1"]:
    """Cross entropy of every token but the first, in nats, in float32 or better.

    Raises:
        IndexError: A token that the logits do not have.
    """
    outside = (tokens < 0) | (tokens >= logits.shape[-1])
    if bool(outside.any()):
        raise IndexError(
            f"tokens holds {int(tokens[outside][0])}, but the logits are of {logits.shape[-1]} ids"
        )
    return target_losses(logits[:, :-1], tokens[:, 1:]).view(tokens.shape[0], -1)


@checked
def target_losses(
    logits: Float[Tensor, "batch pos d_vocab"], targets: Int[Tensor, "batch pos"]
) -> Float[Tensor, "trained"]:
    """Cross entropy at the trained positions, in nats, in float32 or better.

    Args:
        logits: Of all positions.
        targets: ``UNTRAINED`` where none is trained.

    Returns:
        In the order of the rows, from left to right.

    Raises:
        IndexError: A target that the logits do not have.
    """
    rows = _trained(targets)
    answers = targets.flatten()[rows]
    outside = (answers < 0) | (answers >= logits.shape[-1])
    if bool(outside.any()):
        raise IndexError(
            f"targets holds {int(answers[outside][0])}, but the logits are of {logits.shape[-1]} "
            f"ids, and UNTRAINED is {UNTRAINED}"
        )
    read = logits.flatten(0, 1).index_select(0, rows)
    return F.cross_entropy(read.to(statistic_dtype(logits)), answers, reduction="none")


def right_answers(logits: Tensor, targets: Tensor) -> Bool[Tensor, "batch pos"]:
    """Where the likeliest token is the target."""
    return logits.detach().argmax(-1) == targets


def _trained(targets: Tensor) -> Int[Tensor, "trained"]:
    """The positions of all rows in one line that have a target."""
    return (targets.flatten() != UNTRAINED).nonzero()[:, 0]


def check_can_train(model: Model, settings: TrainingSettings) -> None:
    """Raise where a model lacks what the settings train.

    Raises:
        LoopedSemanticsError: ``exit_loss="expected"`` without an exit gate; or a model whose states
            are no single readout.
    """
    if settings.exit_loss == "expected" and not getattr(model.cfg, "exit_gate", False):
        raise LoopedSemanticsError(
            "exit_loss='expected' weights the exits by the model's gate, and this one has none: "
            "build it with exit_gate=True, or train with exit_loss='mean' or 'last'"
        )
    if settings.exit_loss != "last":
        model.cfg.readout.refuse_sum_of_states()


@checked
def step_losses(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    run: TrainingPass,
    settings: TrainingSettings,
    generator: torch.Generator | None = None,
    targets: Int[Tensor, "*iteration batch pos"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """The parts of a step's loss, each times its weight; their sum is what is minimised.

    Args:
        model: The model that ran.
        tokens: What it read.
        run: What its pass left.
        settings: Of the training.
        generator: Of the directions of the Jacobian's penalty.
        targets: As in :class:`TrainingBatch`; ``None``: every position predicts the next token.

    Returns:
        ``"loss"``, the mean loss of the targets, and the penalties that have a weight and a step
        between states.

    Raises:
        ValueError: No target is trained at the exits that are read; or with the expected loss the
            exits train different positions.
    """
    batch = TrainingBatch.next_tokens(tokens) if targets is None else TrainingBatch(tokens, targets)
    parts = {"loss": _EXIT_LOSS[settings.exit_loss](model, batch, run, settings)}
    path = _path(run)
    for name, weight, penalty in (
        ("growth", settings.growth_weight, growth_penalty),
        ("settling", settings.settling_weight, settling_penalty),
    ):
        if weight and path.shape[0] > 1:
            parts[name] = weight * penalty(path)
    if settings.jacobian_weight:
        entering = run.entering[max(run.entering)]
        norm = jacobian_penalty(entering, run.states[-1], generator)
        parts["jacobian"] = settings.jacobian_weight * norm
    return parts


def attention_for(settings: TrainingSettings) -> AbstractContextManager[object]:
    """Attention of a pass: the Jacobian's penalty needs second derivatives, which fused lacks."""
    return differentiable_attention() if settings.jacobian_weight else nullcontext()


def _path(run: TrainingPass) -> Float[Tensor, "iteration batch pos d_model"]:
    """The states between which the penalties see steps; the very first state is no result."""
    before = [run.entering[run.first]] if run.first else []
    return torch.stack([*before, *run.states])


def _last(
    model: Model, batch: TrainingBatch, run: TrainingPass, settings: TrainingSettings
) -> Float[Tensor, ""]:
    last = run.first + len(run.states) - 1
    return _some(target_losses(run.logits, batch.after(last)), f"iteration {last}").mean()


def _mean(
    model: Model, batch: TrainingBatch, run: TrainingPass, settings: TrainingSettings
) -> Float[Tensor, ""]:
    of_exits = [losses.mean() for losses in _exit_losses(model, batch, run) if losses.numel()]
    return torch.stack(of_exits).mean()


def _expected(
    model: Model, batch: TrainingBatch, run: TrainingPass, settings: TrainingSettings
) -> Float[Tensor, ""]:
    rows = _trained(batch.after(0))
    for t in range(len(run.states)):
        if not torch.equal(_trained(batch.after(t)), rows):
            raise ValueError(
                "exit_loss='expected' weights the losses of all exits at each position, but the "
                f"targets after iteration {t} are at other positions than those after iteration 0: "
                f"put UNTRAINED ({UNTRAINED}) at the same positions of every row"
            )
    losses = torch.stack(_exit_losses(model, batch, run))
    leaving = exit_distribution(torch.stack(run.gates).squeeze(-1)).flatten(1)[:, rows]
    return expected_exit_loss(losses, leaving.to(losses), settings.entropy_weight)


def _exit_losses(model: Model, batch: TrainingBatch, run: TrainingPass) -> list[Tensor]:
    """The losses of each exit's trained positions, [trained]; some exit has one."""
    read = enumerate(exit_logits(model, batch.tokens, run), run.first)
    found = [target_losses(logits, batch.after(t)) for t, logits in read]
    _some(torch.cat(found), f"iterations {run.first} to {run.first + len(found) - 1}")
    return found


def _some(losses: Tensor, read: str) -> Tensor:
    if not losses.numel():
        raise ValueError(
            f"the loss reads the exits after {read} (counted from 0), where every target is "
            f"UNTRAINED ({UNTRAINED}): give some of them a target"
        )
    return losses


_EXIT_LOSS: Mapping[
    str, Callable[[Model, TrainingBatch, TrainingPass, TrainingSettings], Float[Tensor, ""]]
] = {"last": _last, "mean": _mean, "expected": _expected}
