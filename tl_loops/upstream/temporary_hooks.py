"""Hooks for a block of code."""

from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, TypeVar

Direction = Literal["fwd", "bwd"]
Owner = TypeVar("Owner")


class TemporaryHooks(Generic[Owner]):
    """TransformerLens's context manager of hooks, as an object in place of a generator.

    A generator that an interrupt cut off would go on when its memory is freed, possibly during
    another run, and take away that run's hooks.

    Args:
        model: The model.
        forward: Names, or predicates on names, and hooks.
        backward: The same for gradients.
        reset_hooks_end: Whether they are taken away at the end.
        clear_contexts: Whether contexts of hook points are cleared, too.
    """

    def __init__(
        self,
        model: Owner,
        forward: Sequence[tuple[Any, Callable]],
        backward: Sequence[tuple[Any, Callable]],
        reset_hooks_end: bool,
        clear_contexts: bool,
    ):
        self.model: Any = model
        self.hooks: tuple[tuple[Direction, Sequence[tuple[Any, Callable]]], ...] = (
            ("fwd", forward),
            ("bwd", backward),
        )
        self.reset_hooks_end, self.clear_contexts = reset_hooks_end, clear_contexts

    def __enter__(self) -> Owner:
        self.model.context_level += 1
        try:
            for direction, hooks in self.hooks:
                for name, hook in hooks:
                    self.model._enable_hook(name=name, hook=hook, dir=direction)
        except BaseException:
            self.__exit__()
            raise
        return self.model

    def __exit__(self, *error: object) -> None:
        level = self.model.context_level
        try:
            self._take_away(level)
        except BaseException:  # an interrupt meanwhile
            self._take_away(level)
            raise
        finally:
            self.model.context_level = level - 1

    def _take_away(self, level: int) -> None:
        if self.reset_hooks_end:
            self.model.reset_hooks(self.clear_contexts, including_permanent=False, level=level)
