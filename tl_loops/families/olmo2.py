"""OLMo-2: a feedforward model with norms after its branches, which loading may loop."""

from collections.abc import Iterator
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.families.base import Family, Released, TensorSpec, checked
from tl_loops.families.shared import feedforward, llama
from tl_loops.families.shared.rotary import rotary_fields

_NORMS = {"post_attention_layernorm": "ln1_post", "post_feedforward_layernorm": "ln2_post"}


def _derive(released: Released) -> dict[str, Any]:
    bias = checked("attention_bias", released.get("attention_bias") or False, bool)
    return {"d_head": llama.head_width(released), "attn_bias": bias, **rotary_fields(released)}


def _tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    return llama.looped_stack(cfg, _NORMS)


OLMO2 = Family(
    name="olmo2",
    paper="2501.00656",
    model_types=("olmo2",),
    architectures=("Olmo2ForCausalLM",),
    fields=feedforward.FIELDS,
    fixed={**feedforward.FIXED, "block_norm": "post_branch", "qk_norm": "full"},
    flags={"hidden_act": ("silu", "swish"), "attention_bias": (False, True)},
    derive=_derive,
    tensors=_tensors,
    ignored=feedforward.UNUSED_TABLES,
    tied=llama.TIED,
    feedforward=True,
)
