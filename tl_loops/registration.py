"""Making HookedTransformer.from_pretrained know the looped families."""

from tl_loops import loading
from tl_loops.model import LoopedTransformer
from tl_loops.upstream import install_from_pretrained, uninstall_from_pretrained


def register() -> None:
    """Let ``HookedTransformer.from_pretrained`` load looped names and directories.

    Importing tl_loops does this. Every other name reaches TransformerLens as before. Calling it
    twice is the same as once.
    """
    install_from_pretrained(loading.is_looped_name, LoopedTransformer.from_pretrained)


def unregister() -> None:
    """Undo :func:`register`; ``LoopedTransformer.from_pretrained`` stays the way in."""
    uninstall_from_pretrained()
