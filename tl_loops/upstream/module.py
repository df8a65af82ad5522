"""Modules whose submodules are plain attributes."""

from typing import Any

from torch import nn


class Module(nn.Module):
    """An ``nn.Module`` that finds its submodules as Python finds any attribute.

    ``nn.Module.__getattr__`` is asked after Python has looked everywhere else, and takes as long as
    a small operation of torch. A block looks for some thirty submodules in a forward pass.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._modules:
            self.__dict__[name] = value

    def __delattr__(self, name: str) -> None:
        if name in self._modules:
            self.__dict__.pop(name, None)
        super().__delattr__(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As in torch."""
        super().add_module(name, module)
        self.__dict__[name] = module
