"""TransformerBridge, without importing it before somebody else does."""

import sys
from typing import Any


def is_bridge(model: Any) -> bool:
    """Whether a model is a TransformerBridge."""
    module = sys.modules.get("transformer_lens.model_bridge")
    return module is not None and isinstance(model, module.TransformerBridge)
