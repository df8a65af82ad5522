"""What an interrupt must not leave: hooks of the run, its number of iterations, its gradient mode.

``finally`` is not enough: an interrupt may come between adding a hook and noting it, while hooks
are taken away, or as a context manager is entered or left. What is done here needs no moment to be
spared, since the function that called the run sees every interrupt in it.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_HOLDERS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "fwd_hooks",  # these two of TransformerLens's hook points
    "bwd_hooks",
)
"""What holds the hooks of a module, in its ``vars``: a look at them all is most of a run's cost."""
CONTEXTS = "_iteration_contexts"
"""Where a model keeps the contexts that changed its number of iterations, the last one last; each
has a method ``leave``."""


def left_as_it_was(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let an interrupt at any moment of a function leave the model as it was before the call.

    That is: the hooks at every hook point, the number of iterations, and whether gradients are
    recorded. What another error leaves is the function's own.

    Args:
        function: Its first argument is a model.
    """

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        before = _Condition(args[0] if args else kwargs.get("model"))
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            if not isinstance(error, Exception):
                try:
                    before.restore()
                except BaseException:  # the user is impatient
                    before.restore()
                    raise
            raise

    return call


_FLAGS = ("context_level", "is_caching")
"""What a model says of the hooks that it holds."""


class _Condition:
    """What a run changes for its time. Restoring twice is the same as once.

    Args:
        model: A model of TransformerLens; anything else has no hooks.
    """

    def __init__(self, model: Any):
        self.gradients = torch.is_grad_enabled()
        self.model = model if hasattr(model, "hook_dict") else None
        if self.model is None:
            return
        # A bridge that is not looped keeps neither.
        self.flags = {name: getattr(model, name) for name in _FLAGS if hasattr(model, name)}
        self.n_contexts = len(vars(model).get(CONTEXTS, ()))
        self.modules = tuple(_hooked_modules(model))
        self.hooks = {module: _hooks(module) for module in self.modules if any(_lists(module))}

    def restore(self) -> None:
        """Take away what is new, and put back what is gone."""
        torch.set_grad_enabled(self.gradients)
        if self.model is None:
            return
        contexts = vars(self.model).get(CONTEXTS, [])
        while len(contexts) > self.n_contexts:
            contexts[-1].leave()
        for module in self.modules:
            if module in self.hooks:
                for now, before in zip(_lists(module), self.hooks[module], strict=True):
                    _set(now, before)
            else:
                for now in _lists(module):
                    now.clear()
        for name, value in self.flags.items():
            setattr(self.model, name, value)


def _hooked_modules(model: Any) -> Iterator[nn.Module]:
    """Where a run of the model adds hooks."""
    yield from model.hook_dict.values()
    bridge = vars(model).get("bridge")  # the engine of a bridged looped model
    if bridge is not None:
        yield from bridge.modules()


def _lists(module: nn.Module) -> list[Any]:
    held = vars(module)
    return [held[name] for name in _HOLDERS if name in held]


def _hooks(module: nn.Module) -> list[Any]:
    return [held.copy() for held in _lists(module)]


def _set(held: Any, before: Any) -> None:
    if held == before:
        return
    held.clear()
    held.extend(before) if isinstance(held, list) else held.update(before)
