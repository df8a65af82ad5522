"""A full disk keeps every old file and names it; a place that cannot be written is found first."""

import resource
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.kills import forked, was_killed
from tests.models import tiny_model
from tests.unit.measurements.test_measure import FAST_METRICS, prompts, quiet
from tests.unit.measurements.test_profile import profile, samples
from tl_loops.lens.tuned import TunedLens
from tl_loops.loading.open import is_looped_name
from tl_loops.model.looped import LoopedTransformer
from tl_loops.report import write_report
from tl_loops.runs.batch_file import read_file

MOST = 2000
"""Bytes that a file may have on the disk that is full; every file that is tried is larger."""


def lens(n):
    return TunedLens(
        ("a",), torch.full((1, 30, 30), n), torch.zeros(1, 30), torch.zeros(2, 1), {"d_model": 30}
    )


def save_model(path, n):
    model = tiny_model("ouro")
    with torch.no_grad():
        model.W_E.fill_(n)
    model.save_pretrained(path)


WRITERS = {
    "profile.csv": lambda path, n: profile(samples(2, seed=int(n))).save(path),
    "profile.json": lambda path, n: profile(samples(2, seed=int(n))).save(path),
    "profile.parquet": lambda path, n: profile(samples(2, seed=int(n))).save(path),
    "lens.safetensors": lambda path, n: lens(n).save(path),
    "model": save_model,
}


def content(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_keeps_the_old_file_and_names_it(tmp_path, name, there):
    path, write = tmp_path / name, WRITERS[name]
    if there:
        write(path, 1.0)
    before = content(tmp_path)

    def on_a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (MOST, MOST))
        with pytest.raises(OSError, match=rf"cannot write: File too large.*{name}") as caught:
            write(path, 2.0)
        assert len(str(caught.value).splitlines()) == 1

    assert not was_killed(forked(on_a_full_disk))
    assert content(tmp_path) == before
    if name == "model":
        assert is_looped_name(path) == there
        if there:
            assert (LoopedTransformer.from_pretrained_no_processing(path).W_E == 1).all()
    write(path, 2.0)
    assert content(tmp_path) != before


@pytest.mark.parametrize("n_batches", [None, 0, 2])
def test_a_measurement_on_a_full_disk_keeps_its_batches_and_goes_on(tmp_path, n_batches):
    model, path = tiny_model("ouro"), tmp_path / "run.ckpt"

    def run():
        quiet(model, prompts(), FAST_METRICS, batch_size=1, checkpoint=path)

    run()
    whole, found = path.read_bytes(), read_file(path)
    assert found is not None and len(found.batches) > 2
    kept = {number: found.batches[number] for number in list(found.batches)[: n_batches or 0]}
    before = b"" if n_batches is None else replace(found, batches=kept).encoded()
    path.unlink()

    def on_a_full_disk():
        most = len(before) + 50  # a part of what is written next
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        with pytest.raises(OSError, match=r"cannot write: File too large.*run\.ckpt"):
            run()

    if before:
        path.write_bytes(before)
    assert not was_killed(forked(on_a_full_disk))
    assert content(tmp_path) == ({path.relative_to(tmp_path): before} if before else {})
    run()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("write", ["measure", "report", "save"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch, write):
    # A file in place of a directory: not even root writes there.
    (tmp_path / "file").write_text("mine")
    model = tiny_model("ouro")
    calls = []
    monkeypatch.setattr(LoopedTransformer, "forward", lambda *_, **__: calls.append(1))
    monkeypatch.setattr(
        LoopedTransformer, "physical_state_dict", lambda *_, **__: calls.append(1) or {}
    )
    work = {
        "measure": lambda: quiet(
            model, prompts(), "residual_norm", checkpoint=tmp_path / "file" / "run.ckpt"
        ),
        "report": lambda: write_report(model, tmp_path / "file" / "page.html", progress=False),
        "save": lambda: quiet(model, prompts(), "residual_norm", checkpoint=tmp_path),
    }[write]
    with pytest.raises((OSError, ValueError), match=r"file/(run|page)|is a directory"):
        work()
    assert not calls and content(tmp_path) == {(tmp_path / "file").relative_to(tmp_path): b"mine"}


def test_a_full_standard_output_is_one_line():
    script = "import sys; from tl_loops.cli import main; sys.argv = ['tl-loops', 'x']; "
    script += (
        "import types; command = types.ModuleType('x'); command.run = lambda options: print('out');"
        "sys.modules['tl_loops.cli.x'] = command; import tl_loops.cli.arguments as arguments; "
        "arguments.COMMANDS['x'] = ('x', ()); sys.exit(main())"
    )
    with open("/dev/full", "w") as full:
        answer = subprocess.run(
            [sys.executable, "-c", script],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert answer.returncode == 2
    assert answer.stderr.splitlines() == [
        "tl-loops x: [Errno 28] No space left on device: 'standard output'"
    ]
