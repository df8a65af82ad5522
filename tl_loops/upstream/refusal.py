"""Which bridges TransformerLens's own tools are wrong on, and what to do instead."""

from typing import Any

from tl_loops.errors import LoopedSemanticsError
from tl_loops.upstream import is_bridge

LOOPED_ADAPTERS = {
    "OuroArchitectureAdapter": "Ouro",
    "RavenArchitectureAdapter": "Huginn",
    "HrmTextArchitectureAdapter": "HRM-Text",
}
"""TransformerLens's adapters of looped models, by class name."""


def refuse_where_wrong(model: Any, tool: str) -> None:
    """Refuse a tool of TransformerLens on a model that it is wrong on; other models pass.

    Those are all tools on a TransformerBridge of a looped model, and patching of direct paths on
    any looped model.

    Args:
        model: What the tool is called with.
        tool: Its name.

    Raises:
        LoopedSemanticsError: It is wrong on this model.
    """
    if tool.startswith("get_act_patch_direct_path") and getattr(model, "layout", None) is not None:
        raise LoopedSemanticsError(
            f"{tool} adds what a head writes to what a later head reads, but norms, iterations and "
            "the injection stand between them in a looped model: call tl_loops.patching.path_patch"
        )
    if not is_bridge(model):
        return
    names = (parent.__name__ for parent in type(model.adapter).__mro__)
    looped = next((LOOPED_ADAPTERS[name] for name in names if name in LOOPED_ADAPTERS), None)
    if looped is not None:
        raise LoopedSemanticsError(
            f"{tool} is wrong on a bridged {looped}: every hook point fires once an iteration, and "
            "the tool keeps one firing or edits all of them. Call it on tl_loops.unroll(bridge), "
            "whose hook points fire once"
        )
