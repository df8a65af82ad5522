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


def refuse_looped_bridge(model: Any, tool: str) -> None:
    """Refuse a tool on a TransformerBridge of a looped model; other models pass.

    Args:
        model: What the tool is called with.
        tool: Its name.

    Raises:
        LoopedSemanticsError: The model is such a bridge.
    """
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
