"""What an interrupted command has saved, and how to go on from it."""

import argparse
import os


class Saved:
    """Looks at the files of a command; nothing else is asked, so that it can be told any time."""

    def __init__(self) -> None:
        self.options = argparse.Namespace(command=None)
        self.before: tuple[int, ...] | None = None

    def watch(self, options: argparse.Namespace) -> None:
        """Remember how the files were before.

        Args:
            options: Of the command.
        """
        self.before = _identity(getattr(options, "out", None))
        self.options = options

    def message(self) -> str:
        """One line."""
        command = self.options.command
        name = "tl-loops" if command is None else f"tl-loops {command}"
        return f"{name}: interrupted; {self._what_is_left()}"

    def _what_is_left(self) -> str:
        out = getattr(self.options, "out", None)
        checkpoint = getattr(self.options, "checkpoint", None)
        if _identity(out) != self.before:
            return f"all is done and saved in {out}"
        if checkpoint is None:
            again = "; with --checkpoint FILE a run can go on"
            return f"nothing was saved{again if hasattr(self.options, 'checkpoint') else ''}"
        if not os.path.exists(checkpoint):
            return f"nothing was saved yet in {checkpoint}; the same command starts again"
        return f"what was measured is saved in {checkpoint}; the same command goes on from it"


def _identity(path: str | None) -> tuple[int, ...] | None:
    """Another one after :func:`tl_loops.writing.write_whole`."""
    try:
        found = os.stat(path) if path is not None else None
    except OSError:
        return None
    return None if found is None else (found.st_ino, found.st_mtime_ns, found.st_size)
