"""nanochat recursive: a looped nanochat whose state starts as the prelude's output.

Published by TrelisResearch/nanochat (branch recursive) as a ``.pt`` file beside a file of the
fields of its ``GPTConfig``. Those fields are the ``config.json`` that is read here.
"""

from collections.abc import Iterator
from typing import Any

import torch

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.config.weights import key_value_name
from tl_loops.errors import CheckpointError
from tl_loops.families.base import (
    Family,
    KnownModel,
    Released,
    TensorSpec,
    checked,
    heads_in,
    heads_out,
    read,
    transposed,
    whole,
)

_PHASES = {"prelude": "prelude", "recur": "core", "coda": "coda"}
_SIGNS = {"n_prelude", "n_recur_block", "n_coda", "n_embd", "n_head"}
_MODEL_TYPE = "nanochat_recursive"


def _signs(released: Released) -> bool:
    return released.get("model_type") is None and released.keys() >= _SIGNS


def _derive(released: Released) -> dict[str, Any]:
    d_model, heads = released["n_embd"], released["n_head"]
    if not heads or d_model % heads:
        raise CheckpointError(f"'n_embd' = {d_model} must be a multiple of 'n_head' = {heads}")
    mean = checked("train_recur_mean", released.get("train_recur_mean", 4.0), float)
    if int(mean) < 1:
        raise CheckpointError(f"'train_recur_mean' must be at least 1, found {mean}")
    return {"d_head": d_model // heads, "d_mlp": 4 * d_model, "n_iterations": int(mean)}


def _tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    d, d_mlp, heads, e = cfg.d_model, cfg.d_mlp or 0, cfg.n_heads, cfg.d_head
    kv_width = (cfg.n_key_value_heads or heads) * e
    W_K, W_V = key_value_name(cfg, "W_K"), key_value_name(cfg, "W_V")
    yield whole("transformer.wte.weight", (cfg.d_vocab, d), "embed.W_E")
    sizes = {"prelude": cfg.n_prelude, "core": cfg.n_core, "coda": cfg.n_coda}
    for stored, phase in _PHASES.items():
        for layer in range(sizes[phase]):
            key, name = f"transformer.{stored}.{layer}", f"{phase}.{layer}"
            attn = f"{key}.attn"
            yield whole(f"{attn}.c_q.weight", (heads * e, d), f"{name}.attn.W_Q", heads_in(e))
            yield whole(f"{attn}.c_k.weight", (kv_width, d), f"{name}.attn.{W_K}", heads_in(e))
            yield whole(f"{attn}.c_v.weight", (kv_width, d), f"{name}.attn.{W_V}", heads_in(e))
            yield whole(f"{attn}.c_proj.weight", (d, heads * e), f"{name}.attn.W_O", heads_out(e))
            yield whole(f"{key}.mlp.c_fc.weight", (d_mlp, d), f"{name}.mlp.W_in", transposed)
            yield whole(f"{key}.mlp.c_proj.weight", (d, d_mlp), f"{name}.mlp.W_out", transposed)
    yield whole("inject.weight", (d, 2 * d), "injection.W", transposed)
    yield whole("lm_head.weight", (cfg.d_vocab, d), "unembed.W_U", transposed)


_DEFAULTS = {
    "n_prelude": 2,
    "n_recur_block": 4,
    "n_coda": 2,
    "train_recur_mean": 4.0,
    "n_head": 10,
    "n_kv_head": 10,
    "n_embd": 1280,
    "vocab_size": 65536,
    "sequence_len": 2048,
}

NANOCHAT_RECURSIVE = Family(
    name="nanochat-recursive",
    paper="",
    model_types=(_MODEL_TYPE,),
    architectures=(),
    signs=_signs,
    fields={
        "d_model": read("n_embd"),
        "n_heads": read("n_head"),
        "n_key_value_heads": read("n_kv_head", default=None),
        "d_vocab": read("vocab_size"),
        "n_ctx": read("sequence_len"),
        "n_prelude": read("n_prelude"),
        "n_core": read("n_recur_block"),
        "n_coda": read("n_coda"),
    },
    fixed={
        "block_norm": "pre",
        "normalization_type": "RMSPre",
        # What torch's rms_norm takes where none is given, of float32: norms work in float32 here.
        "eps": torch.finfo(torch.float32).eps,
        "post_embedding_ln": True,
        "initial_state": "embed",
        "injection": "concat_injection_first",
        "qk_norm": "head",
        "act_fn": "relu2",
        "gated_mlp": False,
        "rotary_layout": "half",
        "rotary_base": 10_000.0,
        "rotary_reversed": True,
        "rotary_table_dtype": "bfloat16",
        "output_logits_soft_cap": 15.0,
        "tie_word_embeddings": False,
        "default_prepend_bos": True,
    },
    flags={
        "inject_mode": ("concat_linear",),
        "window_pattern": (),
        "rope_theta": (10_000.0,),
        "rope_base": (10_000.0,),
    },
    without_effect={
        **dict.fromkeys(("bptt_k", "train_recur_max"), "training"),
        **dict.fromkeys(
            ("kv_cache_recur_budget", "recur_warm_start"),
            "of the reference's cached decoding; here decoding equals the full pass",
        ),
        "n_layer": "of the model without a loop",
    },
    derive=_derive,
    tensors=_tensors,
    tables={"cos": "cos", "sin": "sin"},
    known=(
        KnownModel(
            "Trelis/nanochat-recursive",
            ("nanochat-recursive",),
            _DEFAULTS,
            tuple(_DEFAULTS),
            pickled=True,
        ),
    ),
)
