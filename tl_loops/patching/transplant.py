"""Transplants: the state of one iteration, of this run or another, put into another iteration."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout
from tl_loops.layout.selection import Selection, contiguous_parts, distinct_indices
from tl_loops.patching.activation import replace
from tl_loops.runs.activations import cached_names, check_held, find_activation, take
from tl_loops.runs.cells import Cell
from tl_loops.runs.in_batches import Split
from tl_loops.runs.inputs import Positions
from tl_loops.runs.scoring import Metric, identify_cells, logits_score, start_run
from tl_loops.runs.shards import Shards
from tl_loops.upstream import left_as_it_was


@checked
@left_as_it_was
def transplant_states(
    model: Model,
    corrupted_tokens: Any,
    clean_cache: Any,
    metric: Metric,
    activation: str = "state_out",
    *,
    sources: Sequence[int] | None = None,
    targets: Sequence[int] | None = None,
    pos: Selection | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    gradients: bool = False,
    logits_at: Positions = "all",
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
    **forward_arguments: Any,
) -> Float[Tensor, "source target"]:
    """The effect of putting the state of iteration a of one run into iteration b of another.

    Args:
        model: A looped model.
        corrupted_tokens: [batch, pos], or text.
        clean_cache: Cache of the run that gives the states. It may have another number of
            iterations, or be a run of the same prompt.
        metric: Maps the logits [batch, pos, d_vocab] of one cell to a scalar.
        activation: ``"state_out"``: the state that leaves an iteration; ``"state_in"``: that enters
            one (iteration 0: the initial state); ``"injected"``: that enters its first layer.
        sources: Iterations of the cached run; ``None``: all that the cache holds.
        targets: Iterations of the corrupted run; ``None``: all.
        pos: Positions that are transplanted; ``None``: all.
        batch_size: As in :func:`tl_loops.patching.activation_patch`.
        progress: Show a progress bar.
        gradients: As in :func:`tl_loops.patching.activation_patch`.
        logits_at: As in :func:`tl_loops.patching.activation_patch`.
        checkpoint: As in :func:`tl_loops.patching.activation_patch`.
        shard: As in :func:`tl_loops.patching.activation_patch`.
        **forward_arguments: As in :func:`tl_loops.patching.activation_patch`.

    Returns:
        The metric of each run; its diagonal is ``activation_patch(..., axes=("iteration",))``.

    Raises:
        ValueError: The model has no loop, prompts of different length, a cache without the state,
            a metric that returns no scalar.
        IndexError: An iteration or a position is out of range.
        CheckpointError: As :func:`tl_loops.patching.activation_patch`.
    """
    layout = require_layout(model)
    if activation not in ("state_in", "injected", "state_out"):
        raise ValueError(
            f"activation must be 'state_in', 'injected' or 'state_out', got {activation!r}"
        )
    split = Split(shard, checkpoint)
    given = (batch_size, forward_arguments, gradients, split, logits_at)
    run = start_run(model, corrupted_tokens, metric, *given)
    found = find_activation(model, activation)
    n_sources = _cached_iterations(clean_cache, found.rest)
    source = distinct_indices("source iteration", n_sources, sources)
    target = distinct_indices("target iteration", layout.n_iterations, targets)
    parts = contiguous_parts(distinct_indices("pos", run.n_pos, pos))
    check_held(clean_cache, model, [found.hook_name(t) for t in source])
    states = {t: take(clean_cache, found, found.hook_name(t), run.shape, None) for t in source}
    cells = []
    for a in source:
        for b in target:
            name = found.hook_name(b)
            edits = [
                (name, replace(found, states[a], part, None, None, run.n_pos)) for part in parts
            ]
            cells.append(Cell(edits, parts[0].start))
    run.execute([found.hook_name(b) for b in target])
    put_in = {found.hook_name(t): state for t, state in states.items()}
    scores = run.score(
        cells,
        logits_score(metric),
        batch_size,
        progress,
        f"transplant {activation}",
        split=split,
        identify=partial(
            identify_cells,
            run,
            metric,
            put_in,
            sources=source,
            targets=target,
            positions=repr(parts),
        ),
    )
    return scores.reshape(len(source), len(target))


def _cached_iterations(cache: Mapping[str, Tensor] | Any, rest: str) -> int:
    """How many iterations the cached run had, as far as the cache shows."""
    held = [
        int(name.split(".")[1])
        for name in cached_names(cache)
        if name.startswith("iter.") and name.endswith(f".{rest}")
    ]
    if not held:
        raise ValueError(
            f"the cache holds no iter.*.{rest}: run run_with_cache with a names_filter that keeps "
            "it"
        )
    return max(held) + 1
