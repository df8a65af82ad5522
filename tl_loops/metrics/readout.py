"""What a readout says at each iteration: ranks, probabilities, and how the answer changes.

Inputs are logits of any lens (logit lens, coda lens, the exit that a model was trained with).
Padding of the vocabulary is excluded with `vocab_size`: ids from there on are neither ranked nor
given probability.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.metrics.answers import require_iterations
from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.precision import full_precision

Divergence = Literal["kl", "jsd"]


@full_precision
def token_rank(
    logits: Float[Tensor, "*batch d_vocab"],
    tokens: Int[Tensor, "*#batch"] | int,
    vocab_size: int | None = None,
) -> Int[Tensor, "*batch"]:
    """Rank of a token: 1 + the number of ids with a larger logit.

    The count rule is deterministic: tied tokens share the best rank, and uniform logits give rank
    1. Average log ranks or reciprocal ranks rather than ranks, whose tails are heavy (arXiv
    2507.02199).

    Args:
        logits: `[..., d_vocab]`.
        tokens: ids, one or a tensor that broadcasts over the leading axes of `logits`.
        vocab_size: ids from here on are padding; None counts all columns.

    Returns:
        `[...]`, from 1 (top) to the vocabulary size.

    Raises:
        ValueError: NaN or inf logits, a bad `vocab_size`, or an id outside of the vocabulary.
    """
    logits = _real_vocabulary(logits, vocab_size)
    return 1 + (logits > _logit_of(logits, tokens)).sum(-1)


@full_precision
def token_probability(
    logits: Float[Tensor, "*batch d_vocab"],
    tokens: Int[Tensor, "*#batch"] | int,
    vocab_size: int | None = None,
) -> Float[Tensor, "*batch"]:
    """Softmax probability of a token.

    Args:
        logits: `[..., d_vocab]`.
        tokens: ids, one or a tensor that broadcasts over the leading axes of `logits`.
        vocab_size: ids from here on are padding and get no probability; None counts all columns.

    Returns:
        `[...]` in [0, 1], float32 (float64 for float64 logits).

    Raises:
        ValueError: NaN or inf logits, a bad `vocab_size`, or an id outside of the vocabulary.
    """
    logits = _real_vocabulary(logits, vocab_size).to(statistic_dtype(logits))
    return (_logit_of(logits, tokens).squeeze(-1) - logits.logsumexp(-1)).exp()


@full_precision
def token_margin(
    logits: Float[Tensor, "*batch d_vocab"],
    tokens: Int[Tensor, "*#batch"] | int | None = None,
    vocab_size: int | None = None,
) -> Float[Tensor, "*batch"]:
    """Logit of a token minus the largest logit of any other token, in nats of log odds.

    Positive exactly where the token is the only top one; a constant added to all logits does not
    matter.

    Args:
        logits: `[..., d_vocab]`, at least two ids.
        tokens: ids, one or a tensor that broadcasts over the leading axes of `logits`; None takes
            the predicted token, so that the margin is top-1 minus top-2 and never negative.
        vocab_size: ids from here on are padding; None counts all columns.

    Returns:
        `[...]`, float32 (float64 for float64 logits).

    Raises:
        ValueError: NaN or inf logits, a bad `vocab_size`, fewer than two ids, or an id outside of
            the vocabulary.
    """
    logits = _real_vocabulary(logits, vocab_size).to(statistic_dtype(logits))
    if logits.shape[-1] < 2:
        raise ValueError("a margin needs at least two ids, got a vocabulary of one")
    if tokens is None:
        top = logits.topk(2, -1).values
        return top[..., 0] - top[..., 1]
    index = _token_index(logits, tokens)
    others = logits.scatter(-1, index, float("-inf")).amax(-1)
    return logits.gather(-1, index).squeeze(-1) - others


@full_precision
def output_entropy(
    logits: Float[Tensor, "*batch d_vocab"], vocab_size: int | None = None
) -> Float[Tensor, "*batch"]:
    """Shannon entropy of the next-token distribution in nats, 0 log 0 = 0.

    Args:
        logits: `[..., d_vocab]`.
        vocab_size: ids from here on are padding; None counts all columns.

    Returns:
        `[...]` in [0, log vocab_size], float32 (float64 for float64 logits).

    Raises:
        ValueError: NaN or inf logits or a bad `vocab_size`.
    """
    log_p = _log_probabilities(logits, vocab_size)
    return -_expectation(log_p, log_p)


@full_precision
def kl_divergence(
    p_logits: Float[Tensor, "*batch d_vocab"],
    q_logits: Float[Tensor, "*batch d_vocab"],
    vocab_size: int | None = None,
) -> Float[Tensor, "*batch"]:
    """KL(p || q) = sum_v p_v (log p_v - log q_v) in nats between two next-token distributions.

    Args:
        p_logits: `[..., d_vocab]`, logits of the distribution that weights the sum.
        q_logits: `[..., d_vocab]`.
        vocab_size: ids from here on are padding; None counts all columns.

    Returns:
        `[...]` >= 0; infinite where p has mass and q has none.

    Raises:
        ValueError: NaN or inf logits or a bad `vocab_size`.
    """
    return _kl(_log_probabilities(p_logits, vocab_size), _log_probabilities(q_logits, vocab_size))


@full_precision
def js_divergence(
    p_logits: Float[Tensor, "*batch d_vocab"],
    q_logits: Float[Tensor, "*batch d_vocab"],
    vocab_size: int | None = None,
) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence in nats: mean of KL(p || m) and KL(q || m) with m = (p + q) / 2.

    Args:
        p_logits: `[..., d_vocab]`.
        q_logits: `[..., d_vocab]`.
        vocab_size: ids from here on are padding; None counts all columns.

    Returns:
        `[...]` in [0, log 2], symmetric in its arguments.

    Raises:
        ValueError: NaN or inf logits or a bad `vocab_size`.
    """
    return _jsd(_log_probabilities(p_logits, vocab_size), _log_probabilities(q_logits, vocab_size))


