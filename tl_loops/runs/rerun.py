"""Many edited runs of one prompt: the prefix that an edit cannot change is computed once.

A cell is one edited run. Its numbers are those of a full forward pass with hooks. What makes it
cheap: the base run is kept at every block where some cell begins, so that a cell starts there;
cells share forward passes along the batch axis and join as their block comes; and on causal models
the positions before the first edited one keep the base run's keys and values and are not run.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tl_loops.layout.model import Model
from tl_loops.layout.of_model import layout_of
from tl_loops.runs.cells import (
    Cell,
    CellOutput,
    Edit,
    Score,
    after_prefix,
    empty_past,
    hooked,
    nothing,
    scalar,
    show_to,
)
from tl_loops.runs.in_batches import PLAIN, Batch, Run, Split, run_in_batches
from tl_loops.runs.inputs import RunInputs
from tl_loops.runs.read_positions import ReadPositions
from tl_loops.runs.stages import crossing_block, stage_of
from tl_loops.upstream import (
    KeyValueCache,
    KeyValueCacheEntry,
    can_restart,
    has_hooks,
)

_POSITION_GROUPS = 4
_MEMORY = 512 * 2**20
_TOKENS = 4096


class BaseRun:
    """The run that all cells start from, and the machinery that runs cells.

    A model that carries hooks of its own is run from the start for each cell, one cell at a time,
    since such a hook may do anything; an early exit, a bridge or a model spread over devices is run
    from the start, too.

    Args:
        model: A looped model or a plain HookedTransformer.
        inputs: Prompts and forward arguments of every run.
        read: Hook points between iterations whose values :class:`CellOutput` carries.
        gradients: Whether what the runs give carries gradients where they are enabled. Otherwise
            no run keeps a graph.
        logits_at: Where logits are read.
    """

    def __init__(
        self,
        model: Model,
        inputs: RunInputs,
        read: Sequence[str] = (),
        gradients: bool = False,
        logits_at: ReadPositions | None = None,
    ):
        self.logits_at = logits_at or ReadPositions()
        self.model, self.cfg, self.layout = model, model.cfg, layout_of(model)
        self.inputs, self.tokens, self.read = inputs, inputs.tokens, tuple(read)
        self.batch, self.n_pos = self.shape = inputs.shape
        # Explicit also where the model would find it, since a restart sees no tokens.
        given = inputs.attention_mask
        self.mask = None if given is None else given.long()
        self.initial_state = inputs.initial_state
        self.exit_arguments = dict(inputs.exits)
        self.gradients = gradients and torch.is_grad_enabled()

        cfg = self.cfg
        exits = bool(self.exit_arguments) or any(
            getattr(cfg, name, None) is not None for name in ("exit_step", "exit_threshold")
        )
        self.has_own_hooks = any(has_hooks(point) for point in model.hook_dict.values())
        known_positions = cfg.positional_embedding_type in ("rotary", "standard")
        self.restarts = can_restart(model) and not (
            self.has_own_hooks
            or exits
            or not getattr(cfg, "state_is_whole", True)
            # A cell would also have to carry the other stack's state along.
            or getattr(cfg, "stacks", None) is not None
            or getattr(cfg, "n_devices", 1) > 1
            or cfg.positional_embedding_type == "shortformer"
        )
        self.truncates = (
            self.restarts
            and cfg.attention_dir == "causal"
            and known_positions
            and not cfg.use_local_attn
        )
        self.injects = "hook_injection" in model.hook_dict
        self.crossing = crossing_block(self.layout)
        self.entry: dict[int, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.past: KeyValueCache | None = None
        self.logits: Tensor | None = None

    def stage(self, name: str) -> int:
        """The block at which a run must start, at the latest, so that a hook point fires."""
        return stage_of(name, self.layout, self.cfg.n_layers)

    def start_of(self, cell: Cell) -> int:
        """The block at which a cell leaves the base run."""
        if not self.restarts:
            return 0
        return min((self.stage(name) for name, _ in cell.edits), default=self.cfg.n_layers - 1)

    # The base run.

    def execute(
        self,
        names: Iterable[str],
        observe: Mapping[str, Callable[[Tensor], None]] | None = None,
        explicit: Iterable[str] = (),
    ) -> Float[Tensor, "batch read d_vocab"]:
        """Run the prompt without edits and keep what the cells start from.

        Args:
            names: Hook points that cells will edit.
            observe: Functions that are shown activations on the way, by hook name.
            explicit: Hook points of attention scores or patterns that are made to fire, so that
                attention there is not fused.

        Returns:
            The logits, at the positions that are read.
        """
        hooks: list[tuple[str, Callable]] = []

        def keep(store: dict, key: Any, value: Tensor, hook: Any) -> None:
            store[key] = value

        if self.restarts:
            for block in sorted({self.stage(name) for name in names} - {0}):
                point = f"blocks.{block}.hook_resid_pre"
                hooks.append((point, partial(keep, self.entry, block)))
        drawn = self._draws_state()
        kept = [*self.read, *(["hook_injection"] if self.injects and self.restarts else [])]
        kept += ["hook_initial_state"] if drawn else []
        hooks += [(name, partial(keep, self.values, name)) for name in kept]
        for name, show in (observe or {}).items():
            hooks.append((name, partial(show_to, show)))
        hooks += [(name, nothing) for name in explicit if name in self.model.hook_dict]

        arguments = self._arguments(1, 0, 0)
        if self.truncates:
            self.past = arguments["past_kv_cache"] = empty_past(self.model, self.tokens)
            if arguments.get("attention_mask") is None:
                arguments["attention_mask"] = torch.ones_like(self.tokens)
        with torch.set_grad_enabled(self.gradients), hooked(self.model, hooks):
            call = partial(self.model, self.tokens, **arguments)
            self.logits = self.logits_at.run(self.model, call)
        if drawn:  # All cells share the draw of the base run.
            self.initial_state = self.values["hook_initial_state"]
        assert self.logits is not None
        return self.logits

    def _draws_state(self) -> bool:
        """Whether each run would draw an initial state of its own."""
        cfg = self.cfg
        normal = self.layout is not None and cfg.initial_state == "normal"
        return normal and cfg.state_seed is None and self.initial_state is None

    def repeated(
        self, n: int, hooks: Sequence[tuple[str, Callable]], prompts: slice = slice(None)
    ) -> Float[Tensor, "rows pos d_vocab"]:
        """Some prompts n times along the batch axis, in one whole run with hooks on all rows.

        Returns:
            The logits; those of prompt k of N are at rows k, N + k, 2 N + k, ...
        """
        arguments = dict(self.exit_arguments)
        for name, value in (("attention_mask", self.mask), ("initial_state", self.initial_state)):
            if value is not None:
                arguments[name] = self._rows(value[prompts], n)
        with torch.set_grad_enabled(self.gradients), hooked(self.model, hooks):
            return self.model(self._rows(self.tokens[prompts], n), **arguments)

    # Cells.

    def score(
        self,
        cells: Sequence[Cell],
        score: Score,
        batch_size: int | None = None,
        progress: bool = False,
        description: str = "cells",
        *,
        keep_graph: bool = False,
        split: Split = PLAIN,
        identify: Callable[[], Mapping[str, Any]] = dict,
    ) -> Float[Tensor, "cell"]:
        """Run cells and score each.

        Args:
            cells: What to run; one without edits costs nothing.
            score: Maps a cell's output to a scalar.
            batch_size: Cells in one forward pass; ``None``: as many as fit in half a gigabyte.
            progress: Show a progress bar.
            description: Its text, and the kind of run in a file.
            keep_graph: With gradients, keep what the backward pass needs. Otherwise the runs are
                repeated in the backward pass, so that memory stays bounded by ``batch_size``
                there, too.
            split: Which batches of cells are run here, and the file that keeps what is done.
            identify: Gives what decides the scores, besides the batches.

        Returns:
            One number per cell, in float32 (float64 where ``score`` gives float64); NaN for cells
            of other shards.
        """
        assert self.logits is not None
        results: list[Tensor | None] = [None] * len(cells)
        plan = self._plan(cells, batch_size)
        unedited = [i for i, cell in enumerate(cells) if not cell.edits]

        def compute(number: int) -> dict[str, Tensor]:
            run = partial(self._score_batch, [cells[i] for i in plan[number]], score)
            repeat = self.gradients and not keep_graph
            return {"scores": checkpoint(run, use_reentrant=False) if repeat else run()}

        def take(number: int, batch: Batch) -> None:
            scores = batch["scores"].to(self.tokens.device)
            for i, value in zip(plan[number], scores.unbind(), strict=True):
                results[i] = value

        with torch.set_grad_enabled(self.gradients):
            if unedited:
                base = CellOutput(self.logits, {name: self.values[name] for name in self.read})
                value = scalar(score(base), self.logits)
                for i in unedited:
                    results[i] = value
            sizes = [len(batch) for batch in plan]
            run = Run(description, sizes, lambda: {**identify(), "cells": plan}, unit="cell")
            run_in_batches(run, compute, take, split, progress)
            known = [value for value in results if value is not None]
            elsewhere = torch.full_like(known[0] if known else scalar(0.0, self.logits), torch.nan)
            return torch.stack([elsewhere if value is None else value for value in results])

    def automatic_batch_size(self) -> int:
        """Cells in one forward pass so that its tensors take about half a gigabyte."""
        cfg = self.cfg
        width = 12 * cfg.d_model + 4 * (cfg.d_mlp or 0) + 3 * cfg.n_heads * self.n_pos
        vocabulary = 3 * max(cfg.d_vocab_out, cfg.d_vocab) * self.logits_at.n_read(self.n_pos)
        tokens, size = self.batch * self.n_pos, self.batch * (self.n_pos * width + vocabulary)
        return max(1, min(_MEMORY // (4 * size), _TOKENS // tokens))

    def _plan(self, cells: Sequence[Cell], batch_size: int | None) -> list[list[int]]:
        """Which cells share a forward pass: neighbours in position first, then in depth."""
        size = self.automatic_batch_size() if batch_size is None else batch_size
        size = 1 if self.has_own_hooks else size

        def key(i: int) -> tuple[int, int, int]:
            group = cells[i].first_pos * _POSITION_GROUPS // self.n_pos if self.truncates else 0
            return group, self.start_of(cells[i]), cells[i].first_pos

        order = sorted((i for i, cell in enumerate(cells) if cell.edits), key=key)
        batches: list[list[int]] = []
        for i in order:
            if batches and len(batches[-1]) < size and key(batches[-1][0])[0] == key(i)[0]:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def _score_batch(self, cells: list[Cell], score: Score) -> Float[Tensor, "cell"]:
        assert self.logits is not None
        n_past = min(cell.first_pos for cell in cells) if self.truncates else 0
        n_past = min(n_past, self.n_pos - 1)
        logits, read = self._run(cells, n_past)
        scores = []
        for k in range(len(cells)):
            rows = slice(k * self.batch, (k + 1) * self.batch)
            values = {}
            for name in self.read:
                base = self.values[name]
                late = read[name].shape[0] <= rows.start  # The cell joined after that point.
                values[name] = base if late else after_prefix(base, n_past, read[name][rows])
            output = CellOutput(self.logits_at.whole(self.logits, n_past, logits[rows]), values)
            scores.append(scalar(score(output), logits))
        return torch.stack(scores)

    def _run(self, cells: list[Cell], n_past: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Run cells (in order of their starts) together, each from its start on."""
        starts = [self.start_of(cell) for cell in cells]
        joins = sorted(set(starts))
        read: dict[str, Tensor] = {n: self.values[n][:0] for n in self.read}
        x: Tensor | None = None
        e: Tensor | None = None
        for k, start in enumerate(joins):
            stop = joins[k + 1] if k + 1 < len(joins) else None
            joining, n_cells = starts.count(start), sum(s <= start for s in starts)
            if start == 0:
                source = self._rows(self.tokens[:, n_past:], n_cells)
            else:
                new = self._rows(self.entry[start][:, n_past:], joining)
                source = new if x is None else torch.cat([x, new])
                if self.injects and start > self.crossing:
                    new_e = self._rows(self.values["hook_injection"][:, n_past:], joining)
                    e = new_e if e is None else torch.cat([e, new_e])
            arguments = self._arguments(n_cells, n_past, start, stop)
            if start > self.crossing and self.injects:
                arguments["injection"] = e
            found: dict[str, Tensor] = {}
            with hooked(self.model, self._hooks(cells[:n_cells], start, stop, found)):
                call = partial(self.model, source, **arguments)
                x = self.logits_at.run(self.model, call, n_cells, n_past)
            e = found.get("hook_injection", e)
            read |= {name: found[name] for name in self.read if name in found}
        assert x is not None
        return x, read

    def _hooks(
        self, cells: list[Cell], start: int, stop: int | None, found: dict[str, Tensor]
    ) -> list[tuple[str, Callable]]:
        """Hooks that edit each cell's rows and keep what is read, for blocks start to stop."""
        end = self.cfg.n_layers if stop is None else stop
        jobs: dict[str, list[tuple[slice, Edit]]] = defaultdict(list)
        for k, cell in enumerate(cells):
            for name, edit in cell.edits:
                if not self.restarts or start <= self.stage(name) < end:
                    jobs[name].append((slice(k * self.batch, (k + 1) * self.batch), edit))
        keeps = [name for name in self.read if not self.restarts or start <= self.stage(name) < end]
        if self.injects and self.restarts and start <= self.crossing < end:
            keeps.append("hook_injection")
        for name in keeps:
            jobs.setdefault(name, [])

        def apply(name: str, keep: bool, value: Tensor, hook: Any) -> Tensor | None:
            if jobs[name]:
                value = value.clone()
                for rows, edit in jobs[name]:
                    edit(value[rows])
            if keep:
                found[name] = value
            return value if jobs[name] else None

        return [(name, partial(apply, name, name in keeps)) for name in jobs]

    def _arguments(
        self, n_cells: int, n_past: int, start: int, stop: int | None = None
    ) -> dict[str, Any]:
        """The arguments of one forward pass over the blocks from start to stop."""
        arguments: dict[str, Any] = dict(self.exit_arguments)
        if start > 0:
            arguments["start_at_layer"] = start
        if stop is not None:
            arguments["stop_at_layer"] = stop
        if self.mask is not None:
            # From tokens a key-value cache adds its own mask in front; a restart takes the whole.
            shown = self.mask[:, n_past:] if start == 0 else self.mask
            arguments["attention_mask"] = self._rows(shown, n_cells)
        elif n_past and start == 0:
            new = torch.ones_like(self.tokens[:, n_past:])
            arguments["attention_mask"] = self._rows(new, n_cells)
        if start > 0 and getattr(self.cfg, "value_embeddings", False):
            arguments["tokens"] = self._rows(self.tokens[:, n_past:], n_cells)
        if self.initial_state is not None and start <= self.crossing:
            arguments["initial_state"] = self._rows(self.initial_state[:, n_past:], n_cells)
        if n_past:
            arguments["past_kv_cache"] = self._past(n_cells, n_past, start, stop)
        return arguments

    def _past(self, n_cells: int, n_past: int, start: int, stop: int | None) -> KeyValueCache:
        """The base run's keys and values at the first positions, one row per cell and prompt."""
        assert self.past is not None
        end = self.cfg.n_layers if stop is None else stop
        entries = []
        for index, entry in enumerate(self.past.entries):
            keys, values = entry.past_keys[:, :n_past], entry.past_values[:, :n_past]
            if start <= index < end:
                keys, values = self._rows(keys, n_cells), self._rows(values, n_cells)
            entries.append(KeyValueCacheEntry(keys, values, frozen=True))
        mask = torch.ones_like(self.tokens) if self.mask is None else self.mask
        return KeyValueCache(entries, self._rows(mask[:, :n_past], n_cells), frozen=True)

    def _rows(self, value: Tensor, n_cells: int) -> Tensor:
        """The base run's rows, once for each cell."""
        if n_cells == 1:
            return value
        repeated = value.unsqueeze(0).expand(n_cells, *value.shape)
        return repeated.reshape(n_cells * value.shape[0], *value.shape[1:])
