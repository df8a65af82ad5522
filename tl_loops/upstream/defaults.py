"""Arguments that most calls leave out, and those in place of a model's defaults for text."""

from typing import Any, Literal

from transformer_lens.utilities import LocallyOverridenDefaults as _LocallyOverridenDefaults

from tl_loops.arguments import argument

_KINDS = {"prepend_bos": bool, "padding_side": Literal["left", "right"]}


def given(name: str, value: Any, annotation: Any) -> Any:
    """One argument as an annotation takes it.

    ``None`` and booleans are taken at once, since a forward pass that asks may be compiled.

    Raises:
        ArgumentError: It is of another kind.
    """
    return value if value is None or isinstance(value, bool) else argument(name, value, annotation)


class LocallyOverridenDefaults(_LocallyOverridenDefaults):
    """TransformerLens's, which asserts; here the argument is named.

    Args:
        model: The model whose defaults are overridden.
        **overrides: ``prepend_bos`` and ``padding_side``; ``None``: the default stays.

    Raises:
        ArgumentError: An override is of another kind.
    """

    def __init__(self, model: Any, **overrides: Any):
        read = {name: given(name, value, _KINDS[name]) for name, value in overrides.items()}
        super().__init__(model, **read)
