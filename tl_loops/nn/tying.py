"""Distinct modules over the same parameters."""

from typing import TypeVar

from torch import nn

from tl_loops.upstream import HookPoint

Module = TypeVar("Module", bound=nn.Module)

_BOOKKEEPING = frozenset(nn.Module().__dict__) | {"name"}


def tied_copy(module: Module) -> Module:
    """A copy of a module tree with hook points of its own over the very same parameters.

    Tying is by Parameter, never by module instance: ``named_modules`` drops repeated instances,
    and with them the names of their hooks. Hooks of the original are not copied.
    """
    copy = module.__class__.__new__(module.__class__)
    nn.Module.__init__(copy)
    copy.training = module.training
    for key, value in module.__dict__.items():
        if key not in _BOOKKEEPING:
            object.__setattr__(copy, key, value)
    copy._parameters.update(module._parameters)
    copy._buffers.update(module._buffers)
    copy._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        if isinstance(child, HookPoint):
            copy._modules[name] = HookPoint()
        else:
            copy._modules[name] = None if child is None else tied_copy(child)
    return copy
