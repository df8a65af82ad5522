"""Caches that are made by hand, ``ActivationCache(dictionary, model)``, on looped models."""

from collections.abc import Callable
from typing import Any

from transformer_lens import ActivationCache


def install_made_caches(cache_class: Callable[[Any], type | None]) -> None:
    """Let ``ActivationCache(cache_dict, model)`` make a looped cache for a looped model.

    TransformerLens's own decompositions take every block for additive and know nothing of what
    happens between iterations.

    Args:
        cache_class: Gives a looped model's subclass of ActivationCache, and ``None`` for any other.
    """

    def make(cls: type, cache_dict: Any = None, model: Any = None, *_: Any, **__: Any) -> Any:
        looped = cache_class(model) if cls is ActivationCache else None
        return object.__new__(looped or cls)

    _set_new(make)


def uninstall_made_caches() -> None:
    """Undo :func:`install_made_caches`; without it, do nothing."""
    if "__new__" in vars(ActivationCache):
        # Once a class had a __new__, Python's own takes no arguments any more: a plain one stays.
        _set_new(lambda cls, *_, **__: object.__new__(cls))


def _set_new(new: Callable[..., Any]) -> None:
    cls: Any = ActivationCache
    cls.__new__ = new
