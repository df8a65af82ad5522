"""What commands say: tables that fit the terminal, JSON, and files that go to standard output."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

STANDARD_OUTPUT = "-"
"""``--out -``."""


class _Console(Console):
    """Rich's, which leaves it to the command what happens when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()
) -> None:
    """Print a table that fits the terminal; in a file or a pipe each row is one line.

    Args:
        columns: The heads.
        rows: The cells; those that hold words are folded where they do not fit.
        numbers: Heads of columns that are aligned on the right and never folded.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        number = column in numbers
        justify = "right" if number else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=number)
    for row in rows:
        table.add_row(*row)
    _Console(file=sys.stdout, width=_width(), highlight=False, markup=False).print(table)


def _width() -> int:
    """Of the terminal, or what the environment says; a pipe has no end."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size((80, 24)).columns
    return 10_000


def print_json(value: Any) -> None:
    """Print data for another program."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def write_out(content: bytes) -> None:
    """Write a file to standard output, for ``--out -``."""
    stream = getattr(sys.stdout, "buffer", None)
    if stream is None:  # standard output was replaced by a stream of text
        sys.stdout.write(content.decode("utf-8"))
    else:
        sys.stdout.flush()
        stream.write(content)
        stream.flush()


def shows_progress(options: argparse.Namespace) -> bool:
    """Whether there are progress bars: on a terminal, unless ``--quiet``."""
    return not options.quiet and sys.stderr.isatty()
