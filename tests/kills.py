"""Running something in a process that is killed, or interrupting it here, at a chosen moment."""

import os
import signal
import sys
import time
import traceback

N_MOMENTS = int(os.environ.get("KILL_EXAMPLES", "20"))
"""How many random moments a test tries; ``make fuzz`` sets more."""

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}


def forked(action):
    """A process that runs an action and ends with 0, or with 1 where it raises."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def was_killed(child):
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the process that was to be killed failed by itself"
    return False


def killed_before_event(number, directory, action):
    """Run an action in a process that is killed right before its n-th file operation.

    Only operations on files below a directory count. Gives whether there were so many.
    """

    def counted():
        seen = 0

        def hook(event, arguments):
            nonlocal seen
            if event in FILE_EVENTS and str(directory) in " ".join(map(str, arguments[:2])):
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(hook)
        action()

    return was_killed(forked(counted))


def killed_after(seconds, action):
    """Run an action in a process that is killed after a time; whether it came so far."""
    child = forked(action)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return was_killed(child)


def interrupted_after(seconds, action, kind=KeyboardInterrupt):
    """Run an action, and raise an interrupt in it after a time; whether it came so far."""
    over = came = False

    def stop(number, frame):
        if not over:
            raise kind

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
        action()
        over = True
    except kind:
        came = True
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return came


RISKY = tuple(
    os.sep + name
    for name in (
        "contextlib.py",
        "_contextlib.py",
        "grad_mode.py",
        "hooks.py",
        "hook_points.py",
        "HookedRootModule.py",
        "temporary_hooks.py",
        "interrupts.py",
        "iterations.py",
        "cells.py",
        "read_positions.py",
        "weight_uses.py",
        "evaluation.py",
        "trajectory.py",
        os.path.join("attention", "__init__.py"),
        os.path.join("_functorch", "functional_call.py"),
        "stateless.py",
    )
)
"""Files that change a model for a while, and change it back."""


def interrupted_at(number, action, spared=(), files=RISKY):
    """Run an action, and interrupt it at the n-th line that it runs in some files.

    Always the same line, and always in the code that an interrupt could catch half-way.

    Args:
        number: Of the line; ``None``: run all of it.
        action: What is run.
        spared: Functions that are not interrupted themselves; what they call is.
        files: The ends of their paths.

    Returns:
        ``None`` where it was interrupted, else the number of lines.
    """
    seen = 0

    def line(frame, event, argument):
        nonlocal seen
        if event in ("line", "call"):
            if seen == number:
                sys.settrace(before)
                raise KeyboardInterrupt
            seen += 1
        return line

    def called(frame, event, argument):
        code = frame.f_code
        if not code.co_filename.endswith(files) or code.co_name in spared:
            return None
        return line(frame, event, argument)

    before = sys.gettrace()
    sys.settrace(called)
    try:
        action()
    except KeyboardInterrupt:
        return None
    finally:
        sys.settrace(before)
    return seen
