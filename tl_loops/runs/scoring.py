"""What a patching tool checks before any forward pass, and how a metric scores a cell."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_loops.layout.model import Model
from tl_loops.runs.batches import check_batch_size
from tl_loops.runs.cells import Score
from tl_loops.runs.identity import identity_of, tensors_fingerprint
from tl_loops.runs.in_batches import PLAIN, Split
from tl_loops.runs.inputs import RunInputs, run_inputs
from tl_loops.runs.rerun import BaseRun

Metric = Callable[[Tensor], Any]


def start_run(
    model: Model,
    input: Any,
    metric: Metric,
    batch_size: int | None,
    arguments: Mapping[str, Any],
    gradients: bool = False,
    split: Split = PLAIN,
) -> BaseRun:
    """The run that a tool's cells start from, not executed, after the checks that all tools share.

    Args:
        model: A looped model or a plain HookedTransformer.
        input: Text, or tokens [batch, pos] or [pos].
        metric: Maps the logits [batch, pos, d_vocab] of one cell to a scalar.
        batch_size: Cells in one forward pass; ``None``: chosen.
        arguments: Forward arguments of every run, some of
            :data:`tl_loops.runs.inputs.FORWARD_ARGUMENTS`.
        gradients: Whether the scores carry gradients where they are enabled.
        split: Which cells are run here, and where they are kept.

    Raises:
        ValueError: One of these does not fit.
        CheckpointError: The run can be neither resumed nor cut into shards.
    """
    split.check(model, gradients=gradients)
    inputs = run_inputs(model, input, arguments)
    check_batch_size(batch_size, or_none=True)
    check_metric(metric, model, logits_shape(model, inputs.tokens))
    return BaseRun(model, inputs, gradients=gradients)


def logits_score(metric: Metric) -> Score:
    """Scores a cell by a metric on its logits."""
    return lambda output: metric(output.logits)


def logits_shape(model: Model, tokens: Tensor) -> tuple[int, int, int]:
    """Shape of the logits of a prompt."""
    cfg = model.cfg
    vocabulary = cfg.d_vocab_out if cfg.d_vocab_out > 0 else cfg.d_vocab
    return (tokens.shape[0], tokens.shape[1], vocabulary)


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
    value = _on_random_numbers(metric, model, shape)
    if isinstance(value, (Tensor, np.ndarray)):
        one = value.size == 1 if isinstance(value, np.ndarray) else value.numel() == 1
        if one and "complex" not in str(value.dtype):
            return
        found = f"an array of {value.dtype} of shape {tuple(value.shape)}"
    elif isinstance(value, (int, float, np.number)) and not isinstance(value, np.complexfloating):
        return
    else:
        found = type(value).__name__
    raise ValueError(
        f"metric must map the {what} of one cell, {list(shape)}, to a scalar, but it returns "
        f"{found}: reduce over batch and positions, for example with .mean()"
    )


def identify_cells(
    run: BaseRun,
    metric: Callable[[Tensor], Any],
    shape: tuple[int, ...],
    put_in: Mapping[str, Tensor],
    **options: Any,
) -> dict[str, Any]:
    """What decides the scores of cells: model, prompts, metric, and what is put in where.

    A metric is known by its value on fixed random numbers.

    Args:
        run: The base run.
        metric: What scores a cell.
        shape: Of what the metric is given.
        put_in: What the cells put in, by hook name.
        **options: What else the tool was told, in JSON's types.
    """
    return identify_runs(run.model, run.inputs, metric, shape, put_in, **options)


def identify_runs(
    model: Model,
    inputs: RunInputs,
    metric: Callable[[Tensor], Any],
    shape: tuple[int, ...],
    put_in: Mapping[str, Tensor],
    **options: Any,
) -> dict[str, Any]:
    """The same for runs that have no base run.

    Args:
        model: What is run.
        inputs: The prompts.
        metric: As in :func:`identify_cells`.
        shape: As in :func:`identify_cells`.
        put_in: As in :func:`identify_cells`.
        **options: As in :func:`identify_cells`.
    """
    return identity_of(
        model,
        prompts=tensors_fingerprint([inputs.tokens, inputs.attention_mask, inputs.initial_state]),
        exits={name: str(value) for name, value in inputs.exits.items()},
        metric=float(_on_random_numbers(metric, model, shape)).hex(),
        put_in=tensors_fingerprint(put_in),
        options=options,
    )


def _on_random_numbers(
    metric: Callable[[Tensor], Any], model: Model, shape: tuple[int, ...]
) -> Any:
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return metric(draw.to(next(model.parameters())))
