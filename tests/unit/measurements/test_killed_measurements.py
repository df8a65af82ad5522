"""Measurements that are killed, and two processes that measure with one checkpoint."""

import importlib
import os
import random
import signal
import time

import pytest

from tests.kills import N_MOMENTS, forked, killed_after, was_killed
from tests.models import tiny_model
from tests.unit.measurements.test_measure import FAST_METRICS, prompts, quiet
from tl_loops.runs.batch_file import decoded
from tl_loops.writing import FileInUseError

LENGTHS = (4, 5, 5, 6, 7, 7, 8, 9)


def measured(model, path, out=None):
    profile = quiet(model, prompts(LENGTHS), FAST_METRICS, batch_size=1, checkpoint=path)
    if out is not None:
        profile.save(out)
    return profile


def test_a_measurement_killed_at_random_moments_resumes_to_the_same_bytes(tmp_path):
    model, draw = tiny_model("retrofitted", n_core=1, n_iterations=2), random.Random(0)
    measured(model, tmp_path / "warm.ckpt")
    begin = time.perf_counter()
    measured(model, tmp_path / "whole.ckpt", tmp_path / "whole.json")
    duration = time.perf_counter() - begin
    path, n_kills, n_resumed = tmp_path / "run.ckpt", 0, 0
    while n_kills < N_MOMENTS:
        if killed_after(draw.uniform(0, 0.6 * duration), lambda: measured(model, path)):
            n_kills += 1
            n_resumed += path.exists()
        else:
            assert path.read_bytes() == (tmp_path / "whole.ckpt").read_bytes()
            path.unlink()
    assert n_resumed
    measured(model, path, tmp_path / "run.json")
    for ending in ("ckpt", "json"):
        whole, resumed = (tmp_path / f"{name}.{ending}" for name in ("whole", "run"))
        assert resumed.read_bytes() == whole.read_bytes()
    assert {file.name.split(".")[0] for file in tmp_path.iterdir()} == {"warm", "whole", "run"}


@pytest.mark.parametrize("then", ["goes on", "is killed"])
def test_two_processes_with_one_checkpoint(tmp_path, monkeypatch, then):
    model, path = tiny_model("ouro"), tmp_path / "run.ckpt"
    expected = measured(model, tmp_path / "whole.ckpt")
    module = importlib.import_module("tl_loops.measurements.measure")
    reduce_batch, n_batches = module.reduce_batch, 0
    half_way, go_on = os.pipe(), os.pipe()

    def waits_half_way(*arguments):
        nonlocal n_batches
        n_batches += 1
        if n_batches == 4:
            os.write(half_way[1], b".")
            os.read(go_on[0], 1)
        return reduce_batch(*arguments)

    def first():
        monkeypatch.setattr(module, "reduce_batch", waits_half_way)
        measured(model, path)

    child = forked(first)
    assert os.read(half_way[0], 1) == b"."
    before = path.read_bytes()
    assert [*decoded(before, "run.ckpt").batches] == [0, 1, 2]
    with pytest.raises(FileInUseError, match=r"run\.ckpt is in use by another run; wait for it"):
        measured(model, path)
    assert path.read_bytes() == before
    if then == "goes on":
        os.write(go_on[1], b".")
        assert not was_killed(child)
    else:
        os.kill(child, signal.SIGKILL)
        assert was_killed(child)
        assert path.read_bytes() == before
    again = measured(model, path)
    assert path.read_bytes() == (tmp_path / "whole.ckpt").read_bytes()
    assert again.provenance == expected.provenance
    assert {file.name for file in tmp_path.iterdir()} == {"run.ckpt", "whole.ckpt"}
