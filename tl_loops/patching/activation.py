"""Activation patching over named axes: put the clean run's activations into the corrupted run."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.layout.model import Model
from tl_loops.layout.selection import Selection
from tl_loops.runs.activations import Activation, check_cache, take
from tl_loops.runs.cells import Cell, Edit, Score, both
from tl_loops.runs.grid import Grid, Region, make_grid
from tl_loops.runs.in_batches import PLAIN, Split
from tl_loops.runs.inputs import Positions
from tl_loops.runs.rerun import BaseRun
from tl_loops.runs.scoring import Metric, identify_cells, logits_score, start_run
from tl_loops.runs.seen_keys import SeenKeys
from tl_loops.runs.shards import Shards
from tl_loops.upstream import Cache, TextOrTokens, left_as_it_was


@checked
@left_as_it_was
def activation_patch(
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
    logits_at: Positions = "all",
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
    **forward_arguments: Any,
) -> Float[Tensor, "..."]:
    """The effect of putting each part of an activation of the clean run into the corrupted run.

    Each cell of the result is the metric of one corrupted run in which the activation, at the
    cell's coordinates, is that of the clean run; along axes that are not named it is patched in
    full. Every number is that of one full forward pass a cell, up to rounding; see
    :class:`tl_loops.runs.rerun.BaseRun` for what is not computed again.

    Args:
        model: A looped model, or a plain HookedTransformer (without the axis ``"iteration"``).
        corrupted_tokens: [batch, pos], or text.
        clean_cache: The clean run's cache (or a dictionary by canonical hook name), with as many
            positions and as many prompts, or one prompt for all.
        metric: Maps the logits [batch, read, d_vocab] of one cell to a scalar, as in
            ``transformer_lens.patching``. It is called once on random numbers beforehand.
        activation: ``"resid_pre"``, ``"resid_mid"``, ``"resid_post"``, ``"attn_out"``,
            ``"mlp_out"``, ``"z"``, ``"q"``, ``"k"``, ``"v"``, ``"pattern"``; ``"state_in"``,
            ``"injected"``, ``"state_out"``, ``"exit_gate"`` (of an iteration); ``"injection"``,
            ``"initial_state"`` (of the run); or another hook point of a block.
        axes: Names of the result's axes: ``"block"`` (all unrolled blocks) or ``"iteration"`` and
            ``"layer"`` (the core), ``"pos"`` (destinations, for a pattern), ``"head"``, and for a
            pattern ``"src_pos"``. ``()`` patches everything at once.
        batch_size: Cells in one forward pass; ``None``: chosen so that about half a gigabyte is
            used.
        progress: Show a progress bar.
        window: Cell t patches iterations (or blocks) t to t + window - 1 together.
        where: Values to which an axis, named or not, is restricted, e.g. ``{"pos": -1}``.
        gradients: Whether the result carries gradients where they are enabled; without, no cell
            keeps a graph.
        logits_at: Where the metric reads logits: ``"all"``; ``"last"``: the last real token of each
            prompt; one position or several; or [batch, read]. No others are computed, and the
            metric is given [batch, read, d_vocab].
        checkpoint: A file to which every batch of cells is added once it is done. The same call
            goes on from it, to the same bits. A metric is known by its value on fixed random
            numbers. Not for a model with hooks.
        shard: ``(k, n)``, ``"auto"`` or ``"distributed"``: which batches of cells are run here, as
            for :func:`tl_loops.measure`. With ``(k, n)`` cells of other shards are NaN;
            :func:`tl_loops.merge_shards` puts the checkpoints of all shards together, and the
            same call without ``shard`` and with that checkpoint gives the grid.
        **forward_arguments: ``attention_mask``, ``initial_state``, ``exit_at``,
            ``exit_threshold`` or ``weighted_exit`` of every run.

    Returns:
        One axis a name, in float32 (float64 where the metric is). :func:`axis_labels` gives labels
        for plots.

    Raises:
        ValueError: Prompts of different length, an unknown or unsuitable activation or axis, a
            cache that lacks it or comes from another number of iterations, a metric that returns
            no scalar. Nothing has been run then. Or a pattern that attends to what the corrupted
            run does not see, such as its padding; no cell has been run then.
        IndexError: A value in ``where`` is out of range.
        CheckpointError: The checkpoint is damaged or of another run, or the run can be neither
            resumed nor cut into shards.

    Source: 2202.05262 (causal tracing); the definition of a cell is transformer_lens.patching's.
    """
    split = Split(shard, checkpoint)
    arguments = (batch_size, forward_arguments, gradients, split, logits_at)
    run = start_run(model, corrupted_tokens, metric, *arguments)
    grid = make_grid(model, activation, axes, run.n_pos, window, where)
    check_cache(clean_cache, model, grid.names)
    values = take_all(model, grid, clean_cache, run.shape)
    score, cached = logits_score(metric), clean_cache.keys()
    identify = partial(identify_cells, run, metric, values)
    return patch_grid(run, grid, values, score, batch_size, progress, cached, split, identify)


def patch_grid(
    run: BaseRun,
    grid: Grid,
    values: Mapping[str, Tensor],
    score: Score,
    batch_size: int | None,
    progress: bool,
    cached: Iterable[str] = (),
    split: Split = PLAIN,
    identify: Callable[..., dict[str, Any]] = dict,
) -> Float[Tensor, "..."]:
    """Run and score all cells of a grid.

    Args:
        run: A base run that has not been executed.
        grid: The cells.
        values: What is put in, by canonical hook name; batch axis 1 or that of the prompts.
        score: Maps a cell's output to a scalar.
        batch_size: As in :func:`activation_patch`.
        progress: As in :func:`activation_patch`.
        cached: Every hook name of the cache that the values come from.
        split: Which batches of cells are run here, and where they are kept.
        identify: Gives what decides the scores, with what it is told of the grid.

    Raises:
        ValueError: A pattern attends to what the run does not see.
    """
    changes: dict[str, Tensor] = {}
    seen, explicit = SeenKeys(), []
    observe = seen.watch(run.model, grid.names)
    if not run.gradients:
        # Where both runs agree to the last bit a patch does nothing. With gradients it does: the
        # patched value no longer depends on the corrupted prompt.
        for name in grid.names:
            note = partial(_note_changes, changes, name, grid.activation, values[name])
            observe[name] = both(observe[name], note) if name in observe else note
        # Fused and explicit attention differ in the last bit: take the way that the cache took.
        explicit = [name for name in cached if name.endswith(("hook_attn_scores", "hook_pattern"))]
    run.execute(grid.names, observe, explicit)
    seen.check(grid.regions, values)
    cells = [_cell(grid.activation, region, values, changes, run.n_pos) for region in grid.regions]
    name = grid.activation.name
    what = {"axes": grid.axes, "values": grid.values, "regions": repr(grid.regions)}
    scores = run.score(
        cells,
        score,
        batch_size,
        progress,
        f"patch {name}",
        split=split,
        identify=partial(identify, activation=name, **what),
    )
    return scores.reshape(grid.shape)


def replace(
    activation: Activation,
    value: Tensor,
    pos: slice,
    head: slice | None,
    src: slice | None,
    n_pos: int,
    *,
    from_pos: slice | None = None,
    from_head: slice | None = None,
) -> Edit:
    """An edit that copies a part of ``value`` over the same part of a run's activation.

    Both may lack positions in front; those of ``value`` that do are left as they are. With
    ``from_pos`` and ``from_head`` it is another part of as many positions and heads; ``value`` then
    lacks none.
    """
    pos_dim = activation.pos_dim

    def edit(rows: Tensor) -> None:
        # A run that leaves out the first positions shows the last ones.
        left_out, lacking = n_pos - rows.shape[pos_dim], n_pos - value.shape[pos_dim]
        if from_pos is not None:
            lacking = pos.start - from_pos.start
        first = max(pos.start, left_out, lacking)
        if first >= pos.stop:
            return
        here, there = [slice(None)] * rows.ndim, [slice(None)] * rows.ndim
        here[pos_dim] = slice(first - left_out, pos.stop - left_out)
        there[pos_dim] = slice(first - lacking, pos.stop - lacking)
        if head is not None and activation.head_dim is not None:
            here[activation.head_dim] = head
            there[activation.head_dim] = head if from_head is None else from_head
        if src is not None:
            here[3] = there[3] = src
        rows[tuple(here)] = value[tuple(there)].to(rows)

    return edit


def take_all(model: Model, grid: Grid, cache: Cache, shape: tuple[int, int]) -> dict[str, Tensor]:
    """All that a grid puts in, from a cache; see :func:`tl_loops.runs.activations.take`."""
    heads = grid.activation.n_heads(model.cfg)
    return {name: take(cache, grid.activation, name, shape, heads) for name in grid.names}


def _note_changes(
    changes: dict[str, Tensor], name: str, activation: Activation, clean: Tensor, value: Tensor
) -> None:
    """Note where clean and corrupted activation differ: [pos], [pos, head] or [pos, head, src]."""
    differs = clean.to(value) != value
    if activation.kind == "pattern":
        changes[name] = differs.any(0).permute(1, 0, 2).cpu()
    else:
        kept = 3 if activation.kind == "heads" else 2
        differs = differs.flatten(kept).any(-1) if differs.ndim > kept else differs
        changes[name] = differs.any(0).cpu()


def _cell(
    activation: Activation,
    region: Region,
    values: Mapping[str, Tensor],
    changes: Mapping[str, Tensor],
    n_pos: int,
) -> Cell:
    """The edits of one cell, without those that change nothing."""
    edits: list[tuple[str, Edit]] = []
    first = n_pos
    for name in region.names:
        for pos, head, src in region.parts():
            start = pos.start
            if name in changes:
                part = changes[name][tuple(p for p in (pos, head, src) if p is not None)]
                differs = part.reshape(part.shape[0], -1).any(-1).nonzero()
                if not len(differs):
                    continue
                start += int(differs[0])
            edits.append((name, replace(activation, values[name], pos, head, src, n_pos)))
            first = min(first, start)
    return Cell(edits, min(first, n_pos - 1))
