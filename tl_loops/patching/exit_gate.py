"""The halting gate: what it reads, what moves it, and runs in which it is forced."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model, norm_of_iterations
from tl_loops.layout.of_model import layout_of
from tl_loops.layout.selection import Selection, distinct_indices, index_along
from tl_loops.patching.activation import patch_grid, take_all
from tl_loops.runs.activations import check_cache
from tl_loops.runs.batches import check_batch_size
from tl_loops.runs.cells import CellOutput
from tl_loops.runs.grid import make_grid
from tl_loops.runs.in_batches import Split
from tl_loops.runs.inputs import run_inputs
from tl_loops.runs.read_positions import ReadPositions
from tl_loops.runs.rerun import BaseRun
from tl_loops.runs.scoring import Metric, check_metric, identify_cells
from tl_loops.runs.shards import Shards
from tl_loops.upstream import Cache, TextOrTokens, left_as_it_was

FORCED = 100.0
"""Halting logit of a forced decision: its sigmoid is 0 or 1 in every floating point type."""


@checked
@left_as_it_was
def exit_gate_logits(
    model: Model, tokens: TextOrTokens, **forward_arguments: Any
) -> Float[Tensor, "iteration batch pos"]:
    """The halting logit after every iteration (positive: stop).

    Args:
        model: A looped model with an exit gate.
        tokens: [batch, pos], or text.
        **forward_arguments: As in :func:`tl_loops.patching.activation_patch`.

    Raises:
        LoopedSemanticsError: The model has no gate.
    """
    layout = _gated(model)
    run = BaseRun(model, run_inputs(model, tokens, forward_arguments), _gates(layout))
    run.execute([])
    return torch.stack([run.values[name].squeeze(-1) for name in _gates(layout)])


@checked
@left_as_it_was
def probe_exit_gate(
    model: Model, cache: Cache, activation: str = "resid_post"
) -> Float[Tensor, "iteration layer batch pos"]:
    """The halting logit that the gate would give if it read the stream inside an iteration.

    The stream goes through the norm between iterations (where there is one) and the gate. At the
    last layer's ``resid_post`` this is the gate's own logit, so that the course over the layers
    shows where in an iteration the decision forms.

    Args:
        model: A looped model with an exit gate.
        cache: Cache of a run with ``activation`` at every core block.
        activation: ``"resid_pre"``, ``"resid_mid"`` or ``"resid_post"``.

    Returns:
        One logit for every iteration, layer and token.

    Raises:
        LoopedSemanticsError: The model has no gate.
        ValueError: Another activation, or a cache that lacks it.
    """
    layout = _gated(model)
    if activation not in ("resid_pre", "resid_mid", "resid_post"):
        raise ValueError(
            f"activation must be 'resid_pre', 'resid_mid' or 'resid_post', got {activation!r}"
        )
    core = range(layout.core_start, layout.coda_start)
    names = [f"blocks.{block}.hook_{activation}" for block in core]
    check_cache(cache, model, names)
    resid = torch.stack([cache[name] for name in names]).to(model.embed.W_E)
    if not getattr(cache, "has_batch_dim", True):
        resid = resid.unsqueeze(1)
    if model.cfg.readout.norm_between_iterations:
        resid = norm_of_iterations(model)(resid)
    logits = model.exit_gate(resid).squeeze(-1)
    return logits.reshape(layout.n_iterations, layout.n_core, *logits.shape[1:])


@checked
@left_as_it_was
def patch_exit_gate(
    model: Model,
    corrupted_tokens: TextOrTokens,
    clean_cache: Cache,
    metric: Metric,
    activation: str = "resid_pre",
    axes: Sequence[str] = ("block", "pos"),
    batch_size: int | None = None,
    progress: bool = True,
    *,
    window: int = 1,
    where: Mapping[str, Selection] | None = None,
    gradients: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
    **forward_arguments: Any,
) -> Float[Tensor, "..."]:
    """Activation patching with a metric on the halting logits instead of the output logits.

    Args:
        model: A looped model with an exit gate.
        corrupted_tokens: As in :func:`tl_loops.patching.activation_patch`.
        clean_cache: As there.
        metric: Maps one cell's halting logits [iteration, batch, pos] to a scalar, e.g.
            ``lambda gates: gates[2, :, -1].mean()``.
        activation: As there.
        axes: As there.
        batch_size: As there.
        progress: As there.
        window: As there.
        where: As there.
        gradients: As there.
        checkpoint: As there.
        shard: As there.
        **forward_arguments: As there.

    Returns:
        As there.

    Raises:
        LoopedSemanticsError: The model has no gate.
        ValueError: As there.
        IndexError: As there.
        CheckpointError: As there.
    """
    layout, split = _gated(model), Split(shard, checkpoint)
    split.check(model, gradients=gradients)
    check_batch_size(batch_size, or_none=True)
    inputs = run_inputs(model, corrupted_tokens, forward_arguments)
    shape = (layout.n_iterations, *inputs.shape)
    check_metric(metric, model, shape, "halting logits")
    # The metric reads no logits, so none are computed.
    nowhere = ReadPositions(inputs.tokens[:, :0], inputs.exits)
    run = BaseRun(model, inputs, _gates(layout), gradients, nowhere)
    grid = make_grid(model, activation, axes, run.n_pos, window, where)
    check_cache(clean_cache, model, grid.names)
    values = take_all(model, grid, clean_cache, run.shape)

    def score(output: CellOutput) -> Any:
        return metric(torch.stack([output.read[name].squeeze(-1) for name in _gates(layout)]))

    identify = partial(identify_cells, run, metric, values, shape, scored="halting logits")
    cached = clean_cache.keys()
    return patch_grid(run, grid, values, score, batch_size, progress, cached, split, identify)


@checked
def force_exit(
    model: Model, iteration: int, positions: Selection | None = None
) -> list[tuple[str, Any]]:
    """Hooks that make the gate stop after one iteration and at no earlier one.

    They matter to runs that read the gate: ``exit_threshold`` or ``weighted_exit``.

    Args:
        model: A looped model with an exit gate.
        iteration: Where to stop; negative counts from the last.
        positions: Which positions stop there; ``None``: all.

    Returns:
        Pairs for ``run_with_hooks`` or ``model.hooks``.

    Raises:
        LoopedSemanticsError: The model has no gate.
        IndexError: There is no such iteration.
    """
    layout = _gated(model)
    (stop,) = distinct_indices("iteration", layout.n_iterations, iteration)
    return [
        (name, partial(_force, positions, FORCED if t == stop else -FORCED))
        for t, name in enumerate(_gates(layout)[: stop + 1])
    ]


def _force(positions: Any, logit: float, value: Tensor, hook: Any) -> Tensor:
    value = value.clone()
    value[:, index_along("position", value.shape[1], positions)] = logit
    return value


def _gated(model: Model) -> LoopLayout:
    layout = layout_of(model)
    if layout is None or not model.cfg.exit_gate:
        raise LoopedSemanticsError(
            "this model has no exit gate (cfg.exit_gate is off); read its states with tl_loops.lens"
        )
    return layout


def _gates(layout: LoopLayout) -> list[str]:
    return [f"iter.{t}.hook_exit_gate" for t in range(layout.n_iterations)]
