"""The command line: what it writes, and the one line it says to bad input."""

import csv
import io
import json
import subprocess
import sys

import pytest

from tl_loops import LoopedTransformer
from tl_loops.cli import main
from tl_loops.cli.arguments import COMMANDS
from tl_loops.cli.measure import summary
from tl_loops.loading.catalogue import catalogue
from tl_loops.measurements.measure import measure
from tl_loops.measurements.registry import MEASUREMENTS
from tl_loops.tasks import fact_chain_prompts


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
    assert "first iteration" in out and out.count("sink_rate") == 1
    code, out, _ = run(
        capsys, "measure", "tl-loops-tiny", "--prompts", str(prompts), "--metrics", "sink_rate",
        "--n-iterations", "1", "--quiet", "--rows",
    )  # fmt: skip
    assert code == 0 and "relative_depth" in out
    assert out.count("sink_rate") == 4


def test_measure_writes_csv_to_standard_output(capsys):
    code, out, err = run(
        capsys, "measure", "tl-loops-tiny", "--metrics", "sink_rate", "--n-iterations", "2",
        "--device", "cpu", "--limit", "1", "--out", "-",
    )  # fmt: skip
    assert code == 0 and err == ""  # a stream that is no terminal gets no progress bar
    rows = list(csv.DictReader(io.StringIO(out)))
    assert len(rows) == 6 and {row["metric"] for row in rows} == {"sink_rate"}


def test_the_summary_has_the_means_of_the_first_and_the_last_iteration():
    model = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny", n_iterations=3)
    texts = [prompt.text for prompt in fact_chain_prompts(2)]
    profile = measure(model, texts, metrics=("mixing_score",), progress=False)
    heads, (row,), numbers = summary(profile)
    assert heads == ("metric", *numbers) and row[0] == "mixing_score"
    by_iteration = profile.by_iteration("mixing_score")
    expected = [profile.mean("mixing_score"), by_iteration[0], by_iteration[-1]]
    for text, values in zip(row[1:], expected, strict=True):
        assert float(text) == pytest.approx(float(values.mean()), rel=1e-3)


def test_check_and_lists_as_json(capsys):
    code, out, _ = run(capsys, "check", "tl-loops-tiny", "--json", "--n-iterations", "2")
    told = json.loads(out)
    assert code == 0 and told["passed"] and {f["status"] for f in told["findings"]} >= {"ok"}
    code, out, _ = run(capsys, "models", "--json")
    assert [row["name"] for row in json.loads(out)] == [entry.name for entry in catalogue()]
    code, out, _ = run(capsys, "metrics", "--json")
    assert {row["name"] for row in json.loads(out)} == set(MEASUREMENTS)


def test_tables_fit_the_terminal(capsys, monkeypatch):
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        for command in ("models", "metrics"):
            code, out, _ = run(capsys, command)
            assert code == 0 and max(map(len, out.splitlines())) <= width
    assert "…" not in out
    code, out, _ = run(capsys, "models")
    assert all(f"{entry.config().n_params:,}" in out for entry in catalogue())


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "tl-loops-tiny", "--n-iterations", "2"],
        ["measure", "tl-loops-tiny", "--metrics", "all", "--n-iterations", "2", "--limit", "1"],
        ["measure", "tl-loops-tiny", "--n-iterations", "2", "--limit", "1", "--rows"],
        *([command, "--help"] for command in COMMANDS),
    ],
    ids=lambda arguments: " ".join(arguments[:1] + arguments[-1:]),
)
def test_everything_printed_fits_the_terminal(capsys, monkeypatch, arguments, width):
    whole = _printed(capsys, arguments)
    monkeypatch.setenv("COLUMNS", str(width))
    out = _printed(capsys, arguments)
    assert max(map(len, out.splitlines())) <= width
    if "--rows" not in arguments and arguments[-1] != "--help":  # there numbers are shortened
        assert out.split() == whole.split()  # no word is cut, broken or lost


def _printed(capsys, arguments):
    try:
        main(arguments)
    except SystemExit as end:  # of --help
        assert end.code in (0, None)
    return capsys.readouterr().out


def test_names_are_in_one_piece_in_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, "models")
    assert {entry.name for entry in catalogue()} <= set(out.splitlines())
    _, out, _ = run(capsys, "metrics")
    assert set(MEASUREMENTS) <= {line.partition(" ")[0] for line in out.splitlines()}
    _, out, _ = run(
        capsys, "measure", "tl-loops-tiny", "--metrics", "sink_rate", "--n-iterations", "2",
        "--limit", "1", "--rows",
    )  # fmt: skip
    lines = out.splitlines()
    assert lines.count("sink_rate") == 1
    assert [line.split()[:2] for line in lines[lines.index("sink_rate") + 1 :]] == [
        ["0", "prelude"], *([str(block), "core"] for block in range(1, 5)), ["5", "coda"],
    ]  # fmt: skip


def test_float16_and_a_device_load(capsys):
    code, out, _ = run(
        capsys, "measure", "tl-loops-tiny", "--metrics", "sink_rate", "--n-iterations", "2",
        "--dtype", "float16", "--device", "cpu", "--limit", "1",
    )  # fmt: skip
    assert code == 0 and "sink_rate" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "tl-loops-tiyn"], "did you mean.*tl-loops-tiny|tl-loops-tiny"),
        (["report", "--prompts", "absent.txt"], "absent.txt: no such file"),
        (["report", "--n-iterations", "0"], "--n-iterations must be at least 1, got 0"),
        (["report", "--out", "/no/such/place/report.html"], "/no/such/place does not exist"),
        (["report", "--out", "/dev/null"], "/dev/null is a device"),
        (["measure", "tl-loops-tiny", "--checkpoint", "/dev/null"], "/dev/null is a device"),
        (["measure", "tl-loops-tiny", "--metrics", "sink_rat"], "sink_rate"),
        (["measure", "tl-loops-tiny", "--rows", "--out", "-"], "--rows prints"),
        (["check", "tl-loops-tiny", "--device", "cud"], "--device cud: there is no such device"),
        (["report", "--device", "xpu:7"], "--device xpu:7: there is no such device"),
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
