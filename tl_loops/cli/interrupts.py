"""Ctrl-C and SIGTERM: one line and exit code 130, at whatever moment they come."""

import _thread
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AFTER_THE_HOOK_S = 1e-3  # an error in a hook of the interpreter is printed and forgotten


class Interrupts:
    """What the two signals do from the start of a command until its end.

    While modules are imported nothing has been computed, and an exception may be lost in a foreign
    import; there they end the process at once. Later they raise ``KeyboardInterrupt``, so that
    files are closed and removed; a second one, while that is done, ends the process.

    Args:
        message: Gives the line to say.
        code: The exit code to end with.
        of_process: Whether the process ends with the command. Otherwise the signals always raise,
            and at the end mean what they meant before.
    """

    def __init__(self, message: Callable[[], str], code: int, of_process: bool):
        self.message, self.code, self.of_process = message, code, of_process
        self.raises = not of_process
        self.seen = self.over = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # no other may set signals
            for number in _SIGNALS:
                # A command that was started to run in the background may ignore Ctrl-C.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._handle)
        self.unraisable = sys.unraisablehook
        sys.unraisablehook = self._again
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over = True
        if self.of_process:
            return
        for number, handler in self.before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self.unraisable

    def raise_from_now(self) -> None:
        """Everything is imported: from now on the signals raise."""
        self.raises = True

    def end(self) -> int:
        """Say the line, and give the exit code."""
        self.over = True
        if sys.stderr.isatty():
            os.write(2, b"\n")  # after the ^C
        print(self.message(), file=sys.stderr, flush=True)
        return self.code

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.over:
            return
        if self.of_process and (self.seen or not self.raises):
            os.write(2, f"{self.message()}\n".encode())
            os._exit(self.code)
        if self._in_hook(frame):
            self._raise_later()
            return
        self.seen = True
        raise KeyboardInterrupt

    def _again(self, unraisable: Any) -> None:
        """An interrupt that came while an object was deleted is raised after it."""
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            self.unraisable(unraisable)
        elif not self.over:
            self._raise_later()

    def _in_hook(self, frame: FrameType | None) -> bool:
        """Whether ``frame`` runs within ``_again``, whose errors are lost as well."""
        again = inspect.unwrap(Interrupts._again).__code__  # without checks of annotations
        while frame is not None and frame.f_code is not again:
            frame = frame.f_back
        return frame is not None

    def _raise_later(self) -> None:
        later = threading.Timer(_AFTER_THE_HOOK_S, self._raise_again)
        later.daemon = True
        later.start()

    def _raise_again(self) -> None:
        if not self.over:
            self.seen = False
            _thread.interrupt_main()
