"""Letting ``HookedTransformer.from_pretrained`` hand looped names over."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from tl_loops.upstream.classes import HookedTransformer

Loader = Callable[..., Any]
_ORIGINALS: dict[str, Any] = {}


def install_from_pretrained(is_looped: Callable[[str], bool], loader: Loader) -> None:
    """Let ``HookedTransformer.from_pretrained`` hand looped names to ``loader``.

    Calls on a subclass, and all other names, reach TransformerLens unchanged (on 4.x, the
    stand-in, which says what to call). Installing twice is the same as once.

    Args:
        is_looped: Tells from the first argument whether it names a looped model.
        loader: Called with all arguments for those that do; for ``from_pretrained_no_processing``
            with the folding and centring flags set to ``False``.
    """
    if _ORIGINALS:
        return
    for name, preset in (
        ("from_pretrained", {}),
        (
            "from_pretrained_no_processing",
            {
                "fold_ln": False,
                "center_writing_weights": False,
                "center_unembed": False,
                "fold_value_biases": False,
                "refactor_factored_attn_matrices": False,
            },
        ),
    ):
        original = HookedTransformer.__dict__[name]
        _ORIGINALS[name] = original
        setattr(HookedTransformer, name, _dispatcher(original, is_looped, loader, preset))


def uninstall_from_pretrained() -> None:
    """Undo :func:`install_from_pretrained`; without it, do nothing."""
    for name, original in _ORIGINALS.items():
        setattr(HookedTransformer, name, original)
    _ORIGINALS.clear()


def _dispatcher(
    original: Any, is_looped: Callable[[str], bool], loader: Loader, preset: dict[str, bool]
) -> Any:
    function = original.__func__

    @wraps(function)
    def from_pretrained(cls: type, model_name: str, *args: Any, **kwargs: Any) -> Any:
        if cls is HookedTransformer and is_looped(model_name):
            return loader(model_name, *args, **{**kwargs, **preset})
        return function(cls, model_name, *args, **kwargs)

    return classmethod(from_pretrained)
