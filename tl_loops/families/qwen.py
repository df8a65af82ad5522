"""Qwen2 and Qwen3: feedforward models, which loading may loop."""

from tl_loops.families.shared import feedforward, llama

_WITHOUT_EFFECT = {
    "max_window_layers": "no layer has a window ('use_sliding_window')",
    "sliding_window": "no layer has a window ('use_sliding_window')",
}

QWEN2 = feedforward.of_llama_kind(
    "qwen2",
    "2407.10671",
    "Qwen2",
    fixed={"qk_bias": True, "value_bias": True, "default_prepend_bos": False},
    without_effect=_WITHOUT_EFFECT,
)

QWEN3 = feedforward.of_llama_kind(
    "qwen3",
    "2505.09388",
    "Qwen3",
    fixed={"qk_norm": "head_weight", "default_prepend_bos": False},
    flags={**llama.FLAGS, **feedforward.BIASES},
    without_effect=_WITHOUT_EFFECT,
)
