"""OLMo-2: a feedforward model with norms after its branches, which loading may loop."""

from collections.abc import Iterator

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.families.base import TensorSpec
from tl_loops.families.shared import feedforward, llama

_NORMS = {"post_attention_layernorm": "ln1_post", "post_feedforward_layernorm": "ln2_post"}


def _tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    return llama.looped_stack(cfg, _NORMS)


OLMO2 = feedforward.of_llama_kind(
    "olmo2",
    "2501.00656",
    "Olmo2",
    fixed={"block_norm": "post_branch", "qk_norm": "full"},
    flags={"hidden_act": ("silu", "swish"), **feedforward.BIASES},
    tensors=_tensors,
)
