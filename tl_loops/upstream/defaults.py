"""Arguments of one call in place of a model's defaults for text."""

from typing import Any, Literal

from transformer_lens.utilities import LocallyOverridenDefaults as _LocallyOverridenDefaults

from tl_loops.arguments import argument

_KINDS = {"prepend_bos": bool, "padding_side": Literal["left", "right"]}


class LocallyOverridenDefaults(_LocallyOverridenDefaults):
    """TransformerLens's, which asserts; here the argument is named.

    Args:
        model: The model whose defaults are overridden.
        **overrides: ``prepend_bos`` and ``padding_side``; ``None``: the default stays.

    Raises:
        ArgumentError: An override is of another kind.
    """

    def __init__(self, model: Any, **overrides: Any):
        for name, value in overrides.items():
            # At once for what needs no reading, since a forward pass may be compiled.
            if value is not None and not isinstance(value, bool):
                overrides[name] = argument(name, value, _KINDS[name])
        super().__init__(model, **overrides)
