"""Retrofitted recurrence: Llama, TinyLlama and OLMo-2 blocks around a looped core (2511.07384)."""

from collections.abc import Iterator
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import CheckpointError
from tl_loops.families.base import Family, KnownModel, Released, TensorSpec, checked, read
from tl_loops.families.shared import raven
from tl_loops.families.shared.rotary import rotary_fields

_LLAMA_NORMS = {"norm_1": "ln1", "norm_2": "ln2"}
_OLMO_NORMS = {"norm_1": "ln1_post", "norm_2": "ln2_post"}


def _derive(released: Released) -> dict[str, Any]:
    d_model = released.get("n_embd") or released["hidden_size"]
    heads = released.get("n_heads") or released["num_attention_heads"]
    d_head = released.get("head_dim")
    if d_head is None:
        if not heads or d_model % heads:
            raise CheckpointError(
                f"'head_dim' is missing and 'n_embd' = {d_model} is no multiple of "
                f"'n_heads' = {heads}"
            )
        d_head = d_model // heads
    # Conversion keeps Huginn's standard deviation, so it cannot be computed from the width.
    init_values = released.get("init_values")
    if not isinstance(init_values, dict) or not {"std", "embed_scale"} <= init_values.keys():
        raise CheckpointError(
            "the required field 'init_values' with 'std' and 'embed_scale' is missing"
        )
    scale = checked("init_values.embed_scale", init_values["embed_scale"], float)
    std = checked("init_values.std", init_values["std"], float)
    return {
        "d_head": checked("head_dim", d_head, int, above_zero=True),
        "embed_scale": scale,
        "initial_state_std": std * scale,
        **rotary_fields(released),  # 'rope_base' is left over from Huginn and not used
        **raven.padding(released),
    }


def _llama_tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    return raven.tensors(cfg, _LLAMA_NORMS)


def _olmo_tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    return raven.tensors(cfg, _OLMO_NORMS)


_FIELDS = {**raven.FIELDS, "n_ctx": read("max_position_embeddings", "block_size")}
_FLAGS = {**raven.FLAGS, "qk_bias": (False,)}
_WITHOUT_EFFECT = {**raven.WITHOUT_EFFECT, "rope_base": "left over from Huginn; not used"}
_FIXED = {**raven.FIXED, "rotary_layout": "half"}

_HUGINN_INIT = {"std": 0.008703882797784892, "embed_scale": 1.0}
_LLAMA_3_2 = {
    "n_embd": 2048,
    "n_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "init_values": _HUGINN_INIT,
    "tie_embeddings": False,
}
_TINYLLAMA = {
    "n_embd": 2048,
    "n_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 5632,
    "vocab_size": 32000,
    "norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "init_values": _HUGINN_INIT,
    "tie_embeddings": False,
}
_OLMO_2 = {
    "n_embd": 2048,
    "n_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "intermediate_size": 8192,
    "vocab_size": 100352,
    "norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 500000.0,
    "init_values": _HUGINN_INIT,
    "tie_embeddings": False,
}
_UNSEEN = ("mean_recurrence", "init_values", "max_position_embeddings")
# Not stated where the conversion is described; taken from the models that were converted.
_UNSEEN_SIZES = (
    "n_embd",
    "n_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "norm_eps",
)
_UNSEEN_SPLIT = ("n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda")
_HUGINN_RECURRENCE = 32
"""What an untrained conversion inherits from the Huginn config it starts from."""


def _known(
    base: str,
    released: Released,
    split: tuple[int, int, int],
    unverified: tuple[str, ...],
    untrained_splits: dict[str, tuple[int, int, int]],
) -> tuple[KnownModel, ...]:
    def model(
        suffix: str, short: str, split: tuple[int, int, int], n: int, guessed: tuple[str, ...]
    ) -> KnownModel:
        prelude, core, coda = split
        layers = {
            "n_layers_in_prelude": prelude,
            "n_layers_in_recurrent_block": core,
            "n_layers_in_coda": coda,
            "mean_recurrence": n,
        }
        name = f"Recurrent-{base}-{suffix}"
        aliases = dict.fromkeys((f"recurrent-{base.lower()}-{short}", name.lower()))
        return KnownModel(
            f"smcleish/{name}", tuple(aliases), {**released, **layers}, (*unverified, *guessed)
        )

    trained = (model(f"train-recurrence-{n}", str(n), split, n, ()) for n in (4, 8, 16, 32))
    untrained = (
        model(f"{infix}untrained", f"{infix}untrained", at_split, _HUGINN_RECURRENCE, _UNSEEN_SPLIT)
        for infix, at_split in untrained_splits.items()
    )
    return (*trained, *untrained)


RETROFITTED_OLMO = Family(
    name="retrofitted-olmo",
    paper="2511.07384",
    model_types=raven.MODEL_TYPES,
    architectures=raven.ARCHITECTURES,
    has_tensors=lambda keys: any(".attn.q_norm." in key for key in keys),
    fields=_FIELDS,
    fixed={**_FIXED, "block_norm": "post_branch", "qk_norm": "full"},
    flags=_FLAGS,
    without_effect=_WITHOUT_EFFECT,
    derive=_derive,
    tensors=_olmo_tensors,
    tied=raven.TIED,
    known=_known("OLMo-2-0425", _OLMO_2, (4, 6, 4), (*_UNSEEN, *_UNSEEN_SIZES), {"": (4, 6, 4)}),
)

RETROFITTED_LLAMA = Family(
    name="retrofitted-llama",
    paper="2511.07384",
    model_types=raven.MODEL_TYPES,
    architectures=raven.ARCHITECTURES,
    has_tensors=lambda keys: any(".attn.Wqkv." in key for key in keys),
    fields=_FIELDS,
    fixed={**_FIXED, "block_norm": "pre"},
    flags=_FLAGS,
    without_effect=_WITHOUT_EFFECT,
    derive=_derive,
    tensors=_llama_tensors,
    tied=raven.TIED,
    known=(
        *_known("Llama-3.2", _LLAMA_3_2, (4, 6, 4), _UNSEEN, {"": (4, 6, 4), "2-4-2-": (2, 4, 2)}),
        *_known("TinyLlama-3T", _TINYLLAMA, (4, 8, 4), (*_UNSEEN, *_UNSEEN_SIZES), {"": (4, 8, 4)}),
    ),
)
