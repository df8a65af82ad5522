"""The loss of held-out contexts by number of iterations."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from tl_loops.arguments import check_at_least, checked
from tl_loops.layout.model import Model
from tl_loops.training.corpus import check_corpus, cut_contexts
from tl_loops.training.losses import token_losses
from tl_loops.upstream import left_as_it_was


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
    contexts = cut_contexts(corpus.cpu(), n_context, n_contexts, first_token)
    device = next(model.parameters()).device
    mode, seed = model.training, getattr(model.cfg, "state_seed", 0)
    model.eval()
    if seed is None:
        model.cfg.state_seed = 0
    try:
        losses = {}
        for n in n_iterations:
            sums = [
                token_losses(model(part, n_iterations=n), part).double().sum()
                for part in contexts.to(device).split(batch_size)
            ]
            losses[n] = float(torch.stack(sums).sum()) / contexts[:, 1:].numel()
        return losses
    finally:
        model.train(mode)
        if seed is None:
            model.cfg.state_seed = None
