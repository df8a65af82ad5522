"""Models without a loop, as each line of TransformerLens makes them."""

import warnings
from typing import Any

import pytest

from tl_loops.upstream import HAS_HOOKED_TRANSFORMER

only_before_4 = pytest.mark.skipif(
    not HAS_HOOKED_TRANSFORMER, reason="compares with HookedTransformer, which 4.0 removed"
)
only_from_4 = pytest.mark.skipif(
    HAS_HOOKED_TRANSFORMER, reason="is about TransformerLens 4, where TransformerBridge is the way"
)


def plain_model(**fields: Any) -> Any:
    """A randomly initialised feedforward model: HookedTransformer, or from 4.0 on a bridge.

    Args:
        **fields: Of HookedTransformerConfig.
    """
    if HAS_HOOKED_TRANSFORMER:
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return HookedTransformer(HookedTransformerConfig(**fields)).eval()
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_native(dict(fields)).eval()
    bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    return bridge
