"""A run in batches: which of them are done here, kept in a file, and shared between processes."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from tl_loops.errors import CheckpointError
from tl_loops.layout.model import Model
from tl_loops.runs.batch_file import (
    RunDescription,
    SavedRun,
    append_batch,
    decoded,
    read_file,
    start_file,
)
from tl_loops.runs.identity import check_identifiable
from tl_loops.runs.merge import merge_runs
from tl_loops.runs.ranks import exchange, this_rank
from tl_loops.runs.shards import WHOLE, Shard, Shards, read_shard
from tl_loops.writing import in_use

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Split:
    """How a call wants its run cut and kept: the arguments ``shard`` and ``checkpoint`` of a tool.

    Attributes:
        shard: As in :data:`tl_loops.runs.shards.Shards`.
        checkpoint: A file that keeps the batches that are done. Shards add their number to its
            name, see :meth:`tl_loops.runs.shards.Shard.path`.
    """

    shard: Shards = None
    checkpoint: str | os.PathLike[str] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether all is done here, and nothing is kept."""
        return self.shard in (None, WHOLE) and self.checkpoint is None

    def check(self, model: Model, merges: bool = False, gradients: bool = False) -> None:
        """Raise, before anything runs, where the call cannot be cut or kept.

        Args:
            model: What is run.
            merges: Whether the tool's results merge by themselves; otherwise files of shards do.
            gradients: Whether the results carry gradients.

        Raises:
            CheckpointError: Hooks are on the model, or its initial states are drawn afresh, so that
                parts of two runs could not be told from each other.
            ValueError: The shard does not exist, is kept in no file, or carries gradients.
        """
        shard = this_rank() if self.shard == "distributed" else read_shard(self.shard)
        if self.is_plain:
            return
        if gradients:
            raise ValueError("checkpoint and shard keep numbers, not gradients: leave them out")
        if not merges and self.shard != "distributed" and shard != WHOLE and not self.checkpoint:
            raise ValueError(
                f"shard {shard} needs checkpoint=, a file: tl_loops.merge_shards puts the files of "
                "all shards together"
            )
        check_identifiable(model)


PLAIN = Split()
"""All is done here, and nothing is kept."""


@dataclass(frozen=True)
class Run:
    """What is run, cut into batches that do not depend on the number of shards.

    Attributes:
        kind: What it is called, such as ``"measurement"``.
        sizes: How many units each batch has.
        identify: Gives what decides the result; called only where something is kept or shared.
        about: What the result says besides its numbers.
        unit: What the progress bar counts.
    """

    kind: str
    sizes: Sequence[int]
    identify: Callable[[], Mapping[str, Any]]
    about: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "prompt"


def run_in_batches(
    run: Run,
    compute: Callable[[int], Batch],
    take: Callable[[int, Batch], None],
    split: Split,
    progress: bool = False,
) -> SavedRun | None:
    """Do the batches of a run that are this process's and not done yet, and hand out all results.

    Args:
        run: What is run.
        compute: Does the batch of a number.
        take: Is given each result, in the order of the numbers: those of the whole run or, where
            the call is for one shard of several, those of the shard.
        split: Which shard, and the file that keeps what is done.
        progress: Whether to show a progress bar.

    Returns:
        Where the call is for one shard of several, what it did; else ``None``.

    Raises:
        CheckpointError: The file is damaged or of another run, or shards of different runs meet.
        FileInUseError: Another process or thread runs with the same file.
        OSError: The file cannot be written; what it held before stays.
        ValueError: The shard does not exist.
    """
    shard = this_rank() if split.shard == "distributed" else read_shard(split.shard)
    together = split.shard == "distributed" and shard != WHOLE
    path = None if split.checkpoint is None else shard.path(split.checkpoint)
    mine = [b for b in range(len(run.sizes)) if shard.takes(b)]
    what = None
    if not split.is_plain:
        what = RunDescription(run.kind, run.identify(), len(run.sizes), run.about)
    kept: dict[int, Batch] = {}
    with nullcontext() if path is None else in_use(path):
        done: dict[int, Batch] = {}
        n_bytes = 0
        if path is not None:
            assert what is not None
            saved = _opened(path, what, shard)
            done, n_bytes = dict(saved.batches), saved.n_bytes
        bar = tqdm(
            total=sum(run.sizes[b] for b in mine),
            initial=sum(run.sizes[b] for b in mine if b in done),
            desc=run.kind,
            unit=run.unit,
            disable=not progress,
        )
        with bar:
            for number in mine:
                result = done.pop(number, None)
                if result is None:
                    result = compute(number)
                    if path is not None:
                        n_bytes = append_batch(path, n_bytes, number, result)
                    bar.update(run.sizes[number])
                if not together:
                    take(number, result)
                if shard != WHOLE:
                    kept[number] = result
    if what is None or shard == WHOLE:
        return None
    part = SavedRun(what, shard, kept, f"shard {shard}" if path is None else str(path))
    if not together:
        return part
    parts = [decoded(one, f"rank {k}") for k, one in enumerate(exchange(part.encoded()))]
    for number, result in merge_runs(parts).batches.items():
        take(number, result)
    return None


def _opened(path: str | os.PathLike[str], what: RunDescription, shard: Shard) -> SavedRun:
    """The file of a shard, written without batches where there is none."""
    found = read_file(path)
    if found is None:
        return start_file(path, what, shard)  # a path that fails, fails now
    what.check_same(found.run, "this call", str(path))
    if found.shard != shard:
        raise CheckpointError(
            f"{path} is shard {found.shard} of this run, but this call is for shard {shard}; give "
            "another path"
        )
    return found
