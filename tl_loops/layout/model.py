"""What the analysis tools need of a model, whatever its class."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import nn

from tl_loops.arguments import expect


@runtime_checkable
class Model(Protocol):
    """A model with hook points: TransformerLens's, its bridges, and every looped one.

    Attributes:
        cfg: Its config.
        tokenizer: Its tokenizer, or ``None``.
    """

    # Members are for readers and type checkers. At run time every object passes, so that a model
    # that lacks something gets the message of the function that needs it.
    if TYPE_CHECKING:
        cfg: Any
        tokenizer: Any

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Run it on tokens or text."""
            ...

        @property
        def hook_dict(self) -> Mapping[str, Any]:
            """Its hook points by canonical name."""
            ...

        def hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
            """Hooks for a block of code."""
            ...

        def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
            """Run it with hooks."""
            ...

        def run_with_cache(self, *args: Any, **kwargs: Any) -> Any:
            """Run it and keep activations."""
            ...

        def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
            """Its weights."""
            ...

        def to_tokens(self, *args: Any, **kwargs: Any) -> Any:
            """Text as tokens."""
            ...

        def to_string(self, *args: Any, **kwargs: Any) -> Any:
            """Tokens as text."""
            ...

        def to_str_tokens(self, *args: Any, **kwargs: Any) -> Any:
            """Text or tokens as a list of strings."""
            ...

        def to_single_str_token(self, *args: Any, **kwargs: Any) -> Any:
            """One token as a string."""
            ...

        def __getattr__(self, name: str) -> Any:
            """What only some models have: a layout, ``ln_final``, an exit gate, ..."""
            ...


def norm_of_iterations(model: Model) -> Any:
    """The norm that ends an iteration: the final norm, or one of its own without a gain."""
    own = model.cfg.readout.own_norm_between_iterations
    return model.iter[0].norm if own else model.ln_final


expect(
    Model,
    lambda value: hasattr(value, "cfg") and hasattr(value, "run_with_hooks"),
    "a model with hook points, such as a LoopedTransformer or a HookedTransformer",
    "no loop layout and no hook points",
)
