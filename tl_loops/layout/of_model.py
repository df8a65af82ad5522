"""The layout of a model, or one refusal where it has none."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tl_loops.layout.layout import LoopLayout


def layout_of(model: Any) -> LoopLayout | None:
    """The layout of a looped model; ``None`` for a plain HookedTransformer."""
    return getattr(model, "layout", None)


def require_layout(model: Any) -> LoopLayout:
    """The layout of a looped model.

    Raises:
        TypeError: The model has none.
    """
    layout = getattr(model, "layout", None)
    if not isinstance(layout, LoopLayout):
        raise TypeError(
            f"{type(model).__name__} has no loop layout; expected a looped model, for example "
            "from tl_loops.LoopedTransformer.from_pretrained"
        )
    return layout


def with_iterations(model: Any, n_iterations: int | None) -> AbstractContextManager:
    """A block of code with another number of iterations; ``None``: with the model's own."""
    return nullcontext() if n_iterations is None else model.iterations(n_iterations)
