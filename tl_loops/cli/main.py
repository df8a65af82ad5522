"""Running one command: what it says, and with which exit code it ends."""

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from errno import ENOSPC
from importlib import import_module

from tl_loops.cli.arguments import parser
from tl_loops.cli.interrupts import Interrupts
from tl_loops.cli.saved import Saved
from tl_loops.errors import LoopedSemanticsError

USER_ERRORS = (ValueError, OSError, ImportError, LoopedSemanticsError)
"""What bad input raises; anything else is a fault of the program and keeps its traceback."""

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What stands after ``tl-loops``; ``None``: the process's own, which ends with it.

    Returns:
        Exit code: 0; 1 when a check failed; 2 after bad input, of which one line on standard error
        says what is wrong and where; or 130 after Ctrl-C or SIGTERM, with one line that says what
        was saved. No half-written file is left.
    """
    saved = Saved()
    with Interrupts(saved.message, INTERRUPTED, of_process=arguments is None) as interrupts:
        try:
            code = _run(arguments, saved, interrupts)
            interrupts.over = True
            return code
        except KeyboardInterrupt:
            return interrupts.end()


def _run(arguments: Sequence[str] | None, saved: Saved, interrupts: Interrupts) -> int:
    options = parser().parse_args(arguments)
    saved.watch(options)
    try:
        command = import_module(f"tl_loops.cli.{options.command}")
        interrupts.raise_from_now()
        with warnings.catch_warnings():
            # Here nobody chose the loading flags that the warning is about.
            warnings.filterwarnings("ignore", message=".*not applied, since the numbers")
            code = command.run(options) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _write_nowhere()
        return 0
    except USER_ERRORS as error:
        said = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno == ENOSPC and error.filename is None:
            said += ": 'standard output'"  # every file that this package writes is named
            _write_nowhere()
        print(f"tl-loops {options.command}: {said}", file=sys.stderr)
        return 2


def _write_nowhere() -> None:
    """What nobody can read or store would be written again when the process ends."""
    with suppress(OSError, ValueError):  # no real stream, as in a test
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
