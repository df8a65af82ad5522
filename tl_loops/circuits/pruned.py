"""Running a pruned graph: edges that are left out carry the rest, all in one batched pass."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_loops.attribution.components import Component
from tl_loops.circuits.circuit import Circuit
from tl_loops.circuits.graph import EdgeGraph
from tl_loops.circuits.rows import CircuitRows
from tl_loops.layout.model import Model
from tl_loops.runs.activations import find_activation
from tl_loops.runs.cells import scalar
from tl_loops.runs.identity import tensors_fingerprint
from tl_loops.runs.in_batches import PLAIN, Batch, Run, Split, run_in_batches
from tl_loops.runs.removal import MeanOver, check_removal, removal_values
from tl_loops.runs.rerun import BaseRun
from tl_loops.runs.scoring import Metric, identify_cells, start_run
from tl_loops.upstream import Cache, TextOrTokens


class PrunedRuns:
    """Runs of a model in which some edges carry the rest instead of what their sender makes.

    Each component reads the stream that results when every sender with an edge to it adds what it
    makes in this run, and every other sender what it is replaced by; norms, injection and whatever
    else lies on the stream are run on that. One pass does this exactly: every set of edges that
    some component has is a row of the batch, and at a sender's hook point its output is copied from
    the row that makes it to the rows that see it.

    Args:
        model: A looped model.
        graph: Of the circuits that will be run.
        tokens: [batch, pos], or text.
        metric: Maps the logits [batch, pos, d_vocab] of one circuit to a scalar.
        rest: One of :data:`tl_loops.runs.removal.Removal`.
        reference: Cache of the reference prompts.
        mean_over: ``"batch"`` or ``"batch_pos"``.
        seed: Of the draw of ``"resample"``.
        batch_size: Rows in one forward pass; ``None``: chosen.
        arguments: Forward arguments of every run.
        split: How the runs will be cut and kept, to be checked before anything is run.

    Raises:
        CheckpointError: They can be neither resumed nor cut into shards.
        ValueError: One of these does not fit, or the model carries hooks of its own.
    """

    def __init__(
        self,
        model: Model,
        graph: EdgeGraph,
        tokens: TextOrTokens,
        metric: Metric,
        rest: str,
        reference: Cache | None,
        mean_over: MeanOver = "batch",
        seed: int = 0,
        batch_size: int | None = None,
        arguments: Mapping[str, Any] | None = None,
        split: Split = PLAIN,
    ):
        check_removal("rest", rest, reference)
        self.run = start_run(model, tokens, metric, batch_size, arguments or {}, split=split)
        _check_fits(model, graph, self.run)
        self.graph, self.metric = graph, metric
        self.rest = rest_values(model, graph, rest, reference, self.run.shape, mean_over, seed)
        automatic = self.run.automatic_batch_size() * self.run.batch
        self.batch_size = automatic if batch_size is None else batch_size
        self.full = float(scalar(metric(self.run.execute([])), self.run.tokens.float()))

    def metrics(
        self,
        circuits: Sequence[Circuit],
        progress: bool = False,
        description: str = "circuits",
        split: Split = PLAIN,
    ) -> Float[Tensor, "circuit"]:
        """The metric of each circuit's run; NaN for those of another shard.

        Raises:
            ValueError: A circuit is of another graph.
            CheckpointError: The file is damaged or of another run.
        """
        for circuit in circuits:
            if circuit.graph != self.graph:
                raise ValueError("the circuits are of different graphs: score them in one way")
        rows = [CircuitRows.of(circuit) for circuit in circuits]
        plan = list(self._plan([r.n_rows for r in rows]))
        values = [torch.full((), torch.nan)] * len(circuits)

        def compute(number: int) -> Batch:
            first, stop, size = plan[number]
            parts = [
                self._logits(rows[first:stop], slice(start, start + size))
                for start in range(0, self.run.batch, size)
            ]
            scores = [scalar(self.metric(logits), logits) for logits in torch.cat(parts, dim=1)]
            return {"metrics": torch.stack(scores)}

        def take(number: int, batch: Batch) -> None:
            first, stop, _ = plan[number]
            values[first:stop] = batch["metrics"].to(self.run.tokens.device)

        def identify() -> dict[str, Any]:
            kept = tensors_fingerprint([circuit.kept for circuit in circuits])
            labels = [c.label for c in (*self.graph.senders, *self.graph.receivers)]
            return identify_cells(
                self.run, self.metric, self.rest, circuits=kept, nodes=labels, passes=plan
            )

        run = Run(description, [stop - first for first, stop, _ in plan], identify, unit="circuit")
        with torch.no_grad():
            run_in_batches(run, compute, take, split, progress)
        return (
            torch.stack([v.to(self.run.tokens.device) for v in values])
            if values
            else torch.zeros(0)
        )

    def _plan(self, n_rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Circuits that share a pass, first and past the last, and how many prompts it takes."""
        first, batch = 0, self.run.batch
        while first < len(n_rows):
            stop, total = first + 1, n_rows[first]
            while stop < len(n_rows) and (total + n_rows[stop]) * batch <= self.batch_size:
                total += n_rows[stop]
                stop += 1
            yield first, stop, min(batch, max(1, self.batch_size // total))
            first = stop

    def _logits(
        self, circuits: Sequence[CircuitRows], prompts: slice
    ) -> Float[Tensor, "circuit batch pos d_vocab"]:
        """The logits of circuits that share a pass, on some prompts."""
        starts = [0]
        for rows in circuits:
            starts.append(starts[-1] + rows.n_rows)
        pass_ = _Pass(
            torch.cat([rows.sees for rows in circuits]),
            torch.cat(
                [
                    (rows.row_of + start).expand(rows.n_rows, -1)
                    for rows, start in zip(circuits, starts, strict=False)
                ]
            ),
        )
        logits = self.run.repeated(starts[-1], self._hooks(pass_, prompts), prompts)
        logits = logits.unflatten(0, (starts[-1], -1))
        return logits[pass_.row_of[starts[:-1], -1].to(logits.device)]

    def _hooks(self, pass_: "_Pass", prompts: slice) -> list[tuple[str, Callable]]:
        graph = self.graph
        hooks: list[tuple[str, Callable]] = []
        for name, places in _by_name(graph.receivers).items():
            if graph.receivers[places[0]].kind in ("query", "key", "value"):
                hooks.append((name, partial(_gather, pass_.row_of[:, places])))
        # Where a sender is one with a receiver, the row of the latter makes its output.
        made_by = {c.label: r for r, c in enumerate(graph.receivers)}
        own = torch.arange(pass_.sees.shape[0])
        for name, places in _by_name(graph.senders).items():
            labels = [graph.senders[s].label for s in places]
            source = torch.stack(
                [pass_.row_of[:, made_by[label]] if label in made_by else own for label in labels],
                dim=1,
            )
            rest = self.rest[name]
            rest = rest[prompts] if rest.shape[0] == self.run.batch else rest
            heads = graph.senders[places[0]].kind == "head"
            write = _write_heads if heads else _write
            hooks.append((name, partial(write, source, pass_.sees[:, places], rest)))
        return hooks


@dataclass(frozen=True, eq=False)
class _Pass:
    """The rows of circuits that are run together.

    Attributes:
        sees: As :class:`CircuitRows`, for all rows.
        row_of: The row that a receiver of the row's circuit reads, [row, receiver].
    """

    sees: Bool[Tensor, "row sender"]
    row_of: Int[Tensor, "row receiver"]


def _gather(row_of: Tensor, value: Tensor, hook: Any) -> Tensor:
    """Queries (or keys, or values): each head's from the row that it reads."""
    shaped = value.unflatten(0, (row_of.shape[0], -1))
    return _heads_of(shaped, row_of).flatten(0, 1)


def _write(source: Tensor, sees: Tensor, rest: Tensor, value: Tensor, hook: Any) -> Tensor:
    """A whole output: its own to the rows that see it, the rest to the others."""
    n_rows = sees.shape[0]
    shaped = value.unflatten(0, (n_rows, -1))
    made = shaped[source[:, 0].to(value.device)]
    kept = sees.reshape(n_rows, 1, 1, 1).to(value.device)
    return torch.where(kept, made, rest.to(value)).flatten(0, 1)


def _write_heads(source: Tensor, sees: Tensor, rest: Tensor, value: Tensor, hook: Any) -> Tensor:
    """As :func:`_write`, for every head of a layer."""
    shaped = value.unflatten(0, (sees.shape[0], -1))
    kept = sees[:, None, None, :, None].to(value.device)
    return torch.where(kept, _heads_of(shaped, source), rest.to(value)).flatten(0, 1)


def _heads_of(
    shaped: Float[Tensor, "row batch pos head d_head"], row: Int[Tensor, "row head"]
) -> Float[Tensor, "row batch pos head d_head"]:
    """Each head from a row of its own."""
    row = row.to(shaped.device)
    heads = torch.arange(shaped.shape[3], device=shaped.device)
    return shaped[row, :, :, heads].movedim(1, 3)


def _by_name(components: Sequence[Component]) -> dict[str, list[int]]:
    """Places of components by hook name, in order."""
    found: dict[str, list[int]] = {}
    for place, component in enumerate(components):
        if component.name:
            found.setdefault(component.name, []).append(place)
    return found


def rest_values(
    model: Model,
    graph: EdgeGraph,
    rest: str,
    reference: Cache | None,
    shape: tuple[int, int],
    mean_over: MeanOver = "batch",
    seed: int = 0,
) -> dict[str, Tensor]:
    """What each sender is replaced by, by hook name; batch axis 1 or that of the prompts.

    Raises:
        ValueError: The reference lacks an activation or does not fit.
    """
    values: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    for name in _by_name(graph.senders):
        names.setdefault(name.rsplit("hook_", 1)[-1], []).append(name)
    for short, of_kind in names.items():
        activation = find_activation(model, short)
        values |= removal_values(
            model, activation, of_kind, rest, reference, shape, mean_over, seed
        )
    return values


def _check_fits(model: Model, graph: EdgeGraph, run: BaseRun) -> None:
    """Check that the graph is of the model, and that no hook of its own sees rows of receivers.

    Raises:
        ValueError: One of these.
    """
    if run.has_own_hooks:
        raise ValueError(
            "the model carries hooks of its own, which would act on every copy of the stream that "
            "a circuit needs: remove them (model.reset_hooks())"
        )
    layout = run.layout
    names = set(model.hook_dict)
    missing = [c.name for c in graph.senders if c.name not in names]
    depth = max((c.block for c in graph.senders if c.block is not None), default=-1) + 1
    if missing or layout is None or depth != layout.n_layers:
        here = model.cfg.n_layers
        raise ValueError(
            f"the circuit's graph has {depth} blocks in {graph.n_iterations} iterations, but the "
            f"model has {here} blocks: run it inside `with model.iterations({graph.n_iterations})`"
        )
