"""How commands start and end: help at once, and one line after Ctrl-C at any moment."""

import io
import os
import random
import signal
import subprocess
import sys
import time
from importlib import import_module

import pytest

from tests.kills import N_MOMENTS
from tl_loops.cli import main
from tl_loops.cli.arguments import COMMANDS
from tl_loops.measurements import MEASUREMENTS


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """What was started in the background is deaf to Ctrl-C, and so are its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


LIGHT = """
import contextlib, io, sys
from tl_loops.cli import main
for arguments in %r:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main(arguments)
    except SystemExit as end:
        print(*arguments, "|", end.code, "|", said.getvalue().splitlines()[0])
heavy = {"torch", "transformer_lens", "transformers", "numpy", "pandas"} & sys.modules.keys()
assert not heavy, heavy
"""


def run_python(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True, text=True, check=False, **options,
    )  # fmt: skip


def test_help_version_and_usage_errors_import_nothing_heavy():
    asked = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    wrong = [[], ["no-such-command"], ["measure"], ["report", "--no-such-option"],
             ["check", "x", "--dtype", "int8"]]  # fmt: skip
    answer = run_python("-c", LIGHT % (asked + wrong))
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert len(lines) == len(asked + wrong)
    for line, arguments in zip(lines, asked + wrong, strict=True):
        _, code, first = (part.strip() for part in line.split("|"))
        assert code == ("0" if arguments in asked else "2")
        assert first.startswith(("usage: tl-loops", "tl-loops "))


def test_help_takes_less_than_a_second():
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        assert run_python("-m", "tl_loops", "--help").returncode == 0
        times.append(time.perf_counter() - begin)
    assert min(times) < 1


@pytest.mark.parametrize(
    ("code", "registered"),
    [
        ("import tl_loops; light = 'torch' not in sys.modules; import transformer_lens", True),
        ("import tl_loops.lens.read; light = True", True),
        ("from tl_loops.writing import write_whole; light = 'torch' not in sys.modules", False),
    ],
)
def test_importing_registers_once_transformer_lens_is_imported(code, registered):
    script = f"""
import sys
{code}
assert light
if {registered}:
    from tl_loops.upstream import HookedTransformer
    assert hasattr(HookedTransformer.from_pretrained, "__wrapped__")
    assert type(sys.modules["transformer_lens"].__spec__.loader).__module__ != "tl_loops.later"
    assert not [finder for finder in sys.meta_path if type(finder).__name__ == "_Finder"]
    assert "tl_loops.measurements" not in sys.modules
    import tl_loops
    assert tl_loops.measure.__module__ == "tl_loops.measurements.measure"
    assert "measure" in dir(tl_loops)
    assert tl_loops.unregister() is None
    assert not hasattr(HookedTransformer.from_pretrained, "__wrapped__")
else:
    assert "transformer_lens" not in sys.modules