@full_precision
def divergence_from_last(
    logits: Float[Tensor, "iteration *batch d_vocab"],
    divergence: Divergence = "kl",
    vocab_size: int | None = None,
) -> Float[Tensor, "iteration *batch"]:
    """How far the readout of each iteration is from the last one: KL(last || t), or JSD.

    One iteration at a time is turned into probabilities, so that memory beyond `logits` does not
    grow with their number.

    Args:
        logits: `[iteration, ..., d_vocab]`.
        divergence: "kl" for KL(last || t), "jsd" for the Jensen-Shannon divergence; nats.
        vocab_size: ids from here on are padding; None counts all columns.

    Returns:
        `[iteration, ...]`; 0 at the last iteration by construction.

    Raises:
        ValueError: no iteration, NaN logits, a bad `vocab_size` or an unknown divergence.
    """
    require_iterations(logits)
    measure = _divergence(divergence)
    last = _log_probabilities(logits[-1], vocab_size)
    return torch.stack([measure(last, _log_probabilities(step, vocab_size)) for step in logits])


@full_precision
def successive_divergence(
    logits: Float[Tensor, "iteration *batch d_vocab"],
    divergence: Divergence = "kl",
    vocab_size: int | None = None,
) -> Float[Tensor, "step *batch"]:
    """How far the readout moves in each step: KL(t-1 || t), Huginn's direction, or JSD.

    Args:
        logits: `[iteration, ..., d_vocab]`.
        divergence: "kl" for KL(previous || current), "jsd" for the Jensen-Shannon divergence; nats.
        vocab_size: ids from here on are padding; None counts all columns.

    Returns:
        `[iteration - 1, ...]`; entry t is the step from iteration t to t + 1. One iteration gives
        no entry.

    Raises:
        ValueError: no iteration, NaN logits, a bad `vocab_size` or an unknown divergence.
    """
    require_iterations(logits)
    measure = _divergence(divergence)
    steps = []
    previous = _log_probabilities(logits[0], vocab_size)
    for step in logits[1:]:
        current = _log_probabilities(step, vocab_size)
        steps.append(measure(previous, current))
        previous = current
    return torch.stack(steps) if steps else previous.new_empty(0, *previous.shape[:-1])


@full_precision
def predicted_tokens(
    logits: Float[Tensor, "*batch d_vocab"], vocab_size: int | None = None
) -> Int[Tensor, "*batch"]:
    """The top-1 id; of tied ids the lowest.

    Args:
        logits: `[..., d_vocab]`.
        vocab_size: ids from here on are padding and never predicted; None counts all columns.

    Returns:
        `[...]`.

    Raises:
        ValueError: NaN or inf logits or a bad `vocab_size`.
    """
    return _real_vocabulary(logits, vocab_size).argmax(-1)


def _real_vocabulary(logits: Tensor, vocab_size: int | None) -> Tensor:
    d_vocab = logits.shape[-1]
    statistic_dtype(logits)  # Raises for logits that are no real numbers.
    if not d_vocab:
        raise ValueError(f"logits have shape {list(logits.shape)}, expected at least one token id")
    if vocab_size is not None:
        if not 1 <= vocab_size <= d_vocab:
            raise ValueError(
                f"vocab_size={vocab_size}, expected 1 to d_vocab={d_vocab}, the last axis of logits"
            )
        logits = logits[..., :vocab_size]
    # A comparison with NaN is False, which would make every token the top one. -inf is an id that
    # is masked out.
    if logits.isnan().any() or logits.isposinf().any():
        raise ValueError("logits contain NaN or inf; mask or drop these positions first")
    return logits


def _token_index(logits: Tensor, tokens: Tensor | int) -> Tensor:
    if isinstance(tokens, int) and not 0 <= tokens < logits.shape[-1]:
        raise ValueError(f"token {tokens}, expected ids in 0 to {logits.shape[-1] - 1}")
    index = torch.as_tensor(tokens, device=logits.device).long()
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < logits.shape[-1]:
        raise ValueError(
            f"tokens span {int(index.min())} to {int(index.max())}, expected ids in "
            f"0 to {logits.shape[-1] - 1}"
        )
    try:
        return index.expand(logits.shape[:-1]).unsqueeze(-1)
    except RuntimeError:
        raise ValueError(
            f"tokens have shape {list(index.shape)}, expected one that broadcasts to the leading "
            f"axes of logits, {list(logits.shape[:-1])}"
        ) from None


def _logit_of(logits: Tensor, tokens: Tensor | int) -> Tensor:
    return logits.gather(-1, _token_index(logits, tokens))


def _log_probabilities(logits: Tensor, vocab_size: int | None) -> Tensor:
    return _real_vocabulary(logits, vocab_size).to(statistic_dtype(logits)).log_softmax(-1)


def _expectation(log_p: Tensor, values: Tensor) -> Tensor:
    # An id without mass adds nothing, also where its value is infinite (0 log 0 = 0).
    return torch.where(log_p == float("-inf"), 0, log_p.exp() * values).sum(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    # Rounding leaves values like -1e-9 where the distributions nearly agree.
    return _expectation(log_p, log_p - log_q).clamp(min=0)


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p, log_q) - torch.log(log_p.new_tensor(2.0))
    return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2


def _divergence(name: str):
    measures = {"kl": _kl, "jsd": _jsd}
    if name not in measures:
        raise ValueError(f"divergence={name!r}, expected one of {sorted(measures)}")
    return measures[name]
