"""Step decodability: can a probe tell from a state which iteration it comes from?"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import check_at_least
from tl_loops.metrics.linear_probes import minimise_logistic_loss
from tl_loops.metrics.precision import full_precision
from tl_loops.metrics.states import measured_states
from tl_loops.printing import prints_short

Probe = Literal["linear", "gated_mlp"]


@prints_short
@dataclass(frozen=True, eq=False)
class StepDecodability:
    """How well a probe predicts the iteration of held-out tokens.

    Attributes:
        accuracy: share of validation tokens whose iteration is predicted right `[iteration]`.
        confusion: share of the states of iteration (row) that is taken for iteration (column)
            `[iteration, iteration]`.
        loss: mean cross-entropy on the validation tokens, natural log.
        train_accuracy: mean accuracy on the training tokens.
        chance: accuracy of guessing, 1 / n_iterations.
        chance_loss: cross-entropy of guessing, ln n_iterations.
        n_train: number of training tokens.
        n_validation: number of validation tokens.
    """

    accuracy: Float[Tensor, "iteration"]
    confusion: Float[Tensor, "iteration iteration"]
    loss: float
    train_accuracy: float
    chance: float
    chance_loss: float
    n_train: int
    n_validation: int


@full_precision
def step_decodability(
    states: Float[Tensor, "iteration *tokens d_model"],
    probe: Probe = "linear",
    seed: int = 0,
    train_fraction: float | int = 0.8,
    n_steps: int = 500,
    ridge: float | int = 1e-4,
    batch_size: int = 256,
    learning_rate: float | int = 3e-3,
    weight_decay: float | int = 0.01,
) -> StepDecodability:
    """Train a probe that predicts the iteration from the state, and test it on other tokens.

    At a fixed point the state holds no trace of the iteration: among m iterations that have
    converged the accuracy falls to 1/m, although it stays above `chance` overall; the `confusion`
    shows the block. After Huginn's public loop classifier (all iterations of a token in one batch,
    cross-entropy); unlike there, features are standardised by the training tokens, validation
    tokens are never trained on, and the linear probe is fitted to its optimum. For the binary
    comparison of r with r+1 pass `states[[r, r + 1]]`.

    Args:
        states: `[iteration, ..., d_model]`. All axes in between are tokens; they are split one by
            one, so neighbouring tokens of a prompt may fall on both sides.
        probe: `"linear"`: multinomial logistic regression, a convex problem, by L-BFGS on all
            training tokens. `"gated_mlp"`: Linear(LayerNorm(x + W_out(silu(a) * b))) with a, b of
            width 2 d_model, by AdamW with cosine decay.
        seed: seed of the split, the initial weights and the batches.
        train_fraction: share of tokens to train on.
        n_steps: optimiser steps, the most for `"linear"`, which stops when it has converged.
        ridge: L2 penalty of `"linear"`, ridge/2 ||W||^2.
        batch_size: tokens per step of `"gated_mlp"`.
        learning_rate: of `"gated_mlp"`.
        weight_decay: of `"gated_mlp"`.

    Returns:
        `StepDecodability`, on the device of the states, without gradient.

    Raises:
        ValueError: If there are fewer than two iterations, a side of the split would be empty, a
            state is not finite, or an option is unknown.
    """
    if probe not in ("linear", "gated_mlp"):
        raise ValueError(f'got probe={probe!r}, expected "linear" or "gated_mlp"')
    x = measured_states(states.detach())
    n_iterations, d_model = x.shape[0], x.shape[-1]
    x = x.reshape(n_iterations, math.prod(x.shape[1:-1]), d_model).transpose(
        0, 1
    )  # [token, iteration, d_model]
    if n_iterations < 2:
        raise ValueError("one iteration given; there is nothing to tell apart, pass at least two")
    check_at_least(1, n_steps=n_steps, batch_size=batch_size)
    if not 0 < train_fraction < 1:
        raise ValueError(f"train_fraction={train_fraction}; expected a share between 0 and 1")
    n_train = round(train_fraction * x.shape[0])
    if not 0 < n_train < x.shape[0]:
        raise ValueError(
            f"train_fraction={train_fraction} of {x.shape[0]} tokens leaves {n_train} to train on "
            f"and {x.shape[0] - n_train} to validate; both need at least one"
        )
    if not x.isfinite().all():
        raise ValueError("states hold NaN or inf; leave those tokens out")

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(x.shape[0], generator=generator).to(x.device)
    train, validation = x[order[:n_train]], x[order[n_train:]]
    mean, std = train.mean((0, 1)), train.std((0, 1), correction=0)
    std = torch.where(std > 0, std, 1.0)
    train, validation = (train - mean) / std, (validation - mean) / std

    with torch.inference_mode(False), torch.enable_grad():
        parameters = _initial_parameters(probe, d_model, n_iterations, generator, train)
        data = train.clone()  # A tensor made in inference mode cannot be trained on.
        if probe == "linear":
            labels = torch.arange(n_iterations, device=data.device).repeat(len(data))
            weight, bias = parameters["out"], parameters["out_bias"]
            minimise_logistic_loss(weight, bias, data.flatten(0, 1), labels, ridge, n_steps)
        else:
            _fit_stochastic(
                parameters, data, generator, n_steps, batch_size, learning_rate, weight_decay
            )
    with torch.no_grad():
        train_accuracy = float(_one_hot_predictions(_logits(parameters, train)).diagonal().mean())
        logits = _logits(parameters, validation)
        confusion = _one_hot_predictions(logits)
        loss = float(_cross_entropy(logits))
    return StepDecodability(
        accuracy=confusion.diagonal().clone(),
        confusion=confusion,
        loss=loss,
        train_accuracy=train_accuracy,
        chance=1 / n_iterations,
        chance_loss=math.log(n_iterations),
        n_train=n_train,
        n_validation=len(validation),
    )


def _initial_parameters(
    probe: Probe, d_model: int, n_classes: int, generator: torch.Generator, like: Tensor
) -> dict[str, Tensor]:
    """Xavier-uniform matrices and zero biases, from the generator alone."""
    shapes = {"out": (n_classes, d_model)}
    if probe == "gated_mlp":
        width = 2 * d_model
        shapes |= {"gate": (width, d_model), "up": (width, d_model), "down": (d_model, width)}
    parameters = {}
    for name, shape in shapes.items():
        limit = math.sqrt(6 / sum(shape))
        weight = torch.rand(shape, generator=generator, dtype=torch.float32).to(like.dtype)
        weight = (2 * weight - 1) * limit
        parameters[name] = weight.to(like.device)
        parameters[f"{name}_bias"] = weight.new_zeros(shape[0]).to(like.device)
    if probe == "gated_mlp":
        parameters["norm"] = like.new_ones(d_model)
        parameters["norm_bias"] = like.new_zeros(d_model)
    return {name: value.requires_grad_() for name, value in parameters.items()}


def _logits(p: dict[str, Tensor], x: Tensor) -> Tensor:
    if "gate" in p:
        gate = F.silu(F.linear(x, p["gate"], p["gate_bias"]))
        hidden = gate * F.linear(x, p["up"], p["up_bias"])
        x = x + F.linear(hidden, p["down"], p["down_bias"])
        x = F.layer_norm(x, x.shape[-1:], p["norm"], p["norm_bias"])
    return F.linear(x, p["out"], p["out_bias"])


def _cross_entropy(logits: Tensor) -> Tensor:
    """Mean loss of `[token, iteration, class]`, where the iteration is the class."""
    labels = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _one_hot_predictions(logits: Tensor) -> Tensor:
    """Share of predictions `[iteration, class]`."""
    return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype).mean(0)


def _fit_stochastic(
    parameters: dict[str, Tensor],
    train: Tensor,
    generator: torch.Generator,
    n_steps: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
) -> None:
    """Train in place on random batches of tokens, each with all its iterations."""
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=learning_rate, weight_decay=weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(n_steps):
        batch = train
        if len(train) > batch_size:
            drawn = torch.randint(len(train), (batch_size,), generator=generator)
            batch = train[drawn.to(train.device)]
        optimizer.zero_grad()
        _cross_entropy(_logits(parameters, batch)).backward()
        optimizer.step()
        schedule.step()
