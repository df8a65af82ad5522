"""What importing tl_loops changes in TransformerLens, and undoing it."""

from tl_loops.cache.cache import LoopedActivationCache
from tl_loops.loading import open as loading
from tl_loops.model.looped import LoopedTransformer
from tl_loops.upstream import (
    install_from_pretrained,
    install_guards,
    install_made_caches,
    uninstall_from_pretrained,
    uninstall_guards,
    uninstall_made_caches,
)
from tl_loops.upstream.refusal import refuse_where_wrong


def register() -> None:
    """Let ``HookedTransformer.from_pretrained`` load looped names, and guard bridged loops.

    Importing tl_loops does this. Every other name reaches TransformerLens as before. Tools of
    TransformerLens that are wrong on a TransformerBridge of a looped model then refuse it; all
    other models pass. Calling it twice is the same as once.
    """
    # A config.json that nobody can read is refused here: TransformerLens would say that it knows no
    # model of that name, and list the names that it knows.
    install_from_pretrained(
        lambda name: loading.is_looped_name(name) or loading.is_broken(name),
        LoopedTransformer.from_pretrained,
    )
    install_guards(refuse_where_wrong)
    install_made_caches(lambda model: isinstance(model, LoopedTransformer), LoopedActivationCache)


def unregister() -> None:
    """Undo :func:`register`; ``LoopedTransformer.from_pretrained`` stays the way in."""
    uninstall_from_pretrained()
    uninstall_guards()
    uninstall_made_caches()
