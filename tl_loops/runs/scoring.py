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
from tl_loops.runs.inputs import Positions, RunInputs, resolve_positions, run_inputs
from tl_loops.runs.read_positions import ReadPositions
from tl_loops.runs.rerun import BaseRun
from tl_loops.upstream import TextOrTokens

Metric = Callable[[Tensor], Any]


def start_run(
    model: Model,
    input: TextOrTokens,
    metric: Metric,
    batch_size: int | None,
    arguments: Mapping[str, Any],
    gradients: bool = False,
    split: Split = PLAIN,
    logits_at: Positions = "all",
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
        logits_at: Where the metric reads logits, as for :func:`read_at`.

    Raises:
        ValueError: One of these does not fit.
        CheckpointError: The run can be neither resumed nor cut into shards.
    """
    split.check(model, gradients=gradients)
    inputs = run_inputs(model, input, arguments)
    check_batch_size(batch_size, or_none=True)
    where = read_at(logits_at, inputs)
    check_metric(metric, model, logits_shape(model, inputs.tokens, where))
    return BaseRun(model, inputs, gradients=gradients, logits_at=where)


def read_at(logits_at: Positions, inputs: RunInputs) -> ReadPositions:
    """Where a metric reads logits.

    Args:
        logits_at: ``"all"``; ``"last"``: the last real token of each prompt; one position or
            several (negative ones count from the end of the row); or [batch, read].
        inputs: The prompts.

    Raises:
        ValueError: A shape or a position does not fit.
    """
    if isinstance(logits_at, str) and logits_at == "all":
        return ReadPositions()
    where = resolve_positions(logits_at, inputs.tokens, inputs.mask)
    return ReadPositions(where, inputs.exits)


def logits_score(metric: Metric) -> Score:
    """Scores a cell by a metric on its logits."""
    return lambda output: metric(output.logits)


def logits_shape(
    model: Model, tokens: Tensor, where: ReadPositions | None = None
) -> tuple[int, int, int]:
    """Shape of the logits of a prompt at the positions that are read."""
    cfg = model.cfg
    vocabulary = cfg.d_vocab_out if cfg.d_vocab_out > 0 else cfg.d_vocab
    n_pos = tokens.shape[1]
    return (tokens.shape[0], n_pos if where is None else where.n_read(n_pos), vocabulary)


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
    put_in: Mapping[str, Tensor],
    shape: tuple[int, ...] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What decides the scores of cells: model, prompts, metric, and what is put in where.

    A metric is known by its value on fixed random numbers.

    Args:
        run: The base run.
        metric: What scores a cell.
        put_in: What the cells put in, by hook name.
        shape: Of what the metric is given; ``None``: the logits.
        **options: What else the tool was told, in JSON's types.
    """
    where = run.logits_at
    shape = logits_shape(run.model, run.tokens, where) if shape is None else shape
    return identify_runs(run.model, run.inputs, metric, put_in, shape, where, **options)


def identify_runs(
    model: Model,
    inputs: RunInputs,
    metric: Callable[[Tensor], Any],
    put_in: Mapping[str, Tensor],
    shape: tuple[int, ...],
    where: ReadPositions,
    **options: Any,
) -> dict[str, Any]:
    """The same for runs that have no base run.

    Args:
        model: What is run.
        inputs: The prompts.
        metric: As in :func:`identify_cells`.
        put_in: As in :func:`identify_cells`.
        shape: As in :func:`identify_cells`.
        where: Where logits are read.
        **options: As in :func:`identify_cells`.
    """
    return identity_of(
        model,
        prompts=tensors_fingerprint([inputs.tokens, inputs.attention_mask, inputs.initial_state]),
        exits={name: str(value) for name, value in inputs.exits.items()},
        metric=float(_on_random_numbers(metric, model, shape)).hex(),
        put_in=tensors_fingerprint(put_in),
        logits_at=tensors_fingerprint([where.positions]),
        options=options,
    )


def _on_random_numbers(
    metric: Callable[[Tensor], Any], model: Model, shape: tuple[int, ...]
) -> Any:
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return metric(draw.to(next(model.parameters())))
