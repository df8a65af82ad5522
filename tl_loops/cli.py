"""The command line: tl-loops models, check, measure, report."""

import argparse
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tl_loops.errors import LoopedSemanticsError
from tl_loops.loading.catalogue import catalogue
from tl_loops.measurements.formats import check_file_ending
from tl_loops.measurements.measure import measure as measure_prompts
from tl_loops.measurements.registry import MEASUREMENTS
from tl_loops.model.check import check as check_model
from tl_loops.model.looped import LoopedTransformer
from tl_loops.report import default_prompts, write_report
from tl_loops.tasks.prompts import PromptText, read_prompts
from tl_loops.version import __version__
from tl_loops.writing import check_writable

USER_ERRORS = (ValueError, OSError, ImportError, LoopedSemanticsError)
"""What bad input raises; anything else is a fault of the program and keeps its traceback."""

EMBEDDED = "tl-loops-tiny"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What stands after ``tl-loops``; ``None``: the process's own.

    Returns:
        Exit code: 0; 1 when a check failed; 2 after bad input, of which one line on standard error
        says what is wrong and where; or 130 after Ctrl-C or SIGTERM, with one line that says what
        was saved. No half-written file is left.
    """
    options = _parser().parse_args(arguments)
    command: Callable[[Any], int | None] = options.command
    try:
        with _ended_by_sigterm(), warnings.catch_warnings():
            # Here nobody chose the loading flags that the warning is about.
            warnings.filterwarnings("ignore", message=".*not applied, since the numbers")
            return command(options) or 0
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        print(f"\ntl-loops {options.name}: interrupted; {_what_is_left(options)}", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        print(f"tl-loops {options.name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set what a signal does
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _what_is_left(options: argparse.Namespace) -> str:
    checkpoint = getattr(options, "checkpoint", None)
    if checkpoint is None:
        again = "; with --checkpoint FILE a run can go on" if options.name == "measure" else ""
        return f"nothing was saved{again}"
    if not Path(checkpoint).exists():
        return f"nothing was saved yet in {checkpoint}"
    return f"what was measured is saved in {checkpoint}; the same command goes on from it"


def models(options: argparse.Namespace) -> None:
    """List the names that load, with notation, parameters and source."""
    rows = [("name", "notation", "parameters", "source")]
    for entry in catalogue():
        cfg = entry.config()
        rows.append((entry.name, cfg.notation, f"{cfg.n_params:,}", entry.source))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for name, notation, parameters, source in rows:
        print(f"{name:<{widths[0]}}  {notation:<{widths[1]}}  {parameters:>{widths[2]}}  {source}")


def check(options: argparse.Namespace) -> int:
    """Load a checkpoint, try what a looped model promises, and say what holds."""
    _check_iterations(options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no tokenizer files")
        report = check_model(options.model, options.n_iterations, options.dtype)
    print(report)
    return 0 if report.passed else 1


def measure(options: argparse.Namespace) -> None:
    """Measure prompts and write (or print) the profile."""
    if options.out is not None:
        check_file_ending(options.out)
        _check_place(options.out)
    if options.checkpoint is not None:
        check_writable(options.checkpoint)
    prompts = _prompts(options)
    model = _load(options)
    if prompts is None:
        prompts = list(default_prompts(model).evaluated)
    arguments: dict[str, Any] = (
        {} if options.metrics is None else {"metrics": tuple(options.metrics)}
    )
    profile = measure_prompts(
        model,
        [p.text for p in prompts],
        batch_size=options.batch_size,
        checkpoint=options.checkpoint,
        progress=not options.quiet,
        **arguments,
    )
    if options.out is None:
        print(profile.to_frame().to_string(index=False))
    else:
        profile.save(options.out)
        print(Path(options.out).resolve())


def report(options: argparse.Namespace) -> None:
    """Write the report."""
    _check_place(options.out)
    prompts = _prompts(options)
    model = _load(options)
    print(write_report(model, options.out, prompts, progress=not options.quiet))


def _check_place(out: str) -> None:
    """Refuse a place that cannot be written before anything is computed."""
    path = Path(out)
    if path.is_dir():
        raise ValueError(f"--out {out} is a directory; give a file")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"--out {out}: the directory {path.resolve().parent} does not exist")
    check_writable(out)


def _prompts(options: argparse.Namespace) -> list[PromptText] | None:
    return None if options.prompts is None else read_prompts(options.prompts)


def _load(options: argparse.Namespace) -> Any:
    _check_iterations(options)
    return LoopedTransformer.from_pretrained_no_processing(
        options.model, n_iterations=options.n_iterations, dtype=options.dtype
    )


def _check_iterations(options: argparse.Namespace) -> None:
    if options.n_iterations is not None and options.n_iterations < 1:
        raise ValueError(f"--n-iterations must be at least 1, got {options.n_iterations}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tl-loops", description="Looped transformer language models, iteration by iteration."
    )
    parser.add_argument("--version", action="version", version=f"tl-loops {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    listing = commands.add_parser("models", help="list the models that load by name")
    listing.set_defaults(command=models, name="models")

    checking = commands.add_parser("check", help="try what a checkpoint's model promises")
    checking.add_argument("model", metavar="DIRECTORY", help="a checkpoint directory, or a name")
    checking.set_defaults(command=check, name="check")

    measuring = commands.add_parser("measure", help="measure prompts into a profile")
    measuring.add_argument("model", metavar="MODEL", help="a name, or a checkpoint directory")
    known = ", ".join(sorted(MEASUREMENTS))
    measuring.add_argument(
        "--metrics", nargs="+", metavar="METRIC", help=f"which metrics; known: {known}"
    )
    measuring.add_argument("--out", help="file to write: .parquet, .csv or .json; else a table")
    measuring.add_argument(
        "--batch-size", type=int, default=8, help="prompts of equal length in one pass"
    )
    measuring.add_argument("--checkpoint", help="file that lets a killed run resume")
    measuring.set_defaults(command=measure, name="measure")

    reporting = commands.add_parser("report", help="write one self-contained HTML page")
    reporting.add_argument(
        "model", metavar="MODEL", nargs="?", default=EMBEDDED, help=f"default: {EMBEDDED}"
    )
    reporting.add_argument("--out", default="report.html", help="default: report.html")
    reporting.set_defaults(command=report, name="report")

    for command in (measuring, reporting):
        command.add_argument(
            "--prompts", metavar="FILE", help="text (one a line) or JSON lines; else a sample"
        )
        command.add_argument("--quiet", action="store_true", help="no progress bars")
    for command in (checking, measuring, reporting):
        command.add_argument(
            "--n-iterations", type=int, metavar="N", help="passes through the core"
        )
        command.add_argument(
            "--dtype",
            default="float32",
            choices=("float32", "bfloat16", "float64"),
            help="of the weights",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
