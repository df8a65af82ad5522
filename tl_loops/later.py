"""What waits until a module has been imported, by whomever."""

import importlib.abc
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def late(module: str, name: str) -> Callable[..., Any]:
    """A function that is imported when it is called.

    Args:
        module: Its module.
        name: Its name there; after a dot that of a method.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found(*args, **kwargs)

    return call


def call_when_imported(name: str, call: Callable[[], None]) -> None:
    """Call a function once another package has been imported; at once if that has happened already.

    Args:
        name: Of the package.
        call: Called without arguments, once. Its errors are errors of that import.
    """
    if name in sys.modules:
        call()
    else:
        sys.meta_path.insert(0, _Finder(name, call))


_waiting: dict[str, list[Callable[[], None]]] = {}


def call_at_end(name: str, call: Callable[[], None]) -> None:
    """Call a function when a module of this package has come to its end.

    Args:
        name: Of the module, which calls :func:`at_end` there.
        call: Called without arguments, once.
    """
    _waiting.setdefault(name, []).append(call)


def at_end(name: str) -> None:
    """Call what waits for the end of a module.

    Args:
        name: Of the module.
    """
    for call in _waiting.get(name, ()):
        call()
    _waiting.pop(name, None)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as everybody else would, and goes once it is imported."""

    def __init__(self, name: str, call: Callable[[], None]):
        self.name, self.call = name, call

    def find_spec(
        self, fullname: str, path: Iterable[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        return found_by_others(self, fullname, path, target, self._imported)

    def _imported(self, module: ModuleType) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self.call()


def found_by_others(
    finder: importlib.abc.MetaPathFinder,
    fullname: str,
    path: Iterable[str] | None,
    target: ModuleType | None,
    then: Callable[[ModuleType], None],
) -> ModuleSpec | None:
    """The specification of a module as all other finders have it, and a call once it is imported.

    Args:
        finder: Who asks, and is passed over.
        fullname: As for ``find_spec``.
        path: As for ``find_spec``.
        target: As for ``find_spec``.
        then: Called with the module.
    """
    for other in sys.meta_path:
        find = getattr(other, "find_spec", None)
        spec = None if other is finder or find is None else find(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, then)
            return spec
    return None


class _Loader(importlib.abc.Loader):
    """Loads a module as its own loader does, and then calls a function with it."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]):
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own loader, which gives its resources.
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.then(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
