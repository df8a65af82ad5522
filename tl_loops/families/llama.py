"""Llama and Mistral: feedforward models, which loading may loop."""

from typing import Any

from tl_loops.errors import CheckpointError
from tl_loops.families.base import Family, Released, checked
from tl_loops.families.shared import feedforward, llama
from tl_loops.families.shared.rotary import rotary_fields


def _derive(released: Released) -> dict[str, Any]:
    llama.check_layer_types(released)
    bias = checked("attention_bias", released.get("attention_bias") or False, bool)
    return {"d_head": llama.head_width(released), "attn_bias": bias, **rotary_fields(released)}


def _derive_mistral(released: Released) -> dict[str, Any]:
    window = released.get("sliding_window")
    longest = released["max_position_embeddings"]
    if window is not None and checked("sliding_window", window, int) < longest:
        raise CheckpointError(
            f"'sliding_window' = {window} is below 'max_position_embeddings' = {longest}: windows "
            f"are not implemented. Texts of up to {window} tokens never meet the window: set "
            f"'max_position_embeddings' to {window} in config.json to load the model for them"
        )
    return _derive(released)


LLAMA = Family(
    name="llama",
    paper="2302.13971",
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    fields=feedforward.FIELDS,
    fixed=feedforward.FIXED,
    flags={"hidden_act": ("silu", "swish"), "attention_bias": (False, True)},
    derive=_derive,
    tensors=llama.looped_stack,
    ignored=feedforward.UNUSED_TABLES,
    tied=llama.TIED,
    feedforward=True,
)

MISTRAL = Family(
    name="mistral",
    paper="2310.06825",
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    fields=feedforward.FIELDS,
    fixed=feedforward.FIXED,
    flags={"hidden_act": ("silu", "swish")},
    derive=_derive_mistral,
    tensors=llama.looped_stack,
    ignored=feedforward.UNUSED_TABLES,
    tied=llama.TIED,
    feedforward=True,
)
