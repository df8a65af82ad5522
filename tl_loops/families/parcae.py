"""Parcae: a diagonal, stable injection around pre-norm blocks with value embeddings.

Published as SandyResearch/parcae-{140m,370m,770m,1.3b}; the files hold the training code's fields.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

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
from tl_loops.families.shared import raven
from tl_loops.families.shared.raven import truncated_normal_std
from tl_loops.mechanisms.value_embeddings import has_value_embedding

_CLASS = "Parcae"
_PHASES = {"prelude": "prelude", "core_block": "core", "coda": "coda"}
_NORMS = {"norm_1": "ln1", "norm_2": "ln2"}
_ROPE = re.compile(r"RoPESettings\((.*)\)")


def _spread(released: Released) -> Released:
    nested = released.get("full_config")
    return {**nested, **released} if isinstance(nested, Mapping) else released


def _signs(released: Released) -> bool:
    fields = _spread(released)
    return _CLASS in (fields.get("_class_name"), fields.get("model_class_name"))


def _rope_settings(released: Released) -> Mapping[str, Any]:
    """The rotary settings, which are a mapping or what Python prints of the settings' class."""
    settings = released.get("rope_settings")
    printed = _ROPE.fullmatch(settings) if isinstance(settings, str) else None
    if printed is not None:
        pairs = [pair.split("=") for pair in printed.group(1).split(", ")]
        values = {"True": True, "False": False}
        try:
            settings = {
                name: values[value] if value in values else float(value) for name, value in pairs
            }
        except ValueError:
            settings = None
    if not isinstance(settings, Mapping):
        raise CheckpointError(
            f"'rope_settings' is {released.get('rope_settings')!r}; expected a mapping with "
            "'use_rope', 'rope_condense_ratio' and 'rope_base'"
        )
    if settings.get("use_rope") is not True:
        raise CheckpointError(
            f"'rope_settings.use_rope' is {settings.get('use_rope')!r}, which is not implemented; "
            "expected True"
        )
    return settings


