"""Qwen2 and Qwen3: feedforward models, which loading may loop."""

from typing import Any

from tl_loops.families.base import Family, Released, checked
from tl_loops.families.shared import feedforward, llama
from tl_loops.families.shared.rotary import rotary_fields

_WITHOUT_EFFECT = {
    "max_window_layers": "no layer has a window ('use_sliding_window')",
    "sliding_window": "no layer has a window ('use_sliding_window')",
}


def _derive(released: Released) -> dict[str, Any]:
    llama.check_layer_types(released)
    return {"d_head": llama.head_width(released), **rotary_fields(released)}


def _derive_qwen3(released: Released) -> dict[str, Any]:
    bias = checked("attention_bias", released.get("attention_bias") or False, bool)
    return {**_derive(released), "attn_bias": bias}


QWEN2 = Family(
    name="qwen2",
    paper="2407.10671",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    fields=feedforward.FIELDS,
    fixed={
        **feedforward.FIXED,
        "qk_bias": True,
        "value_bias": True,
        "default_prepend_bos": False,
    },
    flags=llama.FLAGS,
    without_effect=_WITHOUT_EFFECT,
    derive=_derive,
    tensors=llama.looped_stack,
    ignored=feedforward.UNUSED_TABLES,
    tied=llama.TIED,
    feedforward=True,
)

QWEN3 = Family(
    name="qwen3",
    paper="2505.09388",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    fields=feedforward.FIELDS,
    fixed={**feedforward.FIXED, "qk_norm": "head_weight", "default_prepend_bos": False},
    flags={**llama.FLAGS, "attention_bias": (False, True)},
    without_effect=_WITHOUT_EFFECT,
    derive=_derive_qwen3,
    tensors=llama.looped_stack,
    ignored=feedforward.UNUSED_TABLES,
    tied=llama.TIED,
    feedforward=True,
)
