"""The classes that looped ones are built on: TransformerLens's, or from 4.0 on those of here."""

import warnings
from typing import TYPE_CHECKING

from tl_loops.upstream.version import HAS_HOOKED_TRANSFORMER

if TYPE_CHECKING or HAS_HOOKED_TRANSFORMER:
    with warnings.catch_warnings():
        # HookedTransformer announces its removal in 4.0 at import and at each call; that both
        # lines are supported is the answer to it, not a warning in every notebook.
        warnings.simplefilter("ignore", DeprecationWarning)
        from transformer_lens import HookedTransformer, HookedTransformerConfig
        from transformer_lens.HookedTransformer import Output

    BaseConfig = HookedTransformerConfig
else:
    from tl_loops.upstream.base_config import BaseConfig
    from tl_loops.upstream.hooked_transformer import HookedTransformer, Output

TransformerBase = HookedTransformer
"""Base of LoopedTransformer: gives tokenisation, loss and the caching wrappers."""

__all__ = ["BaseConfig", "HookedTransformer", "Output", "TransformerBase"]
