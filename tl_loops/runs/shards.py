"""Shards of a run: which of its batches belong to which process."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_loops.errors import shortened


@dataclass(frozen=True)
class Shard:
    """One of several parts of a run. Batch b belongs to shard b modulo their number.

    Batches are cut on the whole run, so that they do not depend on the number of shards, and the
    longest prompts, which come first, are spread over all shards.

    Attributes:
        index: Which one, from 0.
        count: How many there are.
    """

    index: int
    count: int

    def takes(self, batch: int) -> bool:
        """Whether a batch belongs to this shard."""
        return batch % self.count == self.index

    def path(self, checkpoint: str | os.PathLike[str]) -> Path:
        """The file of this shard: ``run.1of4.ckpt`` for ``run.ckpt``; the path itself if whole."""
        path = Path(checkpoint)
        if self.count == 1:
            return path
        return path.with_name(f"{path.stem}.{self.index}of{self.count}{path.suffix}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Shard(0, 1)
"""The only shard of a run that is not cut."""

# What is in the sequence is checked below, with a message of its own.
Shards = Shard | Sequence[Any] | str | None
"""What ``shard=`` takes: ``(k, n)`` or ``"k/n"``, shard k of n; ``"auto"``: by the environment, see
:func:`shard_of_environment`; ``"distributed"``: all ranks of torch.distributed share the run, and
each gets the whole result; ``None``: all of it here."""

_RANKS = ("RANK", "WORLD_SIZE")
_ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN")


def read_shard(shard: Shards) -> Shard:
    """The shard that an argument means.

    Args:
        shard: As in :data:`Shards`, without ``"distributed"``.

    Raises:
        ValueError: It is no shard, or the environment names none.
    """
    if shard is None:
        return WHOLE
    if shard == "auto":
        return shard_of_environment(os.environ)
    if isinstance(shard, Shard):
        index, count = shard.index, shard.count
    else:
        parts = shard.split("/") if isinstance(shard, str) else shard
        try:
            index, count = (_number(part) for part in parts)
        except (TypeError, ValueError):
            raise ValueError(
                f"shard must be (k, n) or 'k/n' with k from 0 to n - 1, 'auto' or 'distributed', "
                f"got {shortened(shard)}"
            ) from None
    if not 0 <= index < count:
        raise ValueError(
            f"shard {index}/{count} does not exist: shards of {count} are 0 to {count - 1}"
        )
    return Shard(index, count)


def shard_of_environment(environment: Mapping[str, str]) -> Shard:
    """The shard of this process by what its launcher set.

    ``RANK`` and ``WORLD_SIZE`` (torchrun, accelerate launch), else ``SLURM_ARRAY_TASK_ID`` and
    ``SLURM_ARRAY_TASK_COUNT`` of a job array without gaps.

    Raises:
        ValueError: Neither is set, or the array has gaps.
    """
    if all(name in environment for name in _RANKS):
        index, count = (_variable(environment, name) for name in _RANKS)
        return read_shard((index, count))
    task, count, first = _ARRAY
    if task in environment and count in environment:
        n = _variable(environment, count)
        index = _variable(environment, task)
        index -= _variable(environment, first) if first in environment else 0
        if not 0 <= index < n:
            raise ValueError(
                f"{task}={environment[task]} is not one of {n} tasks in a row: submit the array as "
                f"--array=0-{n - 1}, or give the shard as (k, n)"
            )
        return Shard(index, n)
    raise ValueError(
        "shard='auto' reads RANK and WORLD_SIZE or SLURM_ARRAY_TASK_ID and "
        "SLURM_ARRAY_TASK_COUNT, but neither pair is set: start it with torchrun, accelerate "
        "launch or sbatch --array, or give the shard as (k, n)"
    )


def _number(part: int | str) -> int:
    if isinstance(part, (bool, float)):
        raise ValueError("not an integer")
    return int(part)


def _variable(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ValueError(f"{name} is {environment[name]!r}, expected an integer") from None
