"""Answers over iterations `[iteration, ...]`: when they settle, and how often they are right."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_loops.metrics.precision import full_precision


@full_precision
def answer_flips(predictions: Int[Tensor, "iteration *batch"]) -> Int[Tensor, "*batch"]:
    """How often the answer changes from one iteration to the next.

    Args:
        predictions: `[iteration, ...]`, for example `predicted_tokens(logits)`.

    Returns:
        `[...]`, from 0 to iteration - 1.

    Raises:
        ValueError: no iteration.
    """
    require_iterations(predictions)
    return (predictions[1:] != predictions[:-1]).sum(0)


@full_precision
def saturation_iteration(predictions: Int[Tensor, "iteration *batch"]) -> Int[Tensor, "*batch"]:
    """First iteration from which on the answer is the final one (saturation, arXiv 2203.14680).

    Args:
        predictions: `[iteration, ...]`, for example `predicted_tokens(logits)`.

    Returns:
        `[...]`, 0-based; the last iteration where the answer changed in the last step.

    Raises:
        ValueError: no iteration.
    """
    require_iterations(predictions)
    return first_of_final_run(predictions == predictions[-1])


@full_precision
def overthinking(correct: Bool[Tensor, "iteration *batch"]) -> Float[Tensor, "iteration"]:
    """Fraction of examples that are right at iteration t, wrong at the last (arXiv 2511.08577).

    Args:
        correct: `[iteration, ...]`, for example `predicted_tokens(logits) == targets`.

    Returns:
        `[iteration]` in [0, 1]; 0 at the last iteration. NaN without examples.

    Raises:
        ValueError: no iteration.
    """
    require_iterations(correct)
    return (correct & ~correct[-1]).unsqueeze(-1).flatten(1).float().mean(1)


@full_precision
def oracle_iteration(correct: Bool[Tensor, "iteration *batch"]) -> Int[Tensor, "*batch"]:
    """Exit of an oracle: the first correct iteration, else the last one (arXiv 2607.20519).

    Args:
        correct: `[iteration, ...]`, for example `predicted_tokens(logits) == targets`.

    Returns:
        `[...]`, 0-based.

    Raises:
        ValueError: no iteration.
    """
    require_iterations(correct)
    first = correct.to(torch.uint8).argmax(0)
    return torch.where(correct.any(0), first, correct.shape[0] - 1)


@full_precision
def oracle_headroom(correct: Bool[Tensor, "iteration *batch"]) -> Float[Tensor, ""]:
    """What a perfect choice of the exit would add to the accuracy of the last iteration.

    Args:
        correct: `[iteration, ...]`, for example `predicted_tokens(logits) == targets`.

    Returns:
        Scalar in [0, 1], the fraction of examples that are right at some iteration and wrong at the
        last. NaN without examples.

    Raises:
        ValueError: no iteration.
    """
    require_iterations(correct)
    return (correct.any(0) & ~correct[-1]).float().mean()


def first_of_final_run(holds: Bool[Tensor, "iteration *batch"]) -> Int[Tensor, "*batch"]:
    """First iteration from which on a condition holds up to the end.

    Args:
        holds: `[iteration, ...]`; the last iteration counts as holding.

    Returns:
        `[...]`, 0-based.
    """
    run_length = holds[:-1].flip(0).to(torch.int64).cumprod(0).sum(0)
    return holds.shape[0] - 1 - run_length


def require_iterations(values: Tensor) -> None:
    """Raise for values without an iteration.

    Raises:
        ValueError: There is none.
    """
    if values.ndim == 0 or values.shape[0] == 0:
        raise ValueError(
            f"got shape {list(values.shape)}, expected [iteration, ...] with at least one iteration"
        )
