"""Which bridges TransformerLens's own tools are wrong on, and what to do instead."""

from typing import Any

from tl_loops.errors import LoopedSemanticsError
from tl_loops.upstream.bridges import is_bridge

LOOPED_ADAPTERS = {
    "OuroArchitectureAdapter": "Ouro",
    "RavenArchitectureAdapter": "Huginn",
    "HrmTextArchitectureAdapter": "HRM-Text",
}
"""TransformerLens's adapters of looped models, by class name."""


_STACKS_OF_HEADS = (
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
)


def refuse_where_wrong(model: Any, tool: str) -> None:
    """Raise on a tool of TransformerLens on a model that it is wrong on; other models pass.

    Those are all tools on a TransformerBridge of a looped model, patching of direct paths on any
    looped model, and stacks of patched heads where there are fewer key heads than query heads.

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
    if tool in _STACKS_OF_HEADS and getattr(model, "layout", None) is not None:
        if (kv_heads := model.cfg.n_key_value_heads) is not None:
            raise LoopedSemanticsError(
                f"{tool} fills in 0 for key and value heads that do not exist: this model has "
                f"{model.cfg.n_heads} query heads over {kv_heads} key and value heads. Call "
                "get_act_patch_attn_head_{out,q,k,v,pattern}_... one by one, or "
                "tl_loops.patching.activation_patch"
            )
    if not is_bridge(model):
        return
    names = (parent.__name__ for parent in type(model.adapter).__mro__)
    looped = next((LOOPED_ADAPTERS[name] for name in names if name in LOOPED_ADAPTERS), None)
    if looped is not None:
        raise LoopedSemanticsError(
            f"{tool} is wrong on a bridged {looped}: every hook point fires once per iteration, "
            "and the tool keeps one firing or edits all of them. Call it on "
            "tl_loops.unroll(bridge), whose hook points fire once"
        )
