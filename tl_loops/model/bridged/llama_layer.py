"""Hook points that every bridged layer with Llama's attention and MLP has."""

from tl_loops.model.bridged.taps import View

LLAMA_PLACES: dict[str, str | tuple[str, View]] = {
    **{f"attn.{x}.hook_out": f"attn.hook_{x}" for x in "qkv"},
    **{f"attn.{x}": f"attn.{x}" for x in ("hook_rot_q", "hook_rot_k")},
    **{f"attn.{x}": f"attn.{x}" for x in ("hook_attn_scores", "hook_pattern")},
    "attn.o.hook_in": "attn.hook_z",
    "mlp.gate.hook_out": "mlp.hook_pre",
    "mlp.in.hook_out": "mlp.hook_pre_linear",
    "mlp.out.hook_in": "mlp.hook_post",
}
"""Hook points inside the layer, and what LoopedTransformer calls them inside its block."""


def norm_places(*norms: str) -> dict[str, str]:
    """The hook points of norms that have one name in both."""
    points = ("hook_scale", "hook_normalized")
    return {f"{norm}.{point}": f"{norm}.{point}" for norm in norms for point in points}
