"""Shards of one run put together: all of them, each once, and none of another run."""

import os
from collections.abc import Sequence

from tl_loops.errors import CheckpointError
from tl_loops.runs.batch_file import SavedRun, read_file
from tl_loops.runs.shards import WHOLE, Shard
from tl_loops.writing import check_writable


def merge_runs(shards: Sequence[SavedRun]) -> SavedRun:
    """The whole run that shards make up.

    Args:
        shards: All shards, in any order.

    Returns:
        The run with the batches of all.

    Raises:
        CheckpointError: A shard is missing, unfinished, given twice, or of another run; the message
            names it.
        ValueError: There is none.
    """
    if not shards:
        raise ValueError("there are no shards to merge")
    first = shards[0]
    by_index: dict[int, SavedRun] = {}
    for one in shards:
        first.run.check_same(one.run, first.name, one.name)
        if one.shard.count != first.shard.count:
            raise CheckpointError(
                f"{one.name} is shard {one.shard}, but {first.name} is shard {first.shard}: they "
                "are cut into different numbers of shards"
            )
        twin = by_index.get(one.shard.index)
        if twin is not None:
            raise CheckpointError(f"{one.name} and {twin.name} are both shard {one.shard}")
        by_index[one.shard.index] = one
    count = first.shard.count
    absent = [str(Shard(k, count)) for k in range(count) if k not in by_index]
    if absent:
        raise CheckpointError(
            f"shard(s) {', '.join(absent)} of the run of {first.name} are missing: run and give "
            "them, too"
        )
    for one in by_index.values():
        if one.missing:
            n = sum(one.shard.takes(b) for b in range(one.run.n_batches))
            raise CheckpointError(
                f"{one.name} is not finished: shard {one.shard} has {n - len(one.missing)} of its "
                f"{n} batches; run it again with the same checkpoint"
            )
    batches = {number: b for one in by_index.values() for number, b in one.batches.items()}
    return SavedRun(first.run, WHOLE, dict(sorted(batches.items())), "the merged run")


def merge_shards(
    paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> os.PathLike[str] | str:
    """Merge the files that shards of one run wrote into the checkpoint of the whole run.

    The same call without ``shard=`` and with this checkpoint then gives the result at once, bit
    for bit that of one process on the same device.

    Args:
        paths: The ``checkpoint`` files of all shards.
        out: Where the checkpoint of the whole run is written, whole or not at all.

    Returns:
        ``out``.

    Raises:
        CheckpointError: A shard is missing, unfinished, given twice, damaged, or of another run;
            the message names it.
        FileNotFoundError: There is no such file.
        ValueError: No path is given.
    """
    check_writable(out)
    merge_runs([read_shard_file(path) for path in paths]).save(out)
    return out


def read_shard_file(path: str | os.PathLike[str]) -> SavedRun:
    """What the file of a shard holds.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is damaged, or no file of a run.
    """
    found = read_file(path)
    if found is None:
        raise FileNotFoundError(f"no file {path}")
    return found
