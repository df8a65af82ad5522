"""What importing tl_loops changes in TransformerLens, and undoing it."""

import sys
from importlib import import_module
from typing import Any

from tl_loops.later import call_at_end, call_when_imported, late

_is_looped_name = late("tl_loops.loading.open", "is_looped_name")
_is_broken = late("tl_loops.loading.open", "is_broken")
_from_pretrained = late("tl_loops.model.looped", "LoopedTransformer.from_pretrained")


def register() -> None:
    """Let ``HookedTransformer.from_pretrained`` load looped names, and guard bridged loops.

    Importing tl_loops does this, as soon as TransformerLens is imported, too. Every other name
    reaches TransformerLens as before. Tools of TransformerLens that are wrong on a
    TransformerBridge of a looped model then raise; all other models pass. Calling it twice is
    the same as once.
    """
    upstream = import_module("tl_loops.upstream")
    # A config.json that nobody can read raises here: TransformerLens would say that it knows no
    # model of that name, and list the names that it knows.
    upstream.install_from_pretrained(
        lambda name: _is_looped_name(name) or _is_broken(name), _from_pretrained
    )
    upstream.install_guards(upstream.refuse_where_wrong)
    upstream.install_made_caches(_cache_class)


def unregister() -> None:
    """Undo :func:`register`; ``LoopedTransformer.from_pretrained`` stays the way in."""
    upstream = import_module("tl_loops.upstream")
    upstream.uninstall_from_pretrained()
    upstream.uninstall_guards()
    upstream.uninstall_made_caches()


def register_when_imported() -> None:
    """Register once TransformerLens has been imported; now, if it is imported already."""
    call_at_end("tl_loops.upstream", _register_tried)
    # Where this package imports TransformerLens, its part for that is under way, and goes on.
    call_when_imported("transformer_lens", _import_upstream)


def _import_upstream() -> None:
    import_module("tl_loops.upstream")


def _register_tried() -> None:
    import_module("tl_loops.upstream").warn_if_untried()
    register()


def _cache_class(model: Any) -> type | None:
    """The class of a looped model's caches; ``None`` for any other model."""
    looped = sys.modules.get("tl_loops.model.looped")
    if looped is None or not isinstance(model, getattr(looped, "LoopedTransformer", ())):
        return None
    return import_module("tl_loops.cache.cache").LoopedActivationCache
