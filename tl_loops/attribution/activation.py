"""Attribution patching: every cell of activation patching to first order, from gradients."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.attribution.gradients import (
    Method,
    Metric,
    check_arguments,
    check_differentiable,
    check_integrates,
    difference,
    effect,
    metric_gradients,
    moved,
    path_nodes,
)
from tl_loops.layout.model import Model
from tl_loops.layout.selection import Selection
from tl_loops.runs.activations import Activation, check_cache, take
from tl_loops.runs.cells import named_hooks
from tl_loops.runs.grid import Grid, Region, make_grid
from tl_loops.runs.in_batches import Batch, Run, Split, run_in_batches
from tl_loops.runs.inputs import Positions, run_inputs
from tl_loops.runs.scoring import identify_runs, logits_shape, read_at
from tl_loops.runs.seen_keys import SeenKeys
from tl_loops.runs.shards import Shards
from tl_loops.upstream import Cache, TextOrTokens, left_as_it_was

_EMBED = "hook_embed"


@checked
@left_as_it_was
def attribution_patch(
    model: Model,
    corrupted_tokens: TextOrTokens,
    clean_cache: Cache,
    metric: Metric,
    activation: str = "resid_pre",
    axes: Sequence[str] = ("block", "pos"),
    *,
    method: Method = "gradient",
    n_steps: int = 8,
    window: int = 1,
    where: Mapping[str, Selection] | None = None,
    logits_at: Positions = "all",
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
    **forward_arguments: Any,
) -> Float[Tensor, "..."]:
    """What :func:`tl_loops.patching.activation_patch` would change, to first order.

    Each cell is the gradient of the metric by the activation times (clean - corrupted), summed
    over the cell: an estimate of ``activation_patch(...) - metric(corrupted logits)`` with the
    same arguments. One forward and one backward pass give all cells; gradients run through every
    iteration. Exact where metric and model are linear between the two activations and the cell
    covers one hook point. A cell that covers several (an iteration's layers, a window) sums their
    effects, although an exact patch lets the later ones override the earlier ones.

    Args:
        model: A looped model, or a plain HookedTransformer (without the axis ``"iteration"``).
        corrupted_tokens: [batch, pos], or text.
        clean_cache: The clean run's cache (or a dictionary by canonical hook name), with as many
            positions and as many prompts, or one prompt for all. ``"integrated_inputs"`` also
            needs its ``hook_embed``.
        metric: Maps the logits [batch, pos, d_vocab] to a scalar tensor with a gradient. It is
            called once on random numbers beforehand.
        activation: As for ``activation_patch``.
        axes: As for ``activation_patch``.
        method: ``"gradient"``: at the corrupted run. ``"integrated_inputs"``: averaged while the
            embedding moves from the corrupted to the clean prompt (``n_steps`` passes).
            ``"integrated_activation"``: averaged while the activation itself moves, one hook point
            at a time (``n_steps`` passes a hook point); a hook point's cells then sum to the exact
            effect of patching all of it.
        n_steps: Number of points on the path.
        window: Cell t covers iterations (or blocks) t to t + window - 1.
        where: Values to which an axis, named or not, is restricted.
        logits_at: As for ``activation_patch``.
        checkpoint: A file to which every pass along the path is added once it is done; the same
            call goes on from it, to the same bits.
        shard: ``(k, n)``, ``"auto"`` or ``"distributed"``: which passes are run here, as for
            ``activation_patch``. With ``(k, n)`` all cells are NaN, until the checkpoints are
            merged (:func:`tl_loops.merge_shards`).
        **forward_arguments: ``attention_mask``, ``initial_state``, ``exit_at``,
            ``exit_threshold`` or ``weighted_exit`` of every run.

    Returns:
        One axis a name, in float32 (float64 for a float64 model), without gradients.

    Raises:
        ValueError: As for ``activation_patch``; or a metric that cannot be differentiated. Nothing
            has been run then.
        IndexError: A value in ``where`` is out of range.
        TypeError: An argument that the forward pass does not take.
        CheckpointError: The checkpoint is damaged or of another run, or the run can be neither
            resumed nor cut into shards.

    Source: attribution patching, Nanda 2023 and 2310.10348, section 2; integrated gradients,
    1703.01365, section 3, along the two paths of 2403.17806, section 4.
    """
    check_arguments(forward_arguments)
    split = Split(shard, checkpoint)
    split.check(model)
    nodes = path_nodes(method, n_steps)
    check_integrates(model, method)
    fed = run_inputs(model, corrupted_tokens, forward_arguments)
    tokens, forward_arguments = fed.tokens, fed.forward_arguments
    grid = make_grid(model, activation, axes, tokens.shape[1], window, where)
    inputs = [_EMBED] if method == "integrated_inputs" else []
    check_cache(clean_cache, model, [*grid.names, *inputs])
    heads = grid.activation.n_heads(model.cfg)
    clean = {
        name: take(clean_cache, grid.activation, name, fed.shape, heads) for name in grid.names
    }
    read = read_at(logits_at, fed)
    shape = logits_shape(model, tokens, read)
    check_differentiable(metric, model, shape)

    def gradients(names: Sequence[str], before: Any = ()) -> tuple[dict, dict]:
        return metric_gradients(model, tokens, metric, names, forward_arguments, read, before)

    seen = SeenKeys()
    note = named_hooks(seen.watch(model, grid.names), seen.note)
    corrupted, at_corrupted = gradients(grid.names, note)
    seen.check(grid.regions, clean)
    delta = {n: difference(clean[n].to(corrupted[n]), corrupted[n]) for n in grid.names}
    embed = clean_cache[_EMBED] if inputs else None
    # One unit of work is one pass: at a point of the path of all hook points, or of one of them.
    along = grid.names if method == "integrated_activation" else [None]
    passes = [(alpha, weight, name) for alpha, weight in nodes for name in along]

    def compute(number: int) -> Batch:
        alpha, weight, name = passes[number]
        if method == "gradient":
            found = at_corrupted
        elif name is None:
            assert embed is not None
            _, found = gradients(grid.names, [(_EMBED, moved(embed, alpha))])
        else:
            _, found = gradients([name], [(name, moved(clean[name], alpha))])
        return {
            n: _effect(grid.activation, weight * found[n], delta[n].expand_as(found[n]))
            for n in found
        }

    effects: dict[str, Tensor] = {}

    def add(number: int, batch: Batch) -> None:
        for name, value in batch.items():
            value = value.to(tokens.device)
            effects[name] = effects[name] + value if name in effects else value

    def identify() -> dict[str, Any]:
        what = {"method": method, "n_steps": n_steps, "regions": repr(grid.regions)}
        put_in = {**clean, **({} if embed is None else {_EMBED: embed})}
        return identify_runs(model, fed, metric, put_in, shape, read, axes=grid.axes, **what)

    run = Run(f"attribute {activation}", [1] * len(passes), identify, unit="pass")
    if run_in_batches(run, compute, add, split) is not None:
        return torch.full(grid.shape, torch.nan)
    return _cells(grid, effects)


def _effect(activation: Activation, gradient: Tensor, delta: Tensor) -> Tensor:
    """Gradient times (clean - corrupted) as [pos], [pos, head] or [pos, head, src]."""
    if activation.kind == "pattern":
        return effect(gradient, delta, 3).transpose(0, 1)
    return effect(gradient, delta, 2 if activation.kind == "heads" else 1)


def _cells(grid: Grid, effects: Mapping[str, Tensor]) -> Tensor:
    cells = torch.stack([_sum_over(region, effects) for region in grid.regions])
    return cells.reshape(grid.shape)


def _sum_over(region: Region, effects: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros_like(effects[region.names[0]].sum())
    for name in region.names:
        for pos in region.pos:
            for head in region.head or (None,):
                for src in region.src_pos or (None,):
                    part = tuple(index for index in (pos, head, src) if index is not None)
                    total = total + effects[name][part].sum()
    return total
