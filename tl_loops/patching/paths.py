"""Path patching: what a sender tells a receiver directly, with everything between held fixed."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.layout.model import Model
from tl_loops.patching.activation import replace, take_all
from tl_loops.patching.site import Sites, group
from tl_loops.runs.activations import Activation, check_cache, find_activation
from tl_loops.runs.cells import Cell, Edit, Score
from tl_loops.runs.grid import Grid
from tl_loops.runs.in_batches import Batch, Run, Split, run_in_batches
from tl_loops.runs.inputs import Positions
from tl_loops.runs.rerun import BaseRun
from tl_loops.runs.scoring import Metric, identify_cells, logits_score, start_run
from tl_loops.runs.seen_keys import SeenKeys
from tl_loops.runs.shards import Shards
from tl_loops.upstream import Cache, TextOrTokens, left_as_it_was

Receiver = Sites | str


@checked
@left_as_it_was
def path_patch(
    model: Model,
    corrupted_tokens: TextOrTokens,
    clean_cache: Cache,
    metric: Metric,
    senders: Sequence[Sites],
    receivers: Sequence[Receiver],
    *,
    freeze: Sequence[str] = ("attn_out", "mlp_out"),
    batch_size: int | None = None,
    progress: bool = True,
    gradients: bool = False,
    logits_at: Positions = "all",
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
    **forward_arguments: Any,
) -> Float[Tensor, "sender receiver"]:
    """The effect of what each sender tells each receiver directly.

    For each pair: (1) a run in which the sender is patched from the clean cache while the outputs
    named by ``freeze`` keep their corrupted values in every block from the sender on (but for the
    output that the sender itself is part of); norms, injection and the residual stream are run. (2)
    What reaches the receiver there is put into the receiver of a corrupted run, in which everything
    after it is run. The metric of the second run is the entry. It is that of the corrupted run
    where the receiver lies before the sender.

    Args:
        model: A looped model, or a plain HookedTransformer.
        corrupted_tokens: [batch, pos], or text.
        clean_cache: Cache of the clean run, with the senders' activations.
        metric: Maps the logits [batch, pos, d_vocab] of one cell to a scalar.
        senders: Sites; a list in place of a site is patched together.
        receivers: Sites that read the residual stream, such as ``Site("resid_pre", 3, 0)``,
            ``Site("q", 3, 0, head=1)`` or ``Site("injected", 2)``; a list likewise. Or
            ``"logits"``: the direct effect, which is the metric of run (1).
        freeze: Outputs that are held fixed; ``("attn_out",)`` lets the MLPs pass effects on.
        batch_size: Cells in one forward pass; ``None``: chosen.
        progress: Show a progress bar.
        gradients: As in :func:`tl_loops.patching.activation_patch`.
        logits_at: As in :func:`tl_loops.patching.activation_patch`.
        checkpoint: As in :func:`tl_loops.patching.activation_patch`; a batch is ``batch_size``
            senders with all receivers.
        shard: As in :func:`tl_loops.patching.activation_patch`, for these batches.
        **forward_arguments: As in :func:`tl_loops.patching.activation_patch`.

    Returns:
        One row a sender, one column a receiver.

    Raises:
        ValueError: As :func:`tl_loops.patching.activation_patch`; or no senders or receivers.
        IndexError: A coordinate is out of range.
        CheckpointError: As :func:`tl_loops.patching.activation_patch`.

    Source: 2304.05969 (definition, with MLPs fixed); 2211.00593, section 3.1 (with MLPs run).
    """
    split = Split(shard, checkpoint)
    given = (batch_size, forward_arguments, gradients, split, logits_at)
    run = start_run(model, corrupted_tokens, metric, *given)
    for sites in receivers:
        if isinstance(sites, str) and sites != "logits":
            raise ValueError(f"a receiver is a Site, a list of them, or 'logits', got {sites!r}")
    if not len(senders) or not len(receivers):
        raise ValueError("path patching needs at least one sender and one receiver")
    frozen = [find_activation(model, name) for name in freeze]
    for activation in frozen:
        if activation.kind != "stream":
            raise ValueError(
                f"freeze names outputs of a block such as 'attn_out' or 'mlp_out', got "
                f"{activation.name!r}"
            )
    n_pos = run.n_pos
    sending = [[site.grid(model, n_pos) for site in group(sites)] for sites in senders]
    receiving = [
        [] if isinstance(sites, str) else [site.grid(model, n_pos) for site in group(sites)]
        for sites in receivers
    ]
    direct = [column for column, sites in enumerate(receivers) if isinstance(sites, str)]
    check_cache(clean_cache, model, [n for grids in sending for grid in grids for n in grid.names])
    sent = [
        [(grid, take_all(model, grid, clean_cache, run.shape)) for grid in grids]
        for grids in sending
    ]
    clean = [[_clean_edits(grid, values, n_pos) for grid, values in part] for part in sent]

    starts = [min(run.stage(n) for grid in grids for n in grid.names) for grids in sending]
    held: dict[str, Tensor] = {}
    names = [a.hook_name(i) for i in range(min(starts), model.cfg.n_layers) for a in frozen]
    touched = [n for grids in sending + receiving for grid in grids for n in grid.names]
    seen = SeenKeys()
    observe = {name: partial(held.__setitem__, name) for name in names}
    run.execute(touched, {**observe, **seen.watch(model, touched)})
    for grid, values in (one for part in sent for one in part):
        seen.check(grid.regions, values)

    # Senders go in groups, since what reaches the receivers is kept until it has been used.
    size = run.automatic_batch_size() if batch_size is None else batch_size
    members = [range(len(senders))[i : i + size] for i in range(0, len(senders), size)]
    found: dict[int, Tensor] = {}

    def compute(number: int) -> Batch:
        cells: list[Cell] = []
        reached: list[tuple[dict[str, Tensor], int]] = []
        for k in members[number]:
            edits = [edit for part in clean[k] for edit in part]
            got: dict[str, Tensor] = {}
            for name in dict.fromkeys(n for grids in receiving for g in grids for n in g.names):
                if run.stage(name) >= starts[k]:
                    edits.append((name, partial(_note, got, name)))
            edits += _freezing(run, frozen, held, sending[k], starts[k])
            first_pos = min(grid.regions[0].first_pos for grid in sending[k])
            cells.append(Cell(edits, first_pos))
            reached.append((got, first_pos))
        score: Score = logits_score(metric) if direct else lambda output: 0.0
        told = run.score(cells, score, batch_size, keep_graph=True)
        cells = [
            _receiver_cell(grids, got, first_pos, n_pos)
            for got, first_pos in reached
            for grids in receiving
        ]
        scores = run.score(cells, logits_score(metric), batch_size)
        scores = scores.reshape(len(reached), len(receivers))
        if direct:
            column = torch.tensor(direct, device=scores.device)
            scores = scores.index_copy(1, column, told[:, None].expand(-1, len(direct)))
        return {"scores": scores}

    def take(number: int, batch: Batch) -> None:
        found[number] = batch["scores"].to(run.tokens.device)

    def identify() -> dict[str, Any]:
        put_in = {
            f"{k} {n}": x for k, part in enumerate(sent) for _, v in part for n, x in v.items()
        }
        places = [
            [[repr(grid.regions) for grid in grids] for grids in sides]
            for sides in (sending, receiving)
        ]
        what = {"places": places, "direct": direct, "freeze": list(freeze), "batch_size": size}
        return identify_cells(run, metric, put_in, **what)

    units = Run("path patch", [len(batch) for batch in members], identify, unit="sender")
    run_in_batches(units, compute, take, split, progress)
    nothing = torch.full((len(senders), len(receivers)), torch.nan, device=run.tokens.device)
    elsewhere = nothing.to(next(iter(found.values()), nothing).dtype)
    parts = [found.get(n, elsewhere[batch.start : batch.stop]) for n, batch in enumerate(members)]
    return torch.cat(parts)


def _clean_edits(grid: Grid, values: Mapping[str, Tensor], n_pos: int) -> list[tuple[str, Edit]]:
    (region,) = grid.regions
    return [
        (name, replace(grid.activation, values[name], pos, head, src, n_pos))
        for name in region.names
        for pos, head, src in region.parts()
    ]


def _note(got: dict[str, Tensor], name: str, rows: Tensor) -> None:
    got[name] = rows.clone()


def _freezing(
    run: BaseRun,
    frozen: Sequence[Activation],
    held: dict[str, Tensor],
    sender: Sequence[Grid],
    start: int,
) -> list[tuple[str, Edit]]:
    """Edits that hold outputs from the sender on, but for the one that the sender is part of."""
    own = {_output_of(name) for grid in sender for name in grid.names}
    edits = []
    for block in range(start, run.cfg.n_layers):
        for activation in frozen:
            name = activation.hook_name(block)
            if name not in own:
                everywhere = slice(0, run.n_pos)
                edit = replace(activation, held[name], everywhere, None, None, run.n_pos)
                edits.append((name, edit))
    return edits


def _output_of(name: str) -> str:
    """The block output that an activation is part of, or the name itself."""
    kind, _, rest = name.partition(".")
    if kind != "blocks":
        return name
    block, _, part = rest.partition(".")
    if part.startswith(("attn.", "ln1", "hook_attn_in", "hook_q_in", "hook_k_in", "hook_v_in")):
        return f"blocks.{block}.hook_attn_out"
    if part.startswith(("mlp.", "ln2", "hook_mlp_in")):
        return f"blocks.{block}.hook_mlp_out"
    return name


def _receiver_cell(
    receiver: Sequence[Grid], got: dict[str, Tensor], first_pos: int, n_pos: int
) -> Cell:
    """A corrupted run whose receiver gets what reached it."""
    edits: list[tuple[str, Edit]] = []
    first = n_pos - 1
    for grid in receiver:
        (region,) = grid.regions
        for name in region.names:
            if name not in got:
                continue
            for pos, head, src in region.parts():
                edits.append((name, replace(grid.activation, got[name], pos, head, src, n_pos)))
            first = min(first, max(first_pos, region.first_pos))
    return Cell(edits, first)
