"""What an interrupt must not leave: hooks, iterations, modes and stand-ins of weights of a run.

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
_KERNELS = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")


def left_as_it_was(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let an interrupt at any moment of a function leave the model as it was before the call.

    That is: the hooks of every module, the number of iterations (of a bridge also that of the
    Hugging Face model that it holds), training mode, which tensors stand
    as weights, whether gradients are recorded, and which kernels attention may take. What another
    error leaves is the function's own.

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
        kernels = torch.backends.cuda
        self.kernels = {name: getattr(kernels, f"{name}_enabled")() for name in _KERNELS}
        self.model = model if hasattr(model, "hook_dict") else None
        if self.model is None:
            return
        # A bridge that is not looped keeps neither.
        self.flags = {name: getattr(model, name) for name in _FLAGS if hasattr(model, name)}
        self.n_contexts = len(vars(model).get(CONTEXTS, ()))
        counts = getattr(model, "counts_of_a_run", tuple)()  # of an unrolled bridge
        self.counts = [(held, name, getattr(held, name)) for held, name in counts]
        self.modules = tuple(_modules(model))
        held = [(module, vars(module)) for module in self.modules]
        self.training = [fields["training"] for _, fields in held]
        self.weights = {
            m: dict(fields["_parameters"]) for m, fields in held if fields["_parameters"]
        }
        hooked = (module for module, fields in held if any(map(fields.get, _HOLDERS)))
        self.hooks = {module: _hooks(module) for module in hooked}

    def restore(self) -> None:
        """Take away what is new, and put back what is gone."""
        torch.set_grad_enabled(self.gradients)
        for name, value in self.kernels.items():
            getattr(torch.backends.cuda, f"enable_{name}")(value)
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
        for module, training in zip(self.modules, self.training, strict=True):
            module.training = training
        for module, weights in self.weights.items():
            module._parameters.update(weights)
        for held, name, value in self.counts:
            setattr(held, name, value)
        for name, value in self.flags.items():
            setattr(self.model, name, value)


def _modules(model: Any) -> Iterator[nn.Module]:
    """Every module that a run of the model may change for a while."""
    bridge = vars(model).get("bridge")  # the engine of a bridged looped model
    # Each run takes this walk: torch's own makes the name of every module on its way.
    found: dict[nn.Module | None, None] = dict.fromkeys(model.hook_dict.values())
    waiting: list[nn.Module | None] = [*found, model, bridge]
    for module in waiting:  # which grows
        inside = () if module is None else module._modules.values()
        if inside:
            waiting.extend(child for child in inside if child not in found)
            found.update(dict.fromkeys(inside))
    found.update(dict.fromkeys((model, bridge)))
    return (module for module in found if module is not None)


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
