"""What commands say: tables that fit the terminal, JSON, and files that go to standard output."""

import argparse
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

STANDARD_OUTPUT = "-"
"""``--out -``."""

SHORT = 20
"""Columns whose cells are no longer than this are not folded."""

GAP, INDENT = 3, 2
"""Room between columns, and before the cells that stand below a name."""

LABEL = re.compile(r" *\S+(?: \S+)* {2,}(?=\S)")
"""What a line begins with, up to a gap: its words go on after it."""


class _Console(Console):
    """Rich's, which leaves it to the command what happens when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()
) -> None:
    """Print a table that fits the terminal; in a file or a pipe each row is one line.

    The first cell of a row names it, and stays in one piece to be copied. Where a row does not fit
    beside it, the name stands on a line of its own, once for rows in succession that share it.

    Args:
        columns: The heads.
        rows: The cells; those of columns of words are folded between words where they do not fit.
        numbers: Heads of columns that are aligned on the right.
    """
    width = output_width()
    console = _Console(file=sys.stdout, width=width, highlight=False, markup=False)
    widths = _widths(columns, rows)
    folded = [any(size > SHORT for size in sizes) for sizes in widths]
    least = [
        max(map(_longest_word, column)) if folded[place] else max(widths[place])
        for place, column in enumerate(zip(columns, *rows, strict=True))
    ]
    least[0] = max(widths[0])
    if sum(least) + GAP * (len(columns) - 1) <= width:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for place, column in enumerate(columns):
            justify = "right" if column in numbers else "left"
            table.add_column(column, justify=justify, no_wrap=place == 0 or not folded[place])
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    _print_below_names(console, columns, rows, numbers)


def _print_below_names(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Sequence[str],
) -> None:
    """Print a narrow table: a line for each name, and below it the other cells."""
    name, *heads = columns
    heads = [head.replace("_", "\n") for head in heads]
    inner = console.width - INDENT
    sizes = [max(column) for column in _widths(heads, [row[1:] for row in rows])]
    gap = GAP if sum(sizes) + GAP * (len(sizes) - 1) <= inner else 1
    sizes[-1] = min(sizes[-1], inner - sum(sizes[:-1]) - gap * (len(sizes) - 1))

    def show(some: Sequence[Sequence[str]], style: str | None = None) -> None:
        table = Table.grid(padding=(0, gap, 0, 0))
        for column, size in zip(columns[1:], sizes, strict=True):
            justify = "right" if column in numbers else "left"
            table.add_column(width=size, justify=justify, vertical="bottom" if style else "top")
        for row in some:
            table.add_row(*row, style=style)
        console.print(Padding(table, (0, 0, 0, INDENT), expand=False))

    console.print(name, style="bold")
    show([heads], "bold")
    console.rule(characters="─", style="")
    for shared, some in groupby(rows, key=lambda row: row[0]):
        console.print(shared)
        show([row[1:] for row in some])


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[int]]:
    """Cells of the terminal that each head and cell takes, by column."""
    return [
        [max(map(cell_len, text.split("\n"))) for text in column]
        for column in zip(columns, *rows, strict=True)
    ]


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


def output_width() -> int:
    """Columns of the terminal, or what the environment says; a pipe has no end."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size((80, 24)).columns
    return 10_000


def print_lines(text: str) -> None:
    """Print lines that fit the terminal: words that do not go on below, after the label."""
    width = output_width()
    for line in text.splitlines():
        if cell_len(line) <= width:
            print(line)
            continue
        label = LABEL.match(line)
        place = len(label[0]) if label else len(line) - len(line.lstrip()) + INDENT
        indent = " " * place
        # Formulas and names are kept in one piece.
        print(
            textwrap.fill(
                line,
                width,
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
        )


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
