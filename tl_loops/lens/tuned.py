"""Tuned lens: an affine translator for each point, trained to give the model's own output."""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import trange

from tl_loops.arguments import checked
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout, with_iterations
from tl_loops.layout.selection import one_index
from tl_loops.lens.decode import LogitLens
from tl_loops.lens.fitted import check_sizes, check_width, model_sizes
from tl_loops.lens.points import LensPoint, PointSet, select_points
from tl_loops.lens.read import capture, vocabulary_size
from tl_loops.lens.training_state import TrainingState
from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.precision import full_precision
from tl_loops.metrics.readout import kl_divergence
from tl_loops.printing import prints_short
from tl_loops.runs.batches import token_prompts
from tl_loops.runs.identity import (
    check_identifiable,
    identity_of,
    prompts_fingerprint,
    tensors_fingerprint,
)
from tl_loops.runs.inputs import LensInputs, lens_inputs
from tl_loops.runs.storage import load_artefact, save_artefact
from tl_loops.upstream import left_as_it_was
from tl_loops.writing import in_use


@prints_short
@dataclass(frozen=True, eq=False)
class TunedLens:
    """A logit lens after an affine translator ``h + A h + b`` of its own at each point.

    Attributes:
        points: Hook names by coordinate, one a translator.
        weight: A of each point, [point, d_model, d_model], float32 (float64 for a float64 model).
        bias: b of each point, [point, d_model].
        losses: Mean KL(model || lens) of each training step in nats, [step, point].
        sizes: Sizes of the model that it was trained on.

    Source: 2303.08112, section 3 (one translator per layer; here one per layer and iteration).
    """

    points: tuple[str, ...]
    weight: Float[Tensor, "point d_model d_model"]
    bias: Float[Tensor, "point d_model"]
    losses: Float[Tensor, "step point"]
    sizes: dict[str, int]
    name: str = "tuned"

    @checked
    @full_precision
    def translate(
        self, resid: Float[Tensor, "*batch d_model"], index: int
    ) -> Float[Tensor, "*batch d_model"]:
        """The translated residual ``h + A h + b`` of point ``index``, in the residual's dtype."""
        index = one_index("point", index, len(self.points))
        check_width(resid, self.weight.shape[-1])
        return _translate(resid, self.weight[index], self.bias[index])

    def check(self, model: Model, points: Sequence[LensPoint]) -> None:
        """Raise on another model, and points without a translator.

        Raises:
            ValueError: The message names the size or the point.
        """
        check_sizes("tuned", self.sizes, model.cfg)
        for point in points:
            if point.alias not in self.points:
                raise ValueError(
                    f"this tuned lens has no translator for {point.alias}; it was trained at "
                    f"{', '.join(self.points)}"
                )

    def reads_sequence(self, point: LensPoint) -> bool:
        """No: translators act on each position alone."""
        return False

    def logits(
        self,
        model: Model,
        resid: Float[Tensor, "batch read d_model"],
        point: LensPoint,
        inputs: LensInputs,
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Logits of the translated residual."""
        translated = self.translate(resid, self.points.index(point.alias))
        return LogitLens().logits(model, translated, point, inputs)

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        tensors = {"weight": self.weight, "bias": self.bias, "losses": self.losses}
        save_artefact(path, "tuned_lens", tensors, {"points": self.points, "sizes": self.sizes})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "TunedLens":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged or holds no tuned lens.
        """
        names = ("weight", "bias", "losses")
        tensors, metadata = load_artefact(path, "tuned_lens", names)
        weight, bias, losses = (tensors[name].to(device) for name in names)
        return cls(tuple(metadata["points"]), weight, bias, losses, metadata["sizes"])


@checked
@left_as_it_was
def train_tuned_lens(
    model: Model,
    prompts: Iterable[str | Tensor],
    *,
    points: PointSet | str | Sequence[str] = "core",
    n_steps: int = 200,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    generator: torch.Generator | None = None,
    n_iterations: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 20,
) -> TunedLens:
    """Train one translator per point to minimise KL(model's output || lens) at every position.

    Translators start at the identity, which is the logit lens. Adam with a learning rate that
    falls linearly to 0. The model's weights and their gradients are left alone.

    Args:
        model: A looped model.
        prompts: A list of strings or of 1-D token tensors, each at its own length.
        points: As for :func:`tl_loops.lens.read_lens`.
        n_steps: Number of training steps.
        batch_size: Prompts drawn for each step.
        learning_rate: At the first step.
        generator: Source of the draws; ``None``: one with seed 0.
        n_iterations: Number of iterations of the model, whose last gives the target.
        progress: Whether to show a progress bar.
        checkpoint: A file with the state of the training (three times the size of the lens). The
            same call, with a generator in the same state, goes on from it to the same bits.
        checkpoint_every: After how many steps it is written.

    Returns:
        The lens, with the loss of each step.

    Raises:
        ValueError: No prompt, one that does not fit, no point, or a number that is not positive.
        TypeError: ``prompts`` is no list of strings or tensors.
        HookNameError: A point that the model does not have.
        FloatingPointError: The loss is not finite.
        CheckpointError: The checkpoint is damaged or of another run, or the run cannot be resumed.
        FileInUseError: Another process or thread trains with the same checkpoint.

    Source: 2303.08112, section 3.
    """
    require_layout(model)
    for name, value in (
        ("n_steps", n_steps),
        ("batch_size", batch_size),
        ("learning_rate", learning_rate),
        ("checkpoint_every", checkpoint_every),
    ):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    tokens = token_prompts(model, prompts)
    if checkpoint is not None:
        check_identifiable(model)
    held = nullcontext() if checkpoint is None else in_use(checkpoint)
    training = torch.inference_mode(False), torch.enable_grad()
    with held, with_iterations(model, n_iterations), training[0], training[1]:
        chosen = select_points(model, points)
        d_model, device = model.cfg.d_model, model.embed.W_E.device
        kind = {"dtype": statistic_dtype(model.embed.W_E), "device": device}
        weights = [torch.zeros(d_model, d_model, **kind) for _ in chosen]
        biases = [torch.zeros(d_model, **kind) for _ in chosen]
        state = TrainingState(
            [tensor.requires_grad_() for tensor in (*weights, *biases)],
            learning_rate,
            torch.zeros(n_steps, len(chosen)),
            generator,
        )
        if checkpoint is not None:
            identity = identity_of(
                model,
                prompts=prompts_fingerprint(tokens),
                points=[point.alias for point in chosen],
                n_steps=n_steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                generator=tensors_fingerprint([generator.get_state()]),
            )
            state.go_on(checkpoint, identity)
        for step in trange(
            state.n_done, n_steps, initial=state.n_done, total=n_steps, desc="tuned lens",
            disable=not progress,
        ):  # fmt: skip
            drawn = torch.randint(len(tokens), (batch_size,), generator=generator).tolist()
            state.optimizer.zero_grad()
            batch = [tokens[index] for index in drawn]
            losses = _accumulate(model, chosen, batch, weights, biases)
            if not bool(losses.isfinite().all()):
                raise FloatingPointError(
                    f"the loss at step {step} is not finite; try a smaller learning_rate than "
                    f"{learning_rate}"
                )
            state.step(losses)
            if checkpoint is not None and (
                step + 1 == n_steps or not (step + 1) % checkpoint_every
            ):
                state.save(checkpoint, identity)
        return TunedLens(
            tuple(point.alias for point in chosen),
            torch.stack(weights).detach(),
            torch.stack(biases).detach(),
            state.losses,
            model_sizes(model.cfg),
        )


def _translate(resid: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    h = resid.to(weight.dtype)
    return (h + h @ weight.T + bias).to(resid.dtype)


def _accumulate(
    model: Model,
    points: tuple[LensPoint, ...],
    batch: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
) -> Tensor:
    """Add the gradients of one step to the translators; the loss of each point.

    One point at a time is differentiated, so that only one readout's graph exists.
    """
    by_length = defaultdict(list)
    for prompt in batch:
        by_length[prompt.shape[0]].append(prompt)
    n_positions = sum(prompt.shape[0] for prompt in batch)
    size = vocabulary_size(model)
    losses = torch.zeros(len(points))
    for same_length in by_length.values():
        stacked = torch.stack(same_length)
        # Prompts have their own length here, so that nothing is padding.
        inputs = lens_inputs(model, stacked, "all", torch.ones_like(stacked))
        with torch.no_grad():
            residuals, final = capture(model, inputs, points, lambda point: False)
        for index, point in enumerate(points):
            translated = _translate(residuals.pop(point.name), weights[index], biases[index])
            logits = LogitLens().logits(model, translated, point, inputs)
            loss = kl_divergence(final, logits, size).sum() / n_positions
            # Not backward(): that would also fill the gradients of the model's weights.
            pair = (weights[index], biases[index])
            for tensor, gradient in zip(pair, torch.autograd.grad(loss, pair), strict=True):
                tensor.grad = gradient if tensor.grad is None else tensor.grad + gradient
            losses[index] += loss.detach().cpu()
    return losses
