"""IQuest-Coder Loop: a Llama run twice, whose second pass also reads the first one's keys.

From the second pass on every head mixes, by a gate that its query gives, full attention to the
keys and values of the first pass with attention to its own of the last few positions.
"""

from collections.abc import Iterator
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import CheckpointError
from tl_loops.families.base import Family, KnownModel, Released, TensorSpec, checked, whole
from tl_loops.families.shared import llama
from tl_loops.families.shared.rotary import rotary_fields


def _derive(released: Released) -> dict[str, Any]:
    llama.check_layer_types(released)
    loops = checked("loop_num", released.get("loop_num", 2), int)
    window = checked("loop_window_size", released.get("loop_window_size", 64), int)
    for key, value in (("loop_num", loops), ("loop_window_size", window)):
        if value < 1:
            raise CheckpointError(f"{key!r} must be at least 1, found {value}")
    return {
        "d_head": llama.head_width(released),
        "n_iterations": loops,
        "first_pass_window": window,
        **rotary_fields(released),
    }


def _tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    yield from llama.looped_stack(cfg)
    heads, e = cfg.n_heads, cfg.d_head
    for number in range(cfg.n_core):
        key, name = f"model.gate_projections.{number}", f"core.{number}.attn.first_pass"
        yield whole(f"{key}.weight", (heads, e), f"{name}.W")
        yield whole(f"{key}.bias", (heads,), f"{name}.b")


_RELEASED = {
    "vocab_size": 76800,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 80,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "loop_num": 2,
    "loop_window_size": 64,
}

IQUEST_LOOP = Family(
    name="iquest-loop",
    paper="",
    model_types=("iquestloopcoder",),
    architectures=("IQuestLoopCoderForCausalLM",),
    fields=llama.LOOPED_FIELDS,
    fixed=llama.LOOPED_FIXED,
    flags={**llama.FLAGS, "sliding_window": ()},
    without_effect={"max_window_layers": "no layer has a window ('use_sliding_window')"},
    derive=_derive,
    tensors=_tensors,
    tied=llama.TIED,
    known=(
        KnownModel(
            "IQuestLab/IQuest-Coder-V1-40B-Loop-Instruct",
            ("iquest-coder-v1-40b-loop-instruct",),
            _RELEASED,
            ("max_position_embeddings",),
        ),
    ),
)
