"""Shards: which batches belong to whom, and what merges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.errors import CheckpointError
from tl_loops.runs.batch_file import RunDescription, SavedRun, append_batch, read_file, start_file
from tl_loops.runs.merge import merge_runs, merge_shards
from tl_loops.runs.shards import WHOLE, Shard, read_shard, shard_of_environment

RUN = RunDescription("measurement", {"weights": "abc", "prompts": "p"}, 5, {"blocks": {"a": [0]}})


def batch(number: int) -> dict[str, torch.Tensor]:
    return {"mean": torch.arange(3.0) + number, "n": torch.tensor(number)}


def saved(shard: Shard, run: RunDescription = RUN, left_out: int = 0) -> SavedRun:
    mine = [b for b in range(run.n_batches) if shard.takes(b)]
    done = {b: batch(b) for b in mine[: len(mine) - left_out]}
    return SavedRun(run, shard, done, f"s{shard.index}")


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 40), st.integers(1, 9))
def test_every_batch_belongs_to_one_shard(n_batches, count):
    owners = [[k for k in range(count) if Shard(k, count).takes(b)] for b in range(n_batches)]
    assert all(len(one) == 1 for one in owners)
    loads = [sum(one == [k] for one in owners) for k in range(count)]
    assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize("given", [(1, 4), "1/4", Shard(1, 4), [1, 4]])
def test_a_shard_can_be_written_in_several_ways(given):
    assert read_shard(given) == Shard(1, 4)


def test_files_of_shards_have_their_number_in_the_name(tmp_path):
    assert Shard(1, 4).path(tmp_path / "run.ckpt") == tmp_path / "run.1of4.ckpt"
    assert WHOLE.path(tmp_path / "run.ckpt") == tmp_path / "run.ckpt"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((4, 4), "shard 4/4 does not exist: shards of 4 are 0 to 3"),
        ((-1, 2), "does not exist"),
        ((0, 0), "does not exist"),
        ("1", r"must be \(k, n\) or 'k/n'"),
        ("a/b", "must be"),
        ((0.5, 2), "must be"),
        ((True, 2), "must be"),
        ((1, 2, 3), "must be"),
    ],
)
def test_what_is_no_shard_raises(given, message):
    with pytest.raises(ValueError, match=message):
        read_shard(given)


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        (dict(RANK="2", WORLD_SIZE="8"), Shard(2, 8)),
        (dict(SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_COUNT="4"), Shard(3, 4)),
        (
            dict(
                SLURM_ARRAY_TASK_ID="4", SLURM_ARRAY_TASK_COUNT="4", SLURM_ARRAY_TASK_MIN="1",
                SLURM_ARRAY_TASK_MAX="4",
            ),
            Shard(3, 4),
        ),
        (  # inside of a task of an array, torchrun counts
            dict(RANK="0", WORLD_SIZE="2", SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_COUNT="4"),
            Shard(0, 2),
        ),
    ],
)  # fmt: skip
def test_the_launcher_says_which_shard(environment, shard, monkeypatch):
    assert shard_of_environment(environment) == shard
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert read_shard("auto") == shard


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "neither pair is set"),
        (dict(RANK="one", WORLD_SIZE="2"), "RANK is 'one'"),
        (dict(SLURM_ARRAY_TASK_ID="9", SLURM_ARRAY_TASK_COUNT="4"), "--array=0-3"),
    ],
)
def test_an_environment_without_a_shard_raises(environment, message):
    with pytest.raises(ValueError, match=message):
        shard_of_environment(environment)


# Files.


def test_a_file_grows_batch_by_batch(tmp_path):
    path, shard = tmp_path / "run.ckpt", Shard(1, 2)
    begun = start_file(path, RUN, shard)
    end = append_batch(path, begun.n_bytes, 1, batch(1))
    append_batch(path, end, 3, batch(3))
    found = read_file(path)
    assert found.run == RUN and found.shard == shard and not found.missing
    assert list(found.batches) == [1, 3] and torch.equal(found.batches[3]["mean"], batch(3)["mean"])
    assert path.read_bytes() == found.encoded()


def test_an_unfinished_end_is_not_there_and_is_written_over(tmp_path):
    path = tmp_path / "run.ckpt"
    end = append_batch(path, start_file(path, RUN, WHOLE).n_bytes, 0, batch(0))
    append_batch(path, end, 1, batch(1))
    whole = path.read_bytes()
    for length in range(end, len(whole)):
        path.write_bytes(whole[:length])
        found = read_file(path)
        assert list(found.batches) == [0] and found.n_bytes == end
    append_batch(path, found.n_bytes, 1, batch(1))
    assert path.read_bytes() == whole


def test_a_flipped_bit_is_one_clear_error(tmp_path):
    path = tmp_path / "run.ckpt"
    append_batch(path, start_file(path, RUN, WHOLE).n_bytes, 0, batch(0))
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"run\.ckpt"):
            read_file(path)


# Merging.


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_shards_merge_to_the_run(count):
    merged = merge_runs([saved(Shard(k, count)) for k in reversed(range(count))])
    assert merged.encoded() == saved(WHOLE).encoded()


OTHER = RunDescription("measurement", {"weights": "xyz", "prompts": "p"}, 5, {})


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], "no shards to merge"),
        ([saved(Shard(0, 3))], r"shard\(s\) 1/3, 2/3 of the run of s0 are missing"),
        ([saved(Shard(0, 2)), saved(Shard(0, 2))], "s0 and s0 are both shard 0/2"),
        ([saved(Shard(0, 2)), saved(Shard(1, 3))], "s1 is shard 1/3, but s0 is shard 0/2"),
        (
            [saved(Shard(0, 2)), saved(Shard(1, 2), OTHER)],
            "s1 belongs to another run: weights is 'xyz' there and 'abc' in s0",
        ),
        (
            [saved(Shard(0, 2)), saved(Shard(1, 2), RunDescription("exit curve", {}, 5, {}))],
            "s1 holds another kind of run: exit curve; s0 is of kind measurement",
        ),
        (
            [saved(Shard(0, 2)), saved(Shard(1, 2), left_out=1)],
            "s1 is not finished: shard 1/2 has 1 of its 2 batches",
        ),
    ],
)
def test_what_does_not_make_up_one_run_is_named(shards, message):
    with pytest.raises(ValueError, match=message):
        merge_runs(shards)


def test_files_of_shards_merge_into_the_checkpoint_of_the_run(tmp_path):
    for k in range(2):
        saved(Shard(k, 2)).save(tmp_path / f"{k}.ckpt")
    merge_shards([tmp_path / "1.ckpt", tmp_path / "0.ckpt"], tmp_path / "all.ckpt")
    assert (tmp_path / "all.ckpt").read_bytes() == saved(WHOLE).encoded()
    with pytest.raises(FileNotFoundError, match=r"no file .*absent"):
        merge_shards([tmp_path / "0.ckpt", tmp_path / "absent"], tmp_path / "none.ckpt")
    assert not (tmp_path / "none.ckpt").exists()
