"""What a model is trained on: batches of tokens with targets, and the data that give them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_loops.arguments import check_at_least, checked, checked_fields
from tl_loops.layout.model import Model

UNTRAINED = -100
"""The target of a position that is not trained; no other negative number is a target."""


@checked_fields
@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """Tokens, and what is to be read from each position.

    Attributes:
        tokens: [batch, pos], without padding on the left.
        targets: The token that a position is to predict, ``UNTRAINED`` where none is trained.
            [batch, pos]: the same after every iteration. [iteration, batch, pos]: row t is the
            target after iteration t, counted from 0 and with the iterations without gradient; past
            the end the last row holds.
        n_iterations: How many iterations this batch runs; ``None``: as the settings draw it.
        n_gradient: Gradients flow through this many of them; ``None``: as the settings say.

    Raises:
        ValueError: The shapes do not go together, nothing is trained, or a number is below 1.
    """

    tokens: Int[Tensor, "batch pos"]
    targets: Int[Tensor, "*iteration batch pos"]
    n_iterations: int | None = None
    n_gradient: int | None = None

    def __post_init__(self) -> None:
        targets = self.targets
        if targets.ndim not in (2, 3):
            raise ValueError(
                "targets must be [batch, pos] or [iteration, batch, pos], got "
                f"{list(targets.shape)}"
            )
        if not bool((targets != UNTRAINED).any()):
            raise ValueError(
                "no position is trained: at least one target must differ from "
                f"UNTRAINED ({UNTRAINED})"
            )
        check_at_least(1, n_iterations=self.n_iterations, n_gradient=self.n_gradient)

    @classmethod
    @checked
    def next_tokens(cls, tokens: Int[Tensor, "batch pos"]) -> "TrainingBatch":
        """Every position predicts the token after it; the last one is not trained.

        Raises:
            ValueError: There is no second position.
        """
        last = torch.full_like(tokens[:, :1], UNTRAINED)
        return cls(tokens, torch.cat([tokens[:, 1:], last], dim=1))

    @checked
    def after(self, t: int) -> Int[Tensor, "batch pos"]:
        """The targets after iteration t, counted from 0.

        Raises:
            ValueError: ``t`` is below 0.
        """
        check_at_least(0, t=t)
        if self.targets.ndim == 2:
            return self.targets
        return self.targets[min(t, self.targets.shape[0] - 1)]

    def to(self, device: torch.device) -> "TrainingBatch":
        """The batch on a device."""
        return TrainingBatch(
            self.tokens.to(device), self.targets.to(device), self.n_iterations, self.n_gradient
        )


@runtime_checkable
class TrainingData(Protocol):
    """What batches are drawn from."""

    def draw(self, n: int, generator: torch.Generator) -> TrainingBatch:
        """A batch of about ``n`` rows, whose random numbers all come from ``generator``."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """What decides the draws, in JSON's types; two data that draw alike say the same."""
        ...


@runtime_checkable
class AdaptiveData(TrainingData, Protocol):
    """Data that change with success, such as a curriculum; a checkpoint holds their state."""

    def after_step(self, batch: TrainingBatch, right: Bool[Tensor, "batch pos"]) -> None:
        """Hear how the step of the last batch went.

        Args:
            batch: What was drawn.
            right: Where the likeliest token after the last iteration is the target; false where
                nothing is trained.
        """
        ...

    def state(self) -> Mapping[str, Any]:
        """What changes, in JSON's types; ``identity`` says the rest."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a state that :meth:`state` gave, or raise ValueError and stay."""
        ...


def draw_batch(
    data: TrainingData, n: int, generator: torch.Generator, model: Model
) -> TrainingBatch:
    """A draw that the model can be trained on.

    Raises:
        TypeError: The data gave something other than a batch.
        ValueError: It is longer than the model's context, or holds what is no token.
    """
    batch = data.draw(n, generator)
    if not isinstance(batch, TrainingBatch):
        raise TypeError(
            f"{type(data).__name__}.draw must give a TrainingBatch, got {type(batch).__name__}"
        )
    n_ctx, d_vocab = model.cfg.n_ctx, model.cfg.d_vocab
    if batch.tokens.shape[1] > n_ctx:
        raise ValueError(
            f"{type(data).__name__} drew {batch.tokens.shape[1]} positions, above the model's "
            f"cfg.n_ctx={n_ctx}"
        )
    for name, ids in (("tokens", batch.tokens), ("targets", batch.targets)):
        outside = (ids < 0) | (ids >= d_vocab)
        if name == "targets":
            outside &= ids != UNTRAINED
        if bool(outside.any()):
            also = f", and UNTRAINED ({UNTRAINED}) for no target" if name == "targets" else ""
            raise ValueError(
                f"{type(data).__name__} drew {name} with {int(ids[outside][0])}, but the model's "
                f"vocabulary has ids from 0 to {d_vocab - 1}{also}"
            )
    return batch


def check_repeatable(data: TrainingData, n: int) -> None:
    """Raise where a run that goes on from a checkpoint would draw other batches.

    Raises:
        ValueError: Two draws with equal generators differ, or the data change with success but
            cannot say how far they are.
    """
    name = type(data).__name__
    if hasattr(data, "after_step") and not isinstance(data, AdaptiveData):
        raise ValueError(
            f"{name} changes with success (after_step) but has no state() and load_state(state), "
            "so that a checkpoint cannot hold how far it is: add both, or leave checkpoint out"
        )
    first, second = (data.draw(n, torch.Generator().manual_seed(0)) for _ in range(2))
    if not _equal(first, second):
        raise ValueError(
            f"{name}.draw gave two batches for generators in one state, so that a run could not go "
            "on as it was: take every random number from the generator, or leave checkpoint out"
        )


def _equal(a: TrainingBatch, b: TrainingBatch) -> bool:
    same = (a.n_iterations, a.n_gradient) == (b.n_iterations, b.n_gradient)
    return same and torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