def _derive(released: Released) -> dict[str, Any]:
    d_model, heads = released["n_embd"], released["num_attention_heads"]
    if not heads or d_model % heads:
        raise CheckpointError(
            f"'n_embd' = {d_model} must be a multiple of 'num_attention_heads' = {heads}"
        )
    for key, value in (
        ("head_size", d_model // heads),
        ("recurrent_embedding_dimension", d_model),
        ("recurrent_intermediation_embedding_dimension", released["intermediate_size"]),
        ("recurrent_num_attention_heads", heads),
    ):
        if released.get(key) is not None and released[key] != value:
            raise CheckpointError(
                f"{key!r} is {released[key]!r}, which is not implemented; expected {value}"
            )
    rope = _rope_settings(released)
    return {
        "d_head": d_model // heads,
        "rotary_base": checked("rope_settings.rope_base", rope.get("rope_base"), float),
        "rotary_scaling_factor": checked(
            "rope_settings.rope_condense_ratio", rope.get("rope_condense_ratio", 1.0), float
        ),
        "initial_state_std": truncated_normal_std(d_model),
        **raven.padding(released),
    }


def _tensors(cfg: LoopedTransformerConfig) -> Iterator[TensorSpec]:
    d, vocab = cfg.d_model, cfg.d_vocab
    yield whole("transformer.wte.weight", (vocab, d), "embed.W_E")
    sizes = {"prelude": cfg.n_prelude, "core": cfg.n_core, "coda": cfg.n_coda}
    number = 0
    for stored, phase in _PHASES.items():
        for layer in range(sizes[phase]):
            yield from _block(cfg, f"transformer.{stored}.{layer}", f"{phase}.{layer}", number)
            number += 1
    yield whole("transformer.ln_prelude.weight", (d,), "ln_injection.w")
    yield whole("transformer.adapter.A_log", (d,), "injection.A_log")
    yield whole("transformer.adapter.dt_bias", (d,), "injection.dt_bias")
    yield whole("transformer.adapter.B", (d, d), "injection.W_B", transposed)
    yield whole("transformer.C.weight", (d, d), "coda_in.W", transposed)
    yield whole("transformer.ln_f.weight", (d,), "ln_final.w")
    if not cfg.tie_word_embeddings:
        yield whole("lm_head.weight", (vocab, d), "unembed.W_U", transposed)


def _block(cfg: LoopedTransformerConfig, key: str, name: str, number: int) -> Iterator[TensorSpec]:
    d, d_mlp, heads, e = cfg.d_model, cfg.d_mlp or 0, cfg.n_heads, cfg.d_head
    kv_heads = cfg.n_key_value_heads or heads
    W_K, W_V = key_value_name(cfg, "W_K"), key_value_name(cfg, "W_V")
    for stored, norm in _NORMS.items():
        yield whole(f"{key}.{stored}.weight", (d,), f"{name}.{norm}.w")
    yield whole(f"{key}.attn.c_q.weight", (heads * e, d), f"{name}.attn.W_Q", heads_in(e))
    yield whole(f"{key}.attn.c_k.weight", (kv_heads * e, d), f"{name}.attn.{W_K}", heads_in(e))
    yield whole(f"{key}.attn.c_v.weight", (kv_heads * e, d), f"{name}.attn.{W_V}", heads_in(e))
    yield whole(f"{key}.attn.c_proj.weight", (d, heads * e), f"{name}.attn.W_O", heads_out(e))
    if has_value_embedding(cfg, number):
        embed, channels = f"{name}.attn.value_embed", cfg.value_gate_channels
        yield whole(
            f"value_embeds.{number}.weight",
            (cfg.d_vocab, kv_heads * e),
            f"{embed}.W_E",
            lambda stored: stored.unflatten(-1, (kv_heads, e)),
        )
        yield whole(
            f"{key}.attn.ve_gate.weight", (kv_heads, channels), f"{embed}.W_gate", transposed
        )
    yield whole(f"{key}.mlp.fc.weight", (d_mlp, d), f"{name}.mlp.W_in", transposed)
    yield whole(f"{key}.mlp.proj.weight", (d, d_mlp), f"{name}.mlp.W_out", transposed)


def _released(d_model: int, n_layers: int) -> dict[str, Any]:
    return {
        "n_embd": d_model,
        "num_attention_heads": d_model // 128,
        "num_key_value_heads": d_model // 128,
        "intermediate_size": 4 * d_model,
        "vocab_size": 32768,
        "padded_vocab_size": 32768,
        "block_size": 2048,
        "norm_eps": 1e-5,
        "n_layers_in_prelude": n_layers,
        "n_layers_in_recurrent_block": n_layers,
        "n_layers_in_coda": n_layers,
        "mean_recurrence": 8,
        "qk_norm": True,
        "tie_embeddings": True,
        "rope_settings": {"use_rope": True, "rope_condense_ratio": 1, "rope_base": 50000},
    }


# Of the larger sizes only widths and numbers of layers are published.
_UNSEEN = ("intermediate_size",)
_UNSEEN_HEADS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")

PARCAE = Family(
    name="parcae",
    paper="",
    model_types=("parcae",),
    architectures=(_CLASS,),
    signs=_signs,
    spread=_spread,
    fields={
        "d_model": read("n_embd"),
        "n_heads": read("num_attention_heads"),
        "n_key_value_heads": read("num_key_value_heads", "n_query_groups", default=None),
        "d_mlp": read("intermediate_size"),
        "d_vocab": read("padded_vocab_size", "vocab_size"),
        "n_ctx": read("block_size"),
        "eps": read("norm_eps", kind=float),
        "n_prelude": read("n_layers_in_prelude"),
        "n_core": read("n_layers_in_recurrent_block"),
        "n_coda": read("n_layers_in_coda"),
        # Also where the reference samples the number of iterations, which it does in training and,
        # with 'per-sequence', in evaluation.
        "n_iterations": read("mean_recurrence"),
        "tie_word_embeddings": read("tie_embeddings", kind=bool),
    },
    fixed={
        "block_norm": "pre",
        "initial_state": "normal",
        "injection": "gated_diagonal",
        "norm_injection": True,
        "linear_before_coda": True,
        "value_embeddings": True,
        "qk_norm": "head",
        "act_fn": "half_relu2",
        "gated_mlp": False,
        "rotary_layout": "interleaved",
        "default_prepend_bos": True,
    },
    flags={
        "bias": (False,),
        "qk_bias": (False,),
        "qk_norm": (True,),
        "prelude_norm": (True,),
        "injection_type": ("diagonal",),
        "state_init": ("like-init",),
        "init_strategy": ("scaled-zero",),
        "emb_scale": (1,),
        "logit_scale": (1,),
        "nonlin_name": ("ReLU2",),
        "mlp_class_name": ("BaseMLP",),
        "norm_class_name": ("RMSNorm",),
        "block_class_name": ("TransformerPreNormBlock",),
        "use_abacus": (False,),
        "randomize_positions_from": (),
        "debias_attention": (False,),
        "center_attention": (False,),
        "mup_model_scaling_factor": (1,),
        "sliding_window": (),
    },
    without_effect={
        **dict.fromkeys(("init", "init_orthogonal", "skip_initialization"), "initialisation"),
        **dict.fromkeys(("activation_checkpoint_impl", "mean_backprop_depth"), "training"),
        **dict.fromkeys(("curriculum_target", "lockstep_k", "lockstep_n"), "training"),
        **dict.fromkeys(("hf_config", "name", "preset"), "a name"),
        **dict.fromkeys(("attn_impl", "simple_ops", "strategy", "use_fused_head"), "speed"),
        **dict.fromkeys(
            ("recurrent_iteration_method", "sampling_scheme"),
            "how the reference samples the number of iterations; here it is 'mean_recurrence'",
        ),
        "n_head": "another name of 'num_attention_heads'",
        "n_layer": "the sum of the numbers of layers that are read",
        "padding_multiple": "'padded_vocab_size' follows from it",
        "_recurrent_block_config": "the fields are repeated outside it",
        "_is_recurrent_block_config": "of the field above",
        "full_config": "its fields are read where none stand outside it",
    },
    derive=_derive,
    tensors=_tensors,
    tables={"freqs_cis": "cos and sin"},
    tied=raven.TIED,
    known=tuple(
        KnownModel(
            f"SandyResearch/parcae-{size}",
            (f"parcae-{size}",),
            _released(d_model, n_layers),
            unseen,
            pickled=True,
        )
        for size, d_model, n_layers, unseen in (
            ("140m", 768, 2, _UNSEEN),
            ("370m", 1024, 4, _UNSEEN_HEADS),
            ("770m", 1280, 6, _UNSEEN_HEADS),
            ("1.3b", 1536, 8, _UNSEEN_HEADS),
        )
    ),
)