"""
    answer = run_python("-c", script)
    assert answer.returncode == 0, answer.stderr


def test_names_that_do_not_exist_are_attribute_errors():
    import tl_loops

    with pytest.raises(AttributeError, match="no attribute 'mesure'"):
        tl_loops.mesure  # noqa: B018
    with pytest.raises(ImportError, match="mesure"):
        from tl_loops import mesure  # noqa: F401
    names = {}
    exec("from tl_loops import *", names)
    assert {*tl_loops.__all__} <= names.keys()


@pytest.mark.parametrize(
    ("moment", "kind"),
    [(0.2, signal.SIGINT), (1.5, signal.SIGTERM)],
)
def test_an_interrupt_while_a_command_is_imported_is_one_line(tmp_path, moment, kind):
    process = subprocess.Popen(
        [sys.executable, "-m", "tl_loops", "measure", "tl-loops-tiny", "--out", "p.json"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(moment)
    process.send_signal(kind)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "interrupted; nothing was saved" in err and "Traceback" not in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_command_interrupted_at_any_moment_says_what_is_saved(tmp_path, capsys):
    lines = tmp_path / "prompts.txt"
    lines.write_text("".join(f"{n} hops from Ann :\nAnn likes Bob .\n" for n in range(1, 6)))
    out, checkpoint = tmp_path / "p.json", tmp_path / "run.ckpt"

    def measure(out, checkpoint):
        return main([
            "measure", "tl-loops-tiny", "--prompts", str(lines), "--out", str(out),
            "--checkpoint", str(checkpoint), "--metrics", "sink_rate", "--n-iterations", "2",
            "--batch-size", "1", "--quiet",
        ])  # fmt: skip

    def interrupt(*_):
        if signal.getsignal(signal.SIGINT) is not handler:  # not before and after the command
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, interrupt)
    handler, draw = signal.getsignal(signal.SIGINT), random.Random(0)
    try:
        assert measure(out, checkpoint) == 0
        out.unlink()
        checkpoint.unlink()
        begin = time.perf_counter()
        assert measure(tmp_path / "whole.json", tmp_path / "whole.ckpt") == 0
        duration = time.perf_counter() - begin
        whole = (tmp_path / "whole.json").read_bytes()
        said = set()
        capsys.readouterr()
        for _ in range(N_MOMENTS // 4):
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(0, 1.1 * duration))
            try:
                code = measure(out, checkpoint)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            err = capsys.readouterr().err
            assert code == (130 if err else 0), (code, err)
            if err:
                assert len(err.splitlines()) == 1
                said.add(err)
            if err and err != "tl-loops: interrupted; nothing was saved\n":  # its options are read
                assert err.startswith("tl-loops measure: interrupted; ")
                saved = "same command goes on" in err
                assert checkpoint.exists() == (saved or "all is done" in err)
            if out.exists():
                assert out.read_bytes() == whole
                out.unlink()
                checkpoint.unlink()
            elif draw.random() < 0.5:
                checkpoint.unlink(missing_ok=True)
        assert said
        assert measure(out, checkpoint) == 0 and out.read_bytes() == whole
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"p.json", "run.ckpt", "whole.json", "whole.ckpt", "prompts.txt"}
    finally:
        signal.signal(signal.SIGALRM, before)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(
    ("moment", "files", "said"),
    [
        ("load", [], "nothing was saved; with --checkpoint FILE a run can go on"),
        ("load", ["--checkpoint"], "nothing was saved yet in --checkpoint"),
        ("measure", ["--checkpoint"], "what was measured is saved in --checkpoint; the same"),
        ("Path", ["--checkpoint", "--out"], "all is done and saved in --out.json"),
    ],
)
def test_what_an_interrupted_command_says(tmp_path, monkeypatch, capsys, moment, files, said):
    command = import_module("tl_loops.cli.measure")
    monkeypatch.chdir(tmp_path)

    def interrupted(*arguments, **options):
        if moment == "measure":
            command_measure(*arguments, **options)
        raise KeyboardInterrupt

    command_measure = command.measure
    monkeypatch.setattr(command, moment, interrupted)
    # The files are called as their options.
    paths = {"--checkpoint": "--checkpoint=--checkpoint", "--out": "--out=--out.json"}
    arguments = ["measure", "tl-loops-tiny", "--n-iterations", "1", "--quiet", "--metrics"]
    assert main([*arguments, "sink_rate", *(paths[file] for file in files)]) == 130
    err = capsys.readouterr().err
    assert err.startswith(f"tl-loops measure: interrupted; {said}") and len(err.splitlines()) == 1


def test_who_stops_reading_ends_a_command_without_a_word(capsys, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["models"]) == 0
    assert capsys.readouterr().err == ""


def test_metrics_are_listed_by_name(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # as in a pipe, where each row is one line
    assert main(["metrics"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed[0] == "metric" and not listed[1].strip("─")  # the head, and a rule
    assert listed[2:] == sorted(MEASUREMENTS)
