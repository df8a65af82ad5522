"""Several processes of one measurement: launched together, killed, rerun alone, merged."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tl_loops.cli import main

ROOT = Path(__file__).parents[2]
PROMPTS = "".join(
    f"Ann likes Bob . Bob likes Eve . Eve likes Ann . {hops} hops from {name} :\n"
    for hops in (1, 2)
    for name in ("Ann", "Bob")
)


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """The command, in the directory of the test."""
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def arguments(*more: str) -> list[str]:
        return [
            "measure", "tl-loops-tiny", "--prompts", "prompts.txt", "--metrics", "mixing_score",
            "--batch-size", "1", "--n-iterations", "2", "--quiet", *more,
        ]  # fmt: skip

    return arguments


@pytest.mark.slow
def test_two_processes_write_the_profile_of_one(measure, tmp_path, monkeypatch):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launched = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
            "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "tl_loops",
            *measure("--out", "two.json", "--checkpoint", "run.ckpt"),
        ],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.split() == [str(tmp_path / "two.json")]
    assert main(measure("--out", "one.json")) == 0
    assert (tmp_path / "two.json").read_bytes() == (tmp_path / "one.json").read_bytes()

    # A rank whose file is lost is rerun alone.
    (tmp_path / "run.1of2.ckpt").unlink()
    assert main(measure("--checkpoint", "run.ckpt", "--shard", "1/2")) == 0
    files = ["run.0of2.ckpt", "run.1of2.ckpt"]
    assert main(["merge", *files, "--out", "merged.json"]) == 0
    assert (tmp_path / "merged.json").read_bytes() == (tmp_path / "one.json").read_bytes()


def test_a_job_array_merges_to_the_run(measure, tmp_path, monkeypatch, capsys):
    for task in ("1", "2"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
        monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
        assert main(measure("--checkpoint", "run.ckpt", "--shard")) == 0
        k = int(task) - 1
        assert capsys.readouterr().out.split() == [str(tmp_path / f"run.{k}of2.ckpt")]
    # Outside of --shard the array means nothing: it may be one over models.
    assert main(measure("--out", "one.json")) == 0
    shards = ["run.1of2.ckpt", "run.0of2.ckpt"]
    assert main(["merge", *shards, "--out", "merged.json"]) == 0
    assert (tmp_path / "merged.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert main(["merge", *shards, "--out", "whole.ckpt"]) == 0
    assert main(measure("--checkpoint", "whole.ckpt", "--out", "again.json")) == 0
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "one.json").read_bytes()

    capsys.readouterr()
    for files, message in (
        (shards[:1], "shard(s) 0/2 of the run of run.1of2.ckpt are missing"),
        ([shards[0], *shards], "run.1of2.ckpt and run.1of2.ckpt are both shard 1/2"),
        ([*shards, "prompts.txt"], "prompts.txt is no readable checkpoint or shard"),
        ([*shards, "one.json"], "some of the files are profiles"),
        ([*shards, "absent"], "no file absent"),
    ):
        assert main(["merge", *files, "--out", "bad.json"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "bad.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--shard", "0/2"), "--shard 0/2 writes to --checkpoint FILE"),
        (("--shard", "0/2", "--checkpoint", "a", "--out", "a.json"), "and not to --out"),
        (("--shard", "2/2"), "shard 2/2 does not exist"),
        (("--shard",), "neither pair is set"),
    ],
)
def test_what_a_shard_cannot_do_is_said_first(measure, more, message, capsys, monkeypatch):
    for name in ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert main(measure(*more)) == 2
    assert message in capsys.readouterr().err


def test_a_full_disk_is_one_line(measure, tmp_path, monkeypatch, capsys):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    assert main(measure("--checkpoint", "run.ckpt", "--shard", "0/2")) == 0
    before = (tmp_path / "run.0of2.ckpt").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr("tl_loops.writing.os.fsync", full)
    assert main(["merge", "run.0of2.ckpt", "--out", "x.json"]) == 2
    assert main(measure("--checkpoint", "other.ckpt")) == 2
    error = capsys.readouterr().err
    assert "other.ckpt" in error and "No space left" in error
    assert (tmp_path / "run.0of2.ckpt").read_bytes() == before
    assert not list(tmp_path.glob("other*")) and not list(tmp_path.glob("x*"))
