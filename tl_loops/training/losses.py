"""The loss of one training step: next tokens at the trained exits, plus the penalties."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.model import Model
from tl_loops.loop_losses import expected_exit_loss
from tl_loops.metrics.exits import exit_distribution
from tl_loops.metrics.jacobian import differentiable_attention
from tl_loops.metrics.padding import statistic_dtype
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
    wide = logits[:, :-1].to(statistic_dtype(logits))
    loss = F.cross_entropy(wide.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return loss.view(tokens.shape[0], -1)


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
) -> dict[str, Float[Tensor, ""]]:
    """The parts of a step's loss, each times its weight; their sum is what is minimised.

    Args:
        model: The model that ran.
        tokens: What it read.
        run: What its pass left.
        settings: Of the training.
        generator: Of the directions of the Jacobian's penalty.

    Returns:
        ``"loss"``, the loss of the tokens, and the penalties that have a weight and a step
        between states.
    """
    parts = {"loss": _TOKEN_LOSS[settings.exit_loss](model, tokens, run, settings)}
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
    model: Model, tokens: Tensor, run: TrainingPass, settings: TrainingSettings
) -> Float[Tensor, ""]:
    return token_losses(run.logits, tokens).mean()


def _mean(
    model: Model, tokens: Tensor, run: TrainingPass, settings: TrainingSettings
) -> Float[Tensor, ""]:
    return torch.stack(
        [token_losses(each, tokens).mean() for each in exit_logits(model, tokens, run)]
    ).mean()


def _expected(
    model: Model, tokens: Tensor, run: TrainingPass, settings: TrainingSettings
) -> Float[Tensor, ""]:
    losses = torch.stack([token_losses(each, tokens) for each in exit_logits(model, tokens, run)])
    leaving = exit_distribution(torch.stack(run.gates).squeeze(-1))[..., :-1]
    return expected_exit_loss(losses, leaving.to(losses), settings.entropy_weight)


_TOKEN_LOSS: Mapping[
    str, Callable[[Model, Tensor, TrainingPass, TrainingSettings], Float[Tensor, ""]]
] = {"last": _last, "mean": _mean, "expected": _expected}
