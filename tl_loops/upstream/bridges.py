"""TransformerBridge, without importing it before somebody else does."""

import sys
from collections.abc import Iterable
from typing import Any


def is_bridge(model: Any) -> bool:
    """Whether a model is a TransformerBridge."""
    module = sys.modules.get("transformer_lens.model_bridge")
    return module is not None and isinstance(model, module.TransformerBridge)


def shown_too_late(bridge: Any, names: Iterable[str]) -> list[str]:
    """Hook points that a bridge fires when its attention is over: an edit there changes nothing.

    An attention that leaves the work to the wrapped module shows what that module returns, the
    pattern, as pattern and as scores. The module may run its pattern through the hook point itself;
    scores it never does.

    Args:
        bridge: A TransformerBridge.
        names: Hook names; those of other hook points pass.
    """
    points = {id(bridge.hook_dict[name]): name for name in names if name in bridge.hook_dict}
    late = []
    for module in bridge.modules():
        if not hasattr(module, "hook_attn_scores") or not _leaves_work(module):
            continue
        found = [module.hook_attn_scores]
        if not getattr(module.original_component, "accepts_pattern_fn", False):
            found.append(module.hook_pattern)
        late += [points[id(point)] for point in found if id(point) in points]
    return late


def _leaves_work(module: Any) -> bool:
    """Whether attention runs AttentionBridge's forward pass, if only from one that calls it."""
    for owner in type(module).__mro__:
        forward = vars(owner).get("forward")
        code = getattr(forward, "__code__", None)
        if code is not None and not {"super", "forward"} <= set(code.co_names):
            return getattr(forward, "__qualname__", "") == "AttentionBridge.forward"
    return False
