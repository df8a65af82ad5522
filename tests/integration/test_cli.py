"""The command line: what it writes, and the one line it says to bad input."""

import json
import subprocess
import sys

import pytest

from tl_loops.cli import main
from tl_loops.loading.catalogue import catalogue


def run(capsys, *arguments):
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_models_lists_every_name_with_notation_parameters_and_source(capsys):
    code, out, _ = run(capsys, "models")
    assert code == 0
    for entry in catalogue():
        line = next(line for line in out.splitlines() if line.startswith(f"{entry.name} "))
        assert entry.config().notation in line
        assert f"{entry.config().n_params:,}" in line
    assert "1,434,652,673" in out  # Ouro-1.4B's published count


def test_measure_writes_a_profile(capsys, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Ann likes Bob . Bob likes Eve . Eve likes Ann . 2 hops from Ann :\n" * 2)
    out = tmp_path / "profile.json"
    code, printed, _ = run(
        capsys, "measure", "tl-loops-tiny", "--prompts", str(prompts), "--out", str(out),
        "--metrics", "sink_rate", "mixing_score", "--n-iterations", "3", "--quiet",
    )  # fmt: skip
    assert code == 0
    assert printed.strip() == str(out.resolve())
    assert json.loads(out.read_text())
    from tl_loops.measurements.profile import LoopProfile

    profile = LoopProfile.load(out)
    assert set(profile.metrics) == {"sink_rate", "mixing_score"}
    assert profile.n_layers == 1 + 3 * 2 + 1
    assert (profile.count("sink_rate") == 2).all()


def test_measure_prints_a_table_without_a_file(capsys, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Ann likes Bob . 1 hops from Ann :")
    code, out, _ = run(
        capsys, "measure", "tl-loops-tiny", "--prompts", str(prompts), "--metrics", "sink_rate",
        "--n-iterations", "1", "--quiet",
    )  # fmt: skip
    assert code == 0
    assert "relative_depth" in out
    assert out.count("sink_rate") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "tl-loops-tiyn"], "did you mean.*tl-loops-tiny|tl-loops-tiny"),
        (["report", "--prompts", "absent.txt"], "absent.txt: no such file"),
        (["report", "--n-iterations", "0"], "--n-iterations must be at least 1, got 0"),
        (["report", "--out", "/no/such/place/report.html"], "/no/such/place does not exist"),
        (["measure", "tl-loops-tiny", "--metrics", "sink_rat"], "sink_rate"),
        (["measure", "tl-loops-tiny", "--out", "profile.xls"], r"\.parquet"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, message):
    import re

    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith(f"tl-loops {arguments[0]}: ")
    assert re.search(message, err)
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_runs():
    answer = subprocess.run(
        [sys.executable, "-m", "tl_loops.cli", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.startswith("tl-loops ")
