"""Asking before TransformerLens's tools run on a model, also those imported later.

A hook point of a bridged looped model fires once per iteration. Tools that keep one firing, or
edit all of them, give numbers that mean nothing, and no warning.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import update_wrapper
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from tl_loops.later import found_by_others

Check = Callable[[Any, str], None]
"""Raises if a tool, given by name, is wrong on a model."""

_TOOLS = "transformer_lens.tools.analysis"
GUARDED_FUNCTIONS: dict[str, tuple[str, ...]] = {
    "transformer_lens.patching": ("generic_activation_patch", "get_act_patch_"),
    "transformer_lens.head_detector": ("detect_head",),
    f"{_TOOLS}.logit_lens": ("logit_lens",),
    f"{_TOOLS}.attribution_patching": (
        "attribution_patch",
        "cache_activation_and_gradient",
        "capture_writer_outputs",
        "faithfulness",
    ),
    f"{_TOOLS}.direct_logit_attribution": ("direct_logit_attribution",),
    f"{_TOOLS}.direct_path_patching": ("get_act_patch_",),
}
"""Functions whose first argument is a model, by module; a name that ends in ``_`` is a prefix."""

GUARDED_METHODS: dict[tuple[str, str], tuple[str, ...]] = {
    ("transformer_lens.ActivationCache", "ActivationCache"): (
        "accumulated_resid",
        "decompose_resid",
        "stack_head_results",
        "stack_neuron_results",
        "get_full_resid_decomposition",
        "apply_ln_to_stack",
        "logit_attrs",
        "logit_lens",
    ),
    ("transformer_lens.model_bridge.transformer_bridge", "TransformerBridge"): (
        "all_composition_scores",
    ),
}
"""Methods, by module and class: of a cache, or of the model itself."""

_ABSENT = object()
_installed: list["_Guards"] = []


def install_guards(check: Check) -> None:
    """Let ``check`` look at every model that a guarded tool of TransformerLens is called with.

    Modules that are not imported yet are guarded when they are. Names that ``__main__`` or
    TransformerLens itself has imported already are replaced, too; other modules that took a
    function before keep the unguarded one. Installing twice is the same as once.

    Args:
        check: Called with the model and the tool's name; raises where the tool is wrong.
    """
    if not _installed:
        guards = _Guards(check)
        _installed.append(guards)
        guards.start()


def uninstall_guards() -> None:
    """Undo :func:`install_guards`; without it, do nothing."""
    while _installed:
        _installed.pop().stop()


class _Guards(importlib.abc.MetaPathFinder):
    """The guards, and what finds modules that are to be guarded once they are imported."""

    def __init__(self, check: Check):
        self.check = check
        self.replaced: list[tuple[Any, Any]] = []
        self.methods: list[tuple[type, str, Any]] = []

    def start(self) -> None:
        for name in dict.fromkeys([*GUARDED_FUNCTIONS, *(m for m, _ in GUARDED_METHODS)]):
            if name in sys.modules:
                self.guard(sys.modules[name])
        sys.meta_path.insert(0, self)

    def stop(self) -> None:
        sys.meta_path.remove(self)
        for original, guarded in self.replaced:
            _replace_everywhere(guarded, original)
        for owner, name, original in self.methods:
            setattr(owner, name, original)

    def find_spec(
        self, fullname: str, path: Iterable[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module that is to be guarded as everybody else would, and guard it after."""
        if fullname not in GUARDED_FUNCTIONS and fullname not in {m for m, _ in GUARDED_METHODS}:
            return None
        return found_by_others(self, fullname, path, target, self._imported)

    def _imported(self, module: ModuleType) -> None:
        if self in _installed:
            self.guard(module)

    def guard(self, module: ModuleType) -> None:
        """Guard the tools of a module."""
        for name, tool in _tools(module):
            guarded = self._guarded_function(tool, name, module.__name__)
            self.replaced.append((tool, guarded))
            _replace_everywhere(tool, guarded)
        for (owner_module, owner_name), names in GUARDED_METHODS.items():
            if owner_module == module.__name__:
                owner = getattr(module, owner_name)
                for name in names:
                    original = vars(owner).get(name, _ABSENT)
                    if original is not _ABSENT:
                        self.methods.append((owner, name, original))
                        setattr(owner, name, self._guarded_method(original, name))

    def _guarded_function(self, tool: Callable, name: str, module: str) -> Callable:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.check(args[0] if args else kwargs.get("model"), name)
            return tool(*args, **kwargs)

        update_wrapper(guarded, tool)
        guarded.__name__, guarded.__module__ = name, module
        return guarded

    def _guarded_method(self, method: Callable, name: str) -> Callable:
        def guarded(subject: Any, *args: Any, **kwargs: Any) -> Any:
            self.check(vars(subject).get("model", subject), name)
            return method(subject, *args, **kwargs)

        return update_wrapper(guarded, method)


def _tools(module: ModuleType) -> Iterator[tuple[str, Callable]]:
    wanted = GUARDED_FUNCTIONS.get(module.__name__, ())
    for name, value in list(vars(module).items()):
        prefixes = tuple(prefix for prefix in wanted if prefix.endswith("_"))
        if callable(value) and (name in wanted or (prefixes and name.startswith(prefixes))):
            yield name, value


def _replace_everywhere(old: Any, new: Any) -> None:
    """Rebind a function wherever TransformerLens or the notebook holds it under a name."""
    for name, module in list(sys.modules.items()):
        if name == "__main__" or name.split(".")[0] == "transformer_lens":
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)
