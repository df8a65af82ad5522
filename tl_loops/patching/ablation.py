"""Ablation over named axes, and of massive activations at the block that makes them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked, checked_fields
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import layout_of
from tl_loops.layout.selection import Selection
from tl_loops.metrics.massive import massive_activations
from tl_loops.patching.activation import patch_grid
from tl_loops.runs.cells import Cell, Edit
from tl_loops.runs.grid import make_grid
from tl_loops.runs.in_batches import Split
from tl_loops.runs.inputs import Positions, run_inputs
from tl_loops.runs.removal import MeanOver, check_removal, removal_values
from tl_loops.runs.rerun import BaseRun
from tl_loops.runs.scoring import Metric, identify_cells, logits_score, start_run
from tl_loops.runs.shards import Shards
from tl_loops.upstream import Cache, TextOrTokens, left_as_it_was


@checked
@left_as_it_was
def ablate(
    model: Model,
    tokens: TextOrTokens,
    metric: Metric,
    activation: str = "z",
    axes: Sequence[str] = ("block", "head"),
    method: str = "zero",
    reference: Cache | None = None,
    *,
    mean_over: MeanOver = "batch",
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    window: int = 1,
    where: Mapping[str, Selection] | None = None,
    gradients: bool = False,
    logits_at: Positions = "all",
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
    **forward_arguments: Any,
) -> Float[Tensor, "..."]:
    """The effect of removing each part of an activation.

    Args:
        model: A looped model, or a plain HookedTransformer.
        tokens: [batch, pos], or text.
        metric: Maps the logits [batch, pos, d_vocab] of one cell to a scalar.
        activation: As in :func:`tl_loops.patching.activation_patch`.
        axes: As in :func:`tl_loops.patching.activation_patch`.
        method: ``"zero"``; ``"mean"``: the mean over the reference prompts; ``"resample"``: each
            prompt gets the activation of a reference prompt drawn at random, the same one in all
            cells; ``"paired"``: that of the reference prompt with its own number.
        reference: Cache of the reference prompts; ``"zero"`` takes none.
        mean_over: Whether the mean is over prompts, or over prompts and positions (which also lets
            reference prompts have another length; not for patterns). Padding, by the cache's
            ``mask``, enters neither.
        seed: Of the draw of ``"resample"``.
        batch_size: As in :func:`tl_loops.patching.activation_patch`.
        progress: Show a progress bar.
        window: As in :func:`tl_loops.patching.activation_patch`.
        where: As in :func:`tl_loops.patching.activation_patch`.
        gradients: As in :func:`tl_loops.patching.activation_patch`.
        logits_at: As in :func:`tl_loops.patching.activation_patch`.
        checkpoint: As in :func:`tl_loops.patching.activation_patch`.
        shard: As in :func:`tl_loops.patching.activation_patch`.
        **forward_arguments: As in :func:`tl_loops.patching.activation_patch`.

    Returns:
        The metric of each ablated run, one axis a name.

    Raises:
        ValueError: As :func:`tl_loops.patching.activation_patch`; or a missing or needless
            reference.
        IndexError: A value in ``where`` is out of range.
        CheckpointError: As :func:`tl_loops.patching.activation_patch`.

    Source: zero and mean ablation as in 2211.00593, section 2; resampling as in causal scrubbing.
    """
    split = Split(shard, checkpoint)
    run = start_run(
        model, tokens, metric, batch_size, forward_arguments, gradients, split, logits_at
    )
    grid = make_grid(model, activation, axes, run.n_pos, window, where)
    check_removal("method", method, reference)
    values = removal_values(
        model, grid.activation, grid.names, method, reference, run.shape, mean_over, seed
    )
    identify = partial(identify_cells, run, metric, values, method=method)
    score = logits_score(metric)
    return patch_grid(run, grid, values, score, batch_size, progress, (), split, identify)


@checked_fields
@dataclass(frozen=True)
class MassiveSite:
    """One massive activation at the block that makes it.

    Attributes:
        block: First unrolled block whose output has it while its input has not; -1 where the
            embedding already has it.
        label: Its label, such as ``"r1.0"``; ``"embed"`` for -1.
        row: Prompt.
        pos: Position.
        dim: Dimension of the residual stream.
        value: Its value there.
    """

    block: int
    label: str
    row: int
    pos: int
    dim: int
    value: float


@checked
@left_as_it_was
def find_massive_sites(
    model: Model,
    tokens: TextOrTokens,
    magnitude: float | int = 100,
    ratio: float | int = 1000,
    **forward_arguments: Any,
) -> list[MassiveSite]:
    """Massive activations of the residual stream, each where it first appears.

    One that vanishes and is made again, as happens from iteration to iteration, is listed at each
    block that makes it.

    Args:
        model: A looped model, or a plain HookedTransformer.
        tokens: [batch, pos], or text.
        magnitude: Absolute threshold, see :func:`tl_loops.metrics.massive.massive_activations`.
        ratio: Threshold relative to the median.
        **forward_arguments: ``attention_mask`` (padding is left out) or ``initial_state``.

    Returns:
        The sites in order of depth, prompt, position and dimension.

    Source: 2402.17762, section 2.
    """
    inputs = run_inputs(model, tokens, forward_arguments)
    run = BaseRun(model, inputs)
    layout, n_layers = layout_of(model), model.cfg.n_layers
    present: dict[str, dict[tuple[int, ...], float]] = {}

    def look(name: str, resid: Tensor) -> None:
        found = massive_activations(resid, magnitude, ratio, inputs.mask)
        where = map(tuple, found.index.tolist())
        present[name] = dict(zip(where, found.value.tolist(), strict=True))

    names = [f"blocks.{i}.hook_resid_{end}" for i in range(n_layers) for end in ("pre", "post")]
    run.execute([], {name: partial(look, name) for name in names})
    sites = []
    for block in range(-1, n_layers):
        before = present[f"blocks.{block}.hook_resid_pre"] if block >= 0 else {}
        after = present[f"blocks.{block}.hook_resid_post" if block >= 0 else names[0]]
        label = "embed" if block < 0 else layout.label(block) if layout is not None else f"b{block}"
        for (row, pos, dim), value in sorted(after.items()):
            if (row, pos, dim) not in before:
                sites.append(MassiveSite(block, label, row, pos, dim, value))
    return sites


@checked
@left_as_it_was
def ablate_massive(
    model: Model,
    tokens: TextOrTokens,
    metric: Metric,
    sites: Sequence[MassiveSite],
    method: str = "zero",
    *,
    together: bool = False,
    batch_size: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
    **forward_arguments: Any,
) -> Float[Tensor, "site"]:
    """The effect of taking massive activations away at the block that makes them.

    Args:
        model: The model that the sites were found on.
        tokens: The same prompts.
        metric: Maps the logits [batch, pos, d_vocab] of one cell to a scalar.
        sites: From :func:`find_massive_sites`.
        method: ``"zero"``: the entry in the block's output becomes 0; ``"mean"``: it becomes the
            mean of that entry over the prompts; ``"mlp_pos"``: the block's MLP adds nothing at that
            position; ``"mlp"``: it adds nothing at any position of that prompt.
        together: Take all sites away in one run rather than each in its own.
        batch_size: Cells in one forward pass.
        progress: Show a progress bar.
        checkpoint: As in :func:`tl_loops.patching.activation_patch`.
        shard: As in :func:`tl_loops.patching.activation_patch`.
        **forward_arguments: As in :func:`tl_loops.patching.activation_patch`.

    Returns:
        The metric of the run without each site; one entry with ``together``.

    Raises:
        ValueError: No sites, a site that the prompts or the model do not have, a site of the
            embedding with a method that needs an MLP, a metric that returns no scalar.
        CheckpointError: As :func:`tl_loops.patching.activation_patch`.

    Source: 2402.17762 (zero and mean); 2510.06477 (the MLP at that position); 2604.11791,
    appendix E.3 (the whole MLP output).
    """
    split = Split(shard, checkpoint)
    run = start_run(model, tokens, metric, batch_size, forward_arguments, split=split)
    if not sites:
        raise ValueError(
            "there are no sites to ablate: lower magnitude or ratio in find_massive_sites"
        )
    if method not in ("zero", "mean", "mlp_pos", "mlp"):
        raise ValueError(f"method must be 'zero', 'mean', 'mlp_pos' or 'mlp', got {method!r}")
    for site in sites:
        inside = site.row < run.batch and site.pos < run.n_pos
        if not (inside and -1 <= site.block < model.cfg.n_layers and site.dim < model.cfg.d_model):
            raise ValueError(f"{site} is not in prompts of shape {run.shape} on this model")
        if site.block < 0 and method.startswith("mlp"):
            raise ValueError(f"method={method!r} needs a block, but {site} is the embedding's")
    names = [_site_hook(site, method) for site in sites]
    seen: dict[str, Tensor] = {}
    observe = {name: partial(seen.__setitem__, name) for name in names} if method == "mean" else {}
    run.execute(names, observe)
    edits: list[tuple[str, Edit]] = []
    for name, site in zip(names, sites, strict=True):
        value = 0.0
        if method == "mean":
            value = float(seen[name][:, site.pos, site.dim].float().mean())
        edits.append((name, partial(_set_site, site, method, value, run.n_pos)))
    firsts = [0 if method == "mlp" else site.pos for site in sites]
    cells = [Cell([edit], first) for edit, first in zip(edits, firsts, strict=True)]
    if together:
        cells = [Cell(edits, min(firsts))]
    places = [[site.block, site.row, site.pos, site.dim] for site in sites]
    what = {"method": method, "together": together, "sites": places}
    return run.score(
        cells,
        logits_score(metric),
        batch_size,
        progress,
        "ablate massive",
        split=split,
        identify=partial(identify_cells, run, metric, {}, **what),
    )


def _site_hook(site: MassiveSite, method: str) -> str:
    """Where a site is taken away: the MLP of its block, or the stream after it."""
    if site.block < 0:
        return "blocks.0.hook_resid_pre"
    return f"blocks.{site.block}.hook_{'mlp_out' if method.startswith('mlp') else 'resid_post'}"


def _set_site(site: MassiveSite, method: str, value: float, n_pos: int, rows: Tensor) -> None:
    pos = site.pos - (n_pos - rows.shape[1])  # Positions in front may be left out.
    if method == "mlp":
        rows[site.row] = 0.0
    elif pos >= 0 and method == "mlp_pos":
        rows[site.row, pos] = 0.0
    elif pos >= 0:
        rows[site.row, pos, site.dim] = value
