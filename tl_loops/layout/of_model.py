"""The layout of a model, or one error where it has none."""

from contextlib import AbstractContextManager, nullcontext

from tl_loops.errors import NoLoopError
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model


def layout_of(model: Model) -> LoopLayout | None:
    """The layout of a looped model; ``None`` for a plain HookedTransformer."""
    return getattr(model, "layout", None)


def require_layout(model: Model) -> LoopLayout:
    """The layout of a looped model.

    Raises:
        NoLoopError: The model has none.
    """
    layout = layout_of(model)
    if not isinstance(layout, LoopLayout):
        raise NoLoopError(
            f"{type(model).__name__} has no loop layout; expected a looped model, for example "
            "from tl_loops.LoopedTransformer.from_pretrained"
        )
    return layout


def with_iterations(model: Model, n_iterations: int | None) -> AbstractContextManager:
    """A block of code with another number of iterations; ``None``: with the model's own.

    Raises:
        NoLoopError: A number is given, and the model has no loop.
    """
    if n_iterations is None:
        return nullcontext()
    require_layout(model)
    return model.iterations(n_iterations)
