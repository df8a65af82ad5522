"""Looped (recurrent-depth) transformer language models inside TransformerLens.

Importing this package registers the looped families, so that
``HookedTransformer.from_pretrained("tl-loops-tiny", n_iterations=8)`` works. Every pass of every
recurrent layer then has hook points of its own, over weights that exist once.

The public names are imported when the first one is used (PEP 562), and the families are registered
once TransformerLens has been imported, by whomever: so the command line starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tl_loops.registration import register_when_imported
from tl_loops.version import __version__ as __version__

if TYPE_CHECKING:
    from tl_loops.public import *  # noqa: F403
    from tl_loops.public import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = import_module("tl_loops.public")
        globals().update({given: getattr(public, given) for given in public.__all__})
        globals()["__all__"] = public.__all__
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *import_module("tl_loops.public").__all__})


register_when_imported()
