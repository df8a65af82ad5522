"""Transplants: the value of a site in one run, put into a site of another run or iteration."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.errors import ArgumentError, shortened
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout
from tl_loops.layout.selection import Selection, distinct_indices
from tl_loops.patching.matching import SourceRun, Transplant, match
from tl_loops.patching.site import Site, Sites, group
from tl_loops.runs.activations import find_activation
from tl_loops.runs.cells import Cell, named_hooks
from tl_loops.runs.in_batches import Split
from tl_loops.runs.inputs import Positions
from tl_loops.runs.rerun import BaseRun
from tl_loops.runs.scoring import Metric, identify_cells, logits_score, start_run
from tl_loops.runs.seen_keys import SeenKeys
from tl_loops.runs.shards import Shards
from tl_loops.upstream import Cache, TextOrTokens, left_as_it_was

HookList = list[tuple[str, Callable]]


@checked
def transplant_hooks(
    model: Model, cache: Cache, source: Sites, target: Sites | None = None
) -> HookList:
    """Hooks that put what a site held in a recorded run into a site of the run they act in.

    The recorded run may be of the same prompt (another iteration's value), of another prompt, of
    another number of iterations or of another model. Sites pair up in their order: iterations and
    layers, positions, heads. One in the source serves all of the target. Positions count along the
    row, padding included. ``q`` and ``k`` stand before the rotation, so at another position they
    get that position's; ``rot_q`` and ``rot_k`` keep their own.

    Args:
        model: The model that the hooks act in: looped, or a plain HookedTransformer.
        cache: Of the recorded run, with the source's activation.
        source: Where values are read; a list is several at once.
        target: Where they are put, one site for each; ``None``: at the same places.

    Returns:
        Pairs for ``run_with_hooks`` or ``model.hooks``; add lists to transplant more together.

    Raises:
        ValueError: A site that a model does not have, a cache that lacks it, axes, widths, heads or
            numbers of places that do not fit. In the run: prompts that do not fit, or a pattern
            that attends to what the run does not see at its new place.
        IndexError: A coordinate is out of range.
        LoopedSemanticsError: Keys or values of a model whose iterations share them.
    """
    run = SourceRun.of(cache, model)
    hooks: HookList = []
    for one in _matched(model, run, source, source if target is None else target):
        seen = SeenKeys()
        if one.is_pattern:
            hooks += named_hooks(seen.watch(model, [one.name]), seen.note)
        hooks.append((one.name, partial(_put, one, seen)))
    return hooks


@checked
@left_as_it_was
def transplant_sites(
    model: Model,
    corrupted_tokens: TextOrTokens,
    clean_cache: Cache,
    metric: Metric,
    sources: Sequence[Sites],
    targets: Sequence[Sites] | None = None,
    *,
    batch_size: int | None = None,
    progress: bool = True,
    gradients: bool = False,
    logits_at: Positions = "all",
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
    **forward_arguments: Any,
) -> Float[Tensor, "source target"]:
    """The effect of putting what each source site held in one run into each target site of another.

    With ``[Site("q", t, 0) for t in range(n)]`` on both sides it is source iteration by target
    iteration, for the queries of one layer.

    Args:
        model: A looped model, or a plain HookedTransformer.
        corrupted_tokens: [batch, pos], or text.
        clean_cache: As ``cache`` of :func:`transplant_hooks`.
        metric: Maps the logits [batch, pos, d_vocab] of one cell to a scalar.
        sources: Sites of the cached run; a list in place of a site is transplanted together.
        targets: Sites of the corrupted run, likewise; ``None``: the same as ``sources``.
        batch_size: As in :func:`tl_loops.patching.activation_patch`.
        progress: Show a progress bar.
        gradients: As in :func:`tl_loops.patching.activation_patch`.
        logits_at: As in :func:`tl_loops.patching.activation_patch`.
        checkpoint: As in :func:`tl_loops.patching.activation_patch`.
        shard: As in :func:`tl_loops.patching.activation_patch`.
        **forward_arguments: As in :func:`tl_loops.patching.activation_patch`.

    Returns:
        The metric of each run, which equals that with the hooks of :func:`transplant_hooks`.

    Raises:
        ValueError: As :func:`transplant_hooks`, before any cell is run; no sources or targets; a
            metric that returns no scalar.
        IndexError: A coordinate is out of range.
        LoopedSemanticsError: As :func:`transplant_hooks`.
        CheckpointError: As :func:`tl_loops.patching.activation_patch`.
    """
    split = Split(shard, checkpoint)
    given = (batch_size, forward_arguments, gradients, split, logits_at)
    run = start_run(model, corrupted_tokens, metric, *given)
    recorded = SourceRun.of(clean_cache, model)
    return _score(run, recorded, metric, sources, targets, batch_size, progress, split)


@checked
@left_as_it_was
def transplant_states(
    model: Model,
    corrupted_tokens: TextOrTokens,
    clean_cache: Cache,
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

    It is :func:`transplant_sites` for the states between iterations.

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
            f"activation must be 'state_in', 'injected' or 'state_out', got {activation!r}; "
            "transplant_sites takes others"
        )
    split = Split(shard, checkpoint)
    arguments = (batch_size, forward_arguments, gradients, split, logits_at)
    run = start_run(model, corrupted_tokens, metric, *arguments)
    found = find_activation(model, activation)
    recorded = SourceRun.of(clean_cache, model)
    n_sources = recorded.n_cached_iterations(found.rest)
    source = distinct_indices("source iteration", n_sources, sources)
    target = distinct_indices("target iteration", layout.n_iterations, targets)
    given, taken = ([Site(activation, t, pos=pos) for t in part] for part in (source, target))
    return _score(run, recorded, metric, given, taken, batch_size, progress, split)


def _score(
    run: BaseRun,
    recorded: SourceRun,
    metric: Metric,
    sources: Sequence[Sites],
    targets: Sequence[Sites] | None,
    batch_size: int | None,
    progress: bool,
    split: Split,
) -> Float[Tensor, "source target"]:
    """The metric of a base run with each source in each target."""
    model, n_pos = run.model, run.n_pos
    targets = sources if targets is None else targets
    if not len(sources) or not len(targets):
        raise ValueError("a transplant needs at least one source and one target")
    grid = [[_matched(model, recorded, s, t) for t in targets] for s in sources]
    every = [one for row in grid for cell in row for one in cell]
    cells = []
    for cell in (cell for row in grid for cell in row):
        for one in cell:
            one.check_rows(run.batch)
        edits = [(one.name, edit) for one in cell for edit in one.edits(n_pos)]
        first = min(there.start for one in cell for _, there in one.positions(n_pos))
        cells.append(Cell(edits, first))
    seen = SeenKeys()
    names = dict.fromkeys(one.name for one in every)
    run.execute(names, seen.watch(model, names))
    for one in every:
        if one.is_pattern:
            one.check_seen(seen.hidden_at(one.name))
    put_in = {one.source_name: one.value for one in every}
    parts = [
        [(one.source_name, one.name, one.positions(n_pos), one.heads) for one in cell]
        for row in grid
        for cell in row
    ]
    what = ", ".join(dict.fromkeys(one.activation.name for one in every))
    scores = run.score(
        cells,
        logits_score(metric),
        batch_size,
        progress,
        f"transplant {what}",
        split=split,
        identify=partial(identify_cells, run, metric, put_in, parts=repr(parts)),
    )
    return scores.reshape(len(sources), len(targets))


def _matched(model: Model, run: SourceRun, sources: Sites, targets: Sites) -> list[Transplant]:
    """The transplants of one cell: each source with the target of its place in the list."""
    given, taken = group(sources), group(targets)
    for site in (*given, *taken):
        if not isinstance(site, Site):
            raise ArgumentError(f"a place is a Site or a list of them, got {shortened(site)}")
    if len(given) != len(taken) or not given:
        raise ValueError(
            f"{len(given)} source sites meet {len(taken)} target sites: give one target for each "
            "source"
        )
    return [one for s, t in zip(given, taken, strict=True) for one in match(model, run, s, t)]


def _put(one: Transplant, seen: SeenKeys, value: Tensor, hook: Any) -> Tensor:
    """Put a source's value into a copy of a run's."""
    one.check_rows(value.shape[0])
    if one.is_pattern:
        one.check_seen(seen.hidden_at(one.name))
    value = value.clone()
    for edit in one.edits(value.shape[one.activation.pos_dim]):
        edit(value)
    return value
