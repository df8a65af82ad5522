"""Statistics keep float32 also where the caller runs the model under autocast."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from tl_loops.arguments import checked

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Within, no product of matrices is rounded, whatever autocast is on around it."""
    with ExitStack() as stack:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def full_precision(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function compute in the dtypes that it says, whatever autocast is on around it.

    Its arguments are checked by their annotations; integers are no floating point numbers here.

    Args:
        function: Gives its result when it returns, not piece by piece. What it calls, such as a
            step of a model, runs without autocast as well.
    """
    of_kinds = checked(function, integers_as_floats=False)

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with without_autocast():
            return of_kinds(*args, **kwargs)

    return call
