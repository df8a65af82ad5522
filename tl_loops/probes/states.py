"""One activation at one position of each prompt, at every iteration and layer: what probes read."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.layout.model import Model
from tl_loops.layout.names import spec_of
from tl_loops.layout.of_model import layout_of, with_iterations
from tl_loops.layout.selection import Selection, distinct_indices, one_index
from tl_loops.metrics.padding import statistic_dtype
from tl_loops.printing import prints_short
from tl_loops.probes.results import SavedResult
from tl_loops.runs.activations import find_activation
from tl_loops.runs.batches import check_batch_size, equal_batches, token_prompts
from tl_loops.runs.cells import hooked, named_hooks
from tl_loops.runs.identity import identity_of, prompts_fingerprint
from tl_loops.runs.in_batches import Batch, Run, Split, run_in_batches
from tl_loops.runs.shards import Shards
from tl_loops.upstream import Prompts, left_as_it_was

Phase = Literal["prelude", "core", "coda", "all"]


@prints_short
@dataclass(frozen=True, eq=False)
class PromptStates(SavedResult):
    """One activation at one position of each prompt, at every place of a grid.

    Attributes:
        values: [iteration, layer, prompt, width], on the CPU; float32, or float64 for a float64
            model. Heads stand side by side in the width.
        activation: Which, such as ``"resid_post"`` or ``"state_out"``.
        iterations: Number of each iteration; (0,) for what is passed once.
        layers: Number of each layer; (0,) for points between iterations.
        points: Short label of each place, iteration by iteration, such as ``"r3.1"`` or ``"t3"``.
        prompts: Which of the given prompts these are: all, but for one shard of several.

    Raises:
        ValueError: The shapes do not agree.
    """

    _kind = "prompt_states"

    values: Float[Tensor, "iteration layer prompt width"]
    activation: str
    iterations: tuple[int, ...]
    layers: tuple[int, ...]
    points: tuple[str, ...]
    prompts: tuple[int, ...]

    def __post_init__(self) -> None:
        grid = len(self.iterations), len(self.layers)
        if self.values.ndim != 4 or self.values.shape[:3] != (*grid, len(self.prompts)):
            raise ValueError(
                f"values must be [iteration, layer, prompt, width] = [{grid[0]}, {grid[1]}, "
                f"{len(self.prompts)}, ...], got {list(self.values.shape)}"
            )
        if len(self.points) != grid[0] * grid[1]:
            raise ValueError(f"{len(self.points)} points for a grid of {grid[0]} x {grid[1]}")

    @classmethod
    @checked
    def of(
        cls, values: Float[Tensor, "iteration layer prompt width"], activation: str = "state"
    ) -> "PromptStates":
        """States that come from elsewhere, with places counted from 0.

        Args:
            values: [iteration, layer, prompt, width].
            activation: What they are.
        """
        T, L, n = values.shape[:3]
        points = tuple(f"r{t}.{layer}" for t in range(T) for layer in range(L))
        return cls(values, activation, tuple(range(T)), tuple(range(L)), points, tuple(range(n)))

    @checked
    def label(self, iteration: int, layer: int) -> str:
        """Label of the place in a row and a column of the grid.

        Raises:
            IndexError: There is no such place.
        """
        row = one_index("row of the grid", iteration, len(self.iterations))
        return self.points[row * len(self.layers) + one_index("column", layer, len(self.layers))]

    @checked
    def rows(self, prompts: Selection) -> "PromptStates":
        """The same for some of the prompts.

        Raises:
            IndexError: There is no such prompt.
            ValueError: No prompt is chosen, or one twice.
        """
        chosen = list(distinct_indices("prompt", len(self.prompts), prompts))
        kept = tuple(self.prompts[i] for i in chosen)
        return replace(self, values=self.values[:, :, chosen], prompts=kept)

    def check_like(self, other: "PromptStates", names: tuple[str, str]) -> None:
        """Raise where other states are of other places.

        Raises:
            ValueError: The message says what differs.
        """
        for name in ("activation", "iterations", "layers", "points"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"{names[0]} has {name} {mine}, but {names[1]} has {theirs}")
        if self.values.shape[-1] != other.values.shape[-1]:
            raise ValueError(
                f"{names[0]} is {self.values.shape[-1]} wide, but {names[1]} "
                f"{other.values.shape[-1]}"
            )


@dataclass(frozen=True)
class _Grid:
    """Hook names of the places, row by row."""

    names: tuple[str, ...]
    iterations: tuple[int, ...]
    layers: tuple[int, ...]
    labels: tuple[str, ...]


@checked
@left_as_it_was
@torch.no_grad()
def gather_states(
    model: Model,
    prompts: Prompts,
    activation: str = "resid_post",
    *,
    positions: int | Sequence[int] | Literal["last"] = "last",
    iterations: Selection | None = None,
    layers: Selection | None = None,
    phase: Phase | None = None,
    n_iterations: int | None = None,
    batch_size: int = 32,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
) -> PromptStates:
    """Run the model over prompts and keep one activation at one position of each.

    Prompts of equal length are run together, so that nothing is padded. What is kept takes 4 bytes
    for each prompt, place and dimension.

    Args:
        model: A looped model or a plain HookedTransformer.
        prompts: Strings, or lists or 1-D tensors of token ids, each at its own length.
        activation: What is kept: ``"resid_post"`` or anything else with positions in every block
            (``"attn_out"``, ``"mlp_out"``, ``"z"``), between iterations (``"state_in"``,
            ``"injected"``, ``"state_out"``), or once in a run (``"embed"``, ``"injection"``).
        positions: ``"last"``: the last token of each prompt; an index for all of them; or one for
            each. Counted along the prompt's own tokens, with BOS where the model prepends it;
            negative ones from its end.
        iterations: Some of the iterations; ``None``: all.
        layers: Some of the layers of the phase; ``None``: all.
        phase: Of which blocks: ``"core"`` (the default for a looped model), ``"prelude"``,
            ``"coda"``, or ``"all"`` unrolled blocks as the layers of one pass (the only one for a
            model without a loop).
        n_iterations: Number of iterations for this run.
        batch_size: Prompts in one pass at most.
        progress: Whether to show a progress bar.
        checkpoint: A file to which every batch is added once it is done; the same call goes on from
            it.
        shard: Which batches are run here, as for :func:`tl_loops.measure`. With ``(k, n)`` the
            result is about the prompts of that shard; :func:`tl_loops.merge_shards` puts the
            checkpoints of all together, from which the same call without ``shard`` reads all.

    Returns:
        The states, in the order of the prompts.

    Raises:
        ValueError: A prompt that cannot be fed, an activation that this model does not have or that
            has no vector at a position, a phase without blocks, or as many positions as there are
            no prompts.
        IndexError: A position, an iteration or a layer that does not exist.
        NoLoopError: ``n_iterations`` for a model without a loop.
        CheckpointError: The checkpoint is damaged or of another run, or the run can be neither
            resumed nor cut into shards.
    """
    check_batch_size(batch_size)
    split = Split(shard, checkpoint)
    split.check(model)
    tokens = token_prompts(model, prompts)
    at = _positions(positions, [len(t) for t in tokens])
    device = next(model.parameters()).device
    with with_iterations(model, n_iterations):
        grid = _grid(model, activation, iterations, layers, phase)
        lengths = [len(t) for t in tokens]
        members = equal_batches(lengths, lengths, batch_size)
        parts: dict[int, Tensor] = {}

        def compute(number: int) -> Batch:
            batch = torch.stack([tokens[i] for i in members[number]]).to(device)
            where = torch.tensor([at[i] for i in members[number]], device=device)
            return {"values": _read(model, batch, where, grid)}

        def take(number: int, batch: Batch) -> None:
            parts[number] = batch["values"]

        def identify() -> dict[str, Any]:
            return identity_of(
                model,
                prompts=prompts_fingerprint(tokens),
                positions=at,
                places=grid.names,
                batch_size=batch_size,
            )

        run = Run("states", [len(batch) for batch in members], identify)
        run_in_batches(run, compute, take, split, progress)
    mine = [i for number in parts for i in members[number]]
    if not mine:
        raise ValueError(
            f"shard {shard} has no prompt: there are {len(members)} batch(es) of {batch_size}; "
            "give a smaller batch_size"
        )
    values = torch.cat(list(parts.values()), dim=1)
    order = sorted(range(len(mine)), key=mine.__getitem__)
    values = values[:, order].unflatten(0, (len(grid.iterations), len(grid.layers)))
    where = tuple(mine[i] for i in order)
    return PromptStates(values, activation, grid.iterations, grid.layers, grid.labels, where)


def _positions(positions: int | Sequence[int] | str, lengths: Sequence[int]) -> list[int]:
    """One position of each prompt, counted from 0."""
    if isinstance(positions, str):
        if positions != "last":
            raise ValueError(f"positions must be 'last', one index or one for each prompt, got "
                             f"{positions!r}")  # fmt: skip
        return [length - 1 for length in lengths]
    # A tensor or an array of indices is a sequence of them, too.
    each = list(positions) if hasattr(positions, "__iter__") else [positions] * len(lengths)  # pyright: ignore[reportArgumentType]  # an int has no __iter__
    if len(each) != len(lengths):
        raise ValueError(f"got {len(lengths)} prompts but {len(each)} positions")
    return [
        one_index("token", one, length, f" in prompt {number}")
        for number, (one, length) in enumerate(zip(each, lengths, strict=True))
    ]


def _grid(
    model: Model,
    activation: str,
    iterations: Selection | None,
    layers: Selection | None,
    phase: Phase | None,
) -> _Grid:
    """The places of an activation, by iteration and layer."""
    found, layout = find_activation(model, activation), layout_of(model)
    if found.dims[:2] != ("batch", "pos"):
        raise ValueError(
            f"activation {activation!r} is [{', '.join(found.dims)}], which has no vector at a "
            "position: probe 'resid_post', 'attn_out', 'z' or the like"
        )
    if found.place != "block":
        for name, given in (("layers", layers), ("phase", phase)):
            if given is not None:
                raise ValueError(
                    f"activation {activation!r} is not in a block, so it has no {name}: leave it "
                    "out"
                )
    if found.place == "run":
        distinct_indices("iteration", 1, iterations)
        return _Grid((found.hook_name(),), (0,), (0,), (found.name,))
    if found.place == "iteration":
        assert layout is not None
        ts = distinct_indices("iteration", layout.n_iterations, iterations)
        spec = spec_of(found.hook_name(0))
        first = 0 if spec is None else spec.first_iteration
        if iterations is None:
            ts = tuple(t for t in ts if t >= first)
        if not ts or min(ts) < first:
            raise ValueError(f"activation {activation!r} exists from iteration {first} on")
        names = tuple(found.hook_name(t) for t in ts)
        return _Grid(names, ts, (0,), tuple(f"t{t}" for t in ts))
    phase = phase or ("all" if layout is None else "core")
    if layout is None and phase != "all":
        raise ValueError(f"a model without a loop has no {phase}: its blocks are phase='all'")
    if phase != "core" or layout is None:
        start, stop = 0, model.cfg.n_layers
        if layout is not None and phase == "prelude":
            stop = layout.core_start
        elif layout is not None and phase == "coda":
            start = layout.coda_start
        if start == stop:
            raise ValueError(f"this model has no {phase}")
        distinct_indices("iteration", 1, iterations)
        chosen = distinct_indices(f"layer of phase {phase!r}", stop - start, layers)
        blocks, ts = [start + layer for layer in chosen], (0,)
    else:
        ts = distinct_indices("iteration", layout.n_iterations, iterations)
        chosen = distinct_indices("layer of the core", layout.n_core, layers)
        blocks = [layout.index(iteration=t, layer=layer) for t in ts for layer in chosen]
    labels = tuple(str(b) if layout is None else layout.label(b) for b in blocks)
    return _Grid(tuple(found.hook_name(b) for b in blocks), ts, chosen, labels)


def _read(
    model: Model, tokens: Tensor, where: Tensor, grid: _Grid
) -> Float[Tensor, "place batch width"]:
    """The activation of every place at one position of each prompt, on the CPU."""
    found: dict[str, Tensor] = {}
    rows = torch.arange(len(tokens), device=tokens.device)

    def keep(name: str, value: Tensor) -> None:
        at = value[rows.to(value.device), where.to(value.device)].flatten(1)
        found[name] = at.to(statistic_dtype(at)).cpu()

    names = dict.fromkeys(grid.names)
    with hooked(model, named_hooks(names, keep)):
        # With an explicit mask no token is taken for padding because it has the padding's id.
        model(tokens, return_type=None, attention_mask=torch.ones_like(tokens))
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"{missing[0]} was not reached in this run: leave its iteration out with iterations="
        )
    return torch.stack([found[name] for name in grid.names])
