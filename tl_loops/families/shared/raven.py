"""What Huginn and the retrofitted models share: class, config keys and tensor names.

Their checkpoints carry the same model type and class name over three kinds of block, so that only
the names of the stored tensors tell them apart.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.config.weights import key_value_name
from tl_loops.families.base import (
    Field,
    Part,
    TensorSpec,
    as_is,
    fused,
    head_bias,
    heads_in,
    heads_out,
    read,
    transposed,
    whole,
)

MODEL_TYPES = ("huginn_raven",)
ARCHITECTURES = ("RavenForCausalLM",)
TIED = ("lm_head.weight", "transformer.wte.weight")

_PHASES = {"prelude": "prelude", "core_block": "core", "coda": "coda"}

FIELDS: dict[str, Field] = {
    "d_model": read("n_embd", "hidden_size"),
    "n_heads": read("n_heads", "num_attention_heads"),
    "n_key_value_heads": read("num_key_value_heads", default=None),
    "d_mlp": read("intermediate_size"),
    # The embedding has the padded size, and the reference reads all of it.
    "d_vocab": read("padded_vocab_size", "vocab_size"),
    "eps": read("norm_eps", kind=float),
    "n_prelude": read("n_layers_in_prelude"),
    "n_core": read("n_layers_in_recurrent_block"),
    "n_coda": read("n_layers_in_coda"),
    "n_iterations": read("mean_recurrence"),
    # ``tie_word_embeddings`` is overridden by ``tie_embeddings`` in the reference.
    "tie_word_embeddings": read("tie_embeddings", "tie_word_embeddings", kind=bool),
}

FIXED: dict[str, Any] = {
    "initial_state": "normal",
    "injection": "concat",
    "default_prepend_bos": True,
}

FLAGS: dict[str, tuple[Any, ...]] = {
    "bias": (False,),
    "injection_type": ("linear",),
    "state_init": ("like-init",),
    "initial_state_mode": ("random",),
    "test_time_noise": (0,),
    "intermediate_noise_injection": (0,),
    "nonlin_name": ("SiLU",),
    "mlp_class_name": ("GatedMLP",),
    "norm_class_name": ("RMSNorm_llama", "RMSNorm"),
    "block_class_name": ("SandwichBlock",),
    "embed_step": (False,),
    "normalize_rec": ("",),
    "prelude_norm": (False,),
    "qk_norm": (False,),
    "use_abacus": (False,),
    "randomize_positions_from": (),
    "debias_attention": (False,),
    "center_attention": (False,),
    "mup_model_scaling_factor": (1,),
    "sliding_window": (),
}
"""Switches of the training code (seal-rg/recurrent-pretraining) and of forks of it."""

WITHOUT_EFFECT: dict[str, str] = {
    **dict.fromkeys(("activation_checkpoint_impl", "init_orthogonal", "init_strategy"), "training"),
    **dict.fromkeys(("mean_backprop_depth", "sampling_scheme"), "training"),
    "architecture_class_name": "a name",
    "effective_expected_depth": "initialisation of weights",
    "n_layers": "the sum of the numbers of layers that are read",
    "padding_multiple": "'padded_vocab_size' follows from it",
    "test_time_noise_type": "there is no noise ('test_time_noise')",
}
"""Keys of the config class that change no number of a forward pass."""


def padding(released: Mapping[str, Any]) -> dict[str, Any]:
    """``padded_vocab`` where the embedding is longer than the vocabulary."""
    vocab, padded = released.get("vocab_size"), released.get("padded_vocab_size")
    if isinstance(vocab, int) and isinstance(padded, int) and padded > vocab:
        return {"padded_vocab": vocab}
    return {}


def tensors(cfg: LoopedTransformerConfig, norms: Mapping[str, str]) -> Iterator[TensorSpec]:
    """What a checkpoint of this class must hold.

    Args:
        cfg: The config.
        norms: The block's norms by stored name, e.g. ``{"norm_1": "ln1"}``.
    """
    d, vocab = cfg.d_model, cfg.d_vocab
    yield whole("transformer.wte.weight", (vocab, d), "embed.W_E")
    sizes = {"prelude": cfg.n_prelude, "core": cfg.n_core, "coda": cfg.n_coda}
    for stored, phase in _PHASES.items():
        for layer in range(sizes[phase]):
            yield from _block(cfg, norms, f"transformer.{stored}.{layer}", f"{phase}.{layer}")
    yield whole("transformer.adapter.weight", (d, 2 * d), "injection.W", transposed)
    yield whole("transformer.ln_f.weight", (d,), "ln_final.w")
    if not cfg.tie_word_embeddings:
        yield whole("lm_head.weight", (vocab, d), "unembed.W_U", transposed)


def _block(
    cfg: LoopedTransformerConfig, norms: Mapping[str, str], key: str, name: str
) -> Iterator[TensorSpec]:
    d, d_mlp, heads, e = cfg.d_model, cfg.d_mlp or 0, cfg.n_heads, cfg.d_head
    kv_heads = cfg.n_key_value_heads or heads
    for stored, norm in norms.items():
        yield whole(f"{key}.{stored}.weight", (d,), f"{name}.{norm}.w")
    yield fused(
        f"{key}.attn.Wqkv.weight",
        d,
        Part(f"{name}.attn.W_Q", heads * e, heads_in(e)),
        Part(f"{name}.attn.{key_value_name(cfg, 'W_K')}", kv_heads * e, heads_in(e)),
        Part(f"{name}.attn.{key_value_name(cfg, 'W_V')}", kv_heads * e, heads_in(e)),
    )
    yield whole(f"{key}.attn.proj.weight", (d, heads * e), f"{name}.attn.W_O", heads_out(e))
    if cfg.qk_bias:
        biases = (Part(f"{name}.attn.{b}", 1, head_bias(e)) for b in ("b_Q", "b_K"))
        yield TensorSpec(f"{key}.attn.qk_bias", (2, 1, heads, e), tuple(biases))
    if cfg.qk_norm == "full":
        yield whole(f"{key}.attn.q_norm.weight", (heads * e,), f"{name}.attn.q_norm.w", as_is)
        yield whole(f"{key}.attn.k_norm.weight", (kv_heads * e,), f"{name}.attn.k_norm.w", as_is)
    yield fused(
        f"{key}.mlp.fc.weight",
        d,
        Part(f"{name}.mlp.W_gate", d_mlp, transposed),
        Part(f"{name}.mlp.W_in", d_mlp, transposed),
    )
    yield whole(f"{key}.mlp.proj.weight", (d, d_mlp), f"{name}.mlp.W_out", transposed)


def truncated_normal_std(d_model: int) -> float:
    """Huginn's standard deviation sqrt(2 / (5 d)) before its embedding scale is applied."""
    return math.sqrt(2.0 / (5.0 * d_model))
