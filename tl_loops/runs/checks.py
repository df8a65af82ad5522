"""Prompts as tokens, and checks of batch sizes and metrics, before any forward pass."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_loops.layout.model import Model
from tl_loops.upstream import model_input


def logits_shape(model: Model, tokens: Tensor) -> tuple[int, int, int]:
    """Shape of the logits of a prompt."""
    cfg = model.cfg
    vocabulary = cfg.d_vocab_out if cfg.d_vocab_out > 0 else cfg.d_vocab
    return (tokens.shape[0], tokens.shape[1], vocabulary)


def as_tokens(model: Model, tokens: Any) -> Int[Tensor, "batch pos"]:
    """Tokens with a batch axis, from text, one prompt or several.

    Raises:
        ValueError: As :func:`tl_loops.upstream.inputs.model_input`.
    """
    return model_input(model, tokens).tokens


def check_batch_size(batch_size: int | None) -> None:
    """Refuse a batch size that is not a positive integer or None.

    Raises:
        ValueError: It is not.
    """
    if batch_size is None:
        return
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            f"batch_size (cells in one forward pass) must be at least 1 or None, got {batch_size!r}"
        )


def check_metric(
    metric: Callable[[Tensor], Any], model: Model, shape: tuple[int, ...], what: str = "logits"
) -> None:
    """Call a metric once on random numbers, so that a wrong one fails before any forward pass.

    Args:
        metric: Maps [batch, pos, d_vocab] (or another shape) to a scalar.
        model: Gives device and dtype.
        shape: Of the metric's input.
        what: What the input is called in the message.

    Raises:
        ValueError: The metric is not callable or does not return a scalar.
    """
    if not callable(metric):
        raise ValueError(f"metric must be a function of the {what}, got {type(metric).__name__}")
    like = next(model.parameters())
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        value = metric(draw.to(like))
    if isinstance(value, (Tensor, np.ndarray)):
        if value.size == 1 if isinstance(value, np.ndarray) else value.numel() == 1:
            return
        found = f"an array of shape {tuple(value.shape)}"
    elif isinstance(value, (int, float, np.number)):
        return
    else:
        found = type(value).__name__
    raise ValueError(
        f"metric must map the {what} of one cell, {list(shape)}, to a scalar, but it returns "
        f"{found}: reduce over batch and positions, for example with .mean()"
    )
