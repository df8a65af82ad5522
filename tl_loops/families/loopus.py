"""LoopUS: the middle layers of a pretrained model looped after a selective gate (2605.11011).

The reference may stop early, once a confidence head on the last token's change passes a threshold.
Here every iteration runs; ``iter.{t}.hook_halt_logit`` is what the head says at every position.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import CheckpointError
from tl_loops.families.base import (
    Family,
    KnownModel,
    Released,
    TensorSpec,
    read,
    transposed,
    whole,
)
from tl_loops.families.shared import llama
from tl_loops.families.shared.rotary import rotary_fields

_QK_NORMS = {"qwen3": "head_weight", "llama": None}
"""The base models whose layers are implemented, and their norm of queries and keys."""

_OF_BASE = {
    *(key for source in llama.FIELDS.values() for key in source.keys),
    *("head_dim", "layer_types", "hidden_act", "use_sliding_window", "attention_bias", "mlp_bias"),
    *("rope_theta", "rope_scaling", "rope_parameters"),
}
"""What the layers are, which the base model's config says."""

_PARTS = {"encoder": "prelude", "reasoning": "core", "decoder": "coda"}


def _spread(released: Released) -> Released:
    base = released.get("base_config_dict")
    if not isinstance(base, Mapping):
        return released
    if "num_hidden_layers" not in base and isinstance(base.get("text_config"), Mapping):
        base = base["text_config"]
    # The reference reads the layers' fields from the base model's config alone.
    own = {key: value for key, value in released.items() if key not in _OF_BASE}
    return {**own, **base, "base_config_dict.model_type": base.get("model_type")}


def _sizes(released: Released) -> dict[str, int]:
    sizes = {}
    for part, phase in _PARTS.items():
        key = f"{part}_layer_indices"
        layers = released.get(key)
        if not isinstance(layers, list) or any(type(i) is not int or i < 0 for i in layers):
            raise CheckpointError(f"{key!r} must be a list of layers, found {layers!r}")
        sizes[f"n_{phase}"] = len(layers)
    if not sizes["n_core"]:
        raise CheckpointError("'reasoning_layer_indices' is empty, so nothing is looped")
    return sizes


def _derive(released: Released) -> dict[str, Any]:
    llama.check_layer_types(released)
    kind = released.get("base_config_dict.model_type")
    if not isinstance(kind, str) or kind not in _QK_NORMS:
        raise CheckpointError(
            f"'base_config_dict.model_type' is {kind!r}, which is not implemented; expected "
            f"{' or '.join(map(repr, _QK_NORMS))}"
        )
    return {
        **_sizes(released),
        "d_head": llama.head_width(released),
        "qk_norm": _QK_NORMS[kind],
        "state_gate_rank": math.ceil(released["hidden_size"] / 16),
        **rotary_fields(released),
    }


def _tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    d, vocab, rank = cfg.d_model, cfg.d_vocab, cfg.state_gate_rank or 0
    yield whole("encoder.embed_tokens.weight", (vocab, d), "embed.W_E")
    sizes = {"prelude": cfg.n_prelude, "core": cfg.n_core, "coda": cfg.n_coda}
    for part, phase in _PARTS.items():
        for number in range(sizes[phase]):
            yield from llama.layer(cfg, f"{part}.layers.{number}", f"{phase}.{number}")
    gate = "reasoning.gate"
    yield whole(f"{gate}.A_log", (d,), "state_gate.A_log")
    yield whole(f"{gate}.dt_input_proj.weight", (rank, d), "state_gate.W_in", transposed)
    yield whole(f"{gate}.delta_proj.weight", (d, rank), "state_gate.W_out", transposed)
    yield whole(f"{gate}.delta_proj.bias", (d,), "state_gate.b_out")
    yield whole("q_head.0.weight", (d,), "halt_head.w")
    yield whole("q_head.0.bias", (d,), "halt_head.b")
    yield whole("q_head.1.weight", (1, d), "halt_head.W", transposed)
    yield whole("q_head.1.bias", (1,), "halt_head.b_out")
    yield whole("decoder.norm.weight", (d,), "ln_final.w")
    yield whole("decoder.lm_head.weight", (vocab, d), "unembed.W_U", transposed)


_QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
}
_RELEASED = {
    "base_config_dict": _QWEN3,
    "encoder_layer_indices": [0, 1],
    "reasoning_layer_indices": list(range(2, 27)),
    "decoder_layer_indices": [27],
    "N": 20,
}

LOOPUS = Family(
    name="loopus",
    paper="2605.11011",
    model_types=("lds",),
    architectures=("LDSForCausalLM",),
    spread=_spread,
    fields={
        **{key: field for key, field in llama.FIELDS.items() if key != "tie_word_embeddings"},
        "n_iterations": read("N"),
    },
    fixed={
        "block_norm": "pre",
        "initial_state": "embed",
        "halt_head": True,
        "rotary_layout": "half",
        # The config class unties them, whatever the base model does.
        "tie_word_embeddings": False,
        "default_prepend_bos": False,
    },
    flags={**llama.FLAGS, "lma_window": (0,)},
    without_effect={
        **dict.fromkeys(
            ("halting_strategy", "q_threshold", "q_eval_interval", "convergence_epsilon"),
            "when the reference stops early; here every iteration runs",
        ),
        "lma_heads": "there is no attention to memories ('lma_window')",
        "base_model_name_or_path": "a name",
        "num_hidden_layers": "the lists of layers count",
        "tie_word_embeddings": "the config class unties them",
        **dict.fromkeys(("sliding_window", "max_window_layers"), "no layer has a window"),
    },
    derive=_derive,
    tensors=_tensors,
    spellings=(("plateau.", "reasoning."),),  # the older name of the looped part
    known=(
        KnownModel(
            "Thrillcrazyer/Qwen3_1.7B_LoopUS",
            ("qwen3_1.7b_loopus", "loopus"),
            _RELEASED,
            tuple(_RELEASED),
        ),
        KnownModel("Thrillcrazyer/SFT_LDS_QWEN1.7B", (), _RELEASED, tuple(_RELEASED)),
    ),
)
