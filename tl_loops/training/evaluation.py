"""The loss and the accuracy of held-out batches by number of iterations."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from tl_loops.arguments import check_at_least, checked
from tl_loops.layout.model import Model
from tl_loops.training.corpus import check_corpus, cut_contexts
from tl_loops.training.data import UNTRAINED, TrainingBatch
from tl_loops.training.losses import right_answers, target_losses
from tl_loops.upstream import left_as_it_was


@dataclass(frozen=True)
class Evaluation:
    """What held-out batches give at one number of iterations.

    Attributes:
        loss: Mean in nats over the positions with a target there; NaN if there is none.
        accuracy: Share of them where the likeliest token is the target, from 0 to 1.
    """

    loss: float
    accuracy: float


@checked
@left_as_it_was
@torch.no_grad()
def evaluate(
    model: Model,
    corpus: Int[Tensor, "token"],
    n_context: int,
    n_iterations: Sequence[int] = (1, 2, 4, 8),
    n_contexts: int = 32,
    batch_size: int = 16,
    first_token: int | None = None,
) -> dict[int, float]:
    """Mean loss in nats per token for each number of iterations, each by a run of its own.

    The model is in eval mode meanwhile. With ``cfg.state_seed=None`` the initial states are drawn
    as for seed 0, so that two evaluations see the same.

    Args:
        model: A looped model.
        corpus: Token ids in one line, at least one context.
        n_context: Tokens per context.
        n_iterations: The numbers.
        n_contexts: Contexts at most, spread evenly over the corpus.
        batch_size: Contexts in one pass.
        first_token: What every context begins with; ``None``: with the text.

    Raises:
        ValueError: The corpus is shorter than one context or holds no tokens of the model, or a
            count is below 1.
    """
    check_at_least(1, batch_size=batch_size, n_contexts=n_contexts)
    check_corpus(corpus, n_context, model.cfg.d_vocab)
    batches = held_out_contexts(corpus, n_context, n_contexts, batch_size, first_token)
    return {n: of.loss for n, of in evaluate_batches(model, batches, n_iterations).items()}


@checked
@left_as_it_was
@torch.no_grad()
def evaluate_batches(
    model: Model, batches: Sequence[TrainingBatch], n_iterations: Sequence[int] = (1, 2, 4, 8)
) -> dict[int, Evaluation]:
    """Loss and accuracy of batches for each number of iterations, each by a run of its own.

    What is read after n iterations is compared with the targets after iteration n - 1. Otherwise
    as :func:`evaluate`.

    Args:
        model: A looped model.
        batches: Their own numbers of iterations are not used.
        n_iterations: The numbers.

    Raises:
        IndexError: A token or target that the model does not have.
        ValueError: There is no batch.
    """
    if not batches:
        raise ValueError("batches is empty: give at least one TrainingBatch")
    device = next(model.parameters()).device
    found = {}
    with as_evaluated(model):
        for n in n_iterations:
            sums, n_right, n_all = [], 0, 0
            for batch in batches:
                tokens, targets = batch.tokens.to(device), batch.after(n - 1).to(device)
                logits = model(tokens, n_iterations=n)
                sums.append(target_losses(logits, targets).double().sum())
                n_right += int(right_answers(logits, targets).sum())
                n_all += int((targets != UNTRAINED).sum())
            total = float(torch.stack(sums).sum())
            found[n] = Evaluation(total / n_all, n_right / n_all) if n_all else _NOTHING
    return found


_NOTHING = Evaluation(float("nan"), float("nan"))


@contextmanager
def as_evaluated(model: Model) -> Iterator[None]:
    """The model in eval mode, with initial states that are drawn as for one seed, for a while."""
    mode, seed = model.training, getattr(model.cfg, "state_seed", 0)
    model.eval()
    if seed is None:
        model.cfg.state_seed = 0
    try:
        yield
    finally:
        model.train(mode)
        if seed is None:
            model.cfg.state_seed = None


def held_out_contexts(
    corpus: Int[Tensor, "token"],
    n_context: int,
    n_contexts: int,
    batch_size: int = 16,
    first_token: int | None = None,
) -> list[TrainingBatch]:
    """Contexts spread evenly over a corpus, in batches."""
    contexts = cut_contexts(corpus.cpu(), n_context, n_contexts, first_token)
    return [TrainingBatch.next_tokens(part) for part in contexts.split(batch_size)]
