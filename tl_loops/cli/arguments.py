"""The commands and their options.

To add a command, write ``tl_loops/cli/<name>.py`` with a function ``run(options)`` that gives an
exit code or ``None``, and put a line into :data:`COMMANDS`.
"""

import argparse
from collections.abc import Callable

from tl_loops.version import __version__

EMBEDDED = "tl-loops-tiny"


def parser() -> argparse.ArgumentParser:
    """What reads the arguments of a command; ``command`` of its result is the command's name."""
    whole = argparse.ArgumentParser(
        prog="tl-loops", description="Looped transformer language models, iteration by iteration."
    )
    whole.add_argument("--version", action="version", version=f"tl-loops {__version__}")
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (help_line, options) in COMMANDS.items():
        command = commands.add_parser(name, help=help_line, description=help_line)
        command.set_defaults(command=name)
        for add in options:
            add(command)
    return whole


def _any_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="a name, or a checkpoint directory")


def _directory(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="DIRECTORY", help="a checkpoint directory, or a name")


def _model_or_embedded(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", metavar="MODEL", nargs="?", default=EMBEDDED, help=f"default: {EMBEDDED}"
    )


def _measure(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--metrics", nargs="+", metavar="METRIC", help="which metrics: see tl-loops metrics"
    )
    command.add_argument(
        "--out",
        help="file to write: .parquet, .csv or .json; - writes CSV to standard output; without it "
        "a summary is printed",
    )
    command.add_argument("--rows", action="store_true", help="print a row per block, no summary")
    command.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="prompts of equal length in one pass; default: 8",
    )
    command.add_argument("--checkpoint", help="file that lets a killed run resume")
    command.add_argument(
        "--shard",
        metavar="K/N",
        nargs="?",
        const="auto",
        help="only batches of shard K of N, into --checkpoint; without K/N by RANK and WORLD_SIZE "
        "or the task of a SLURM array",
    )
    command.add_argument(
        "--tokens", metavar="FILE", help="prompts as JSON lines, each a list of token ids"
    )
    command.add_argument(
        "--dataset",
        metavar="NAME",
        help="a Hugging Face data set, or a .parquet, .json or .jsonl file; with --column",
    )
    command.add_argument("--column", help="the column of --dataset with texts or token ids")
    command.add_argument("--split", help="the split of --dataset")
    command.add_argument("--subset", help="the configuration of --dataset")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N rows")


def _merge(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", metavar="FILE", nargs="+", help="all shards of one run")
    command.add_argument(
        "--out",
        required=True,
        help="a profile (.parquet, .csv or .json), or with another ending a checkpoint",
    )


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="as JSON, for another program")


def _report(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", default="report.html", help="default: report.html; - for standard output"
    )


def _prompts(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--prompts", metavar="FILE", help="text (one per line) or JSON lines; else a sample"
    )
    command.add_argument(
        "--quiet", action="store_true", help="no progress bars, which only a terminal gets"
    )


def _loading(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--n-iterations",
        type=int,
        metavar="N",
        help="passes through the core; default: those of the model",
    )
    command.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16", "float64"),
        metavar="TYPE",
        help="of the weights: float32 (default), bfloat16, float16 or float64",
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps, ...; default: the best one")


Options = Callable[[argparse.ArgumentParser], None]

COMMANDS: dict[str, tuple[str, tuple[Options, ...]]] = {
    "models": ("list the models that load by name", (_json,)),
    "metrics": ("list the metrics that measure knows by name", (_json,)),
    "check": ("try what a checkpoint's model promises", (_directory, _json, _loading)),
    "measure": ("measure prompts into a profile", (_any_model, _measure, _prompts, _loading)),
    "merge": ("merge the shards of a run", (_merge,)),
    "report": (
        "write one self-contained HTML page",
        (_model_or_embedded, _report, _prompts, _loading),
    ),
}
"""Every command: what it does in one line, and what adds its options."""
