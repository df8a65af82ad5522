"""Tiny models of every architecture that tests run over."""

from collections.abc import Sequence
from typing import Any

import torch

from tl_loops.config.config import LoopedTransformerConfig

SIZES: dict[str, Any] = dict(
    d_model=32, d_head=8, n_heads=4, d_mlp=48, d_vocab=50, n_ctx=64, seed=0, device="cpu"
)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "retrofitted": dict(
        n_prelude=1, n_core=2, n_coda=1, n_iterations=3, injection="concat", initial_state="normal"
    ),
    "ouro": dict(
        n_core=3,
        n_iterations=4,
        block_norm="sandwich",
        norm_between_iterations=True,
        exit_gate=True,
    ),
    "huginn": dict(
        n_prelude=2,
        n_core=2,
        n_coda=2,
        n_iterations=3,
        injection="concat",
        initial_state="normal",
        initial_state_std=0.6,
        block_norm="post_residual",
        norm_before_coda=True,
        tie_word_embeddings=True,
        qk_bias=True,
        rotary_layout="interleaved",
        embed_scale=5.0,
    ),
    "olmo_grouped": dict(
        n_prelude=1,
        n_core=2,
        n_coda=1,
        n_iterations=3,
        injection="gated_diagonal",
        initial_state="zeros",
        block_norm="post_branch",
        qk_norm="full",
        n_key_value_heads=2,
    ),
    "layer_norm": dict(
        n_core=2,
        n_coda=1,
        n_iterations=3,
        injection="add",
        initial_state="learned",
        positional_embedding_type="standard",
        normalization_type="LN",
        gated_mlp=False,
        act_fn="gelu",
        attn_bias=True,
        mlp_bias=True,
        unembed_bias=True,
    ),
    "parcae": dict(
        n_prelude=1,
        n_core=2,
        n_coda=2,
        n_iterations=3,
        n_key_value_heads=2,
        injection="gated_diagonal",
        initial_state="normal",
        norm_injection=True,
        linear_before_coda=True,
        value_embeddings=True,
        value_gate_channels=5,
        qk_norm="head",
        act_fn="half_relu2",
        gated_mlp=False,
        rotary_layout="interleaved",
        tie_word_embeddings=True,
    ),
    "nanochat": dict(
        n_prelude=1,
        n_core=2,
        n_coda=1,
        n_iterations=3,
        n_key_value_heads=2,
        injection="concat_injection_first",
        normalization_type="RMSPre",
        eps=1.1920928955078125e-07,
        post_embedding_ln=True,
        qk_norm="head",
        act_fn="relu2",
        gated_mlp=False,
        rotary_reversed=True,
        rotary_table_dtype="bfloat16",
    ),
    "sphere": dict(
        n_prelude=2,
        n_core=2,
        n_coda=1,
        n_iterations=3,
        n_key_value_heads=2,
        injection="add_normed",
        block_norm="stream",
        normalization_type="L2",
        residual_rate=0.3,
        qk_norm="head_weight",
        query_scale=1.7,
        attn_gate=True,
        attn_gate_scale=1.3,
        inner_norms=True,
        neuron_scale=2.5,
        logit_scale=3.0,
        attn_window=3,
        attn_window_layers=(0, 2, 4),
        attn_window_rotary_base=100.0,
    ),
    "weightless": dict(
        n_prelude=1,
        n_core=2,
        n_iterations=3,
        injection="concat_injection_first",
        normalization_type="RMSPre",
        qk_norm="head",
    ),
}


def tiny_config(architecture: str, **changes: Any) -> LoopedTransformerConfig:
    """The config of one of the dictionaries of this file, changed."""
    known = {**ARCHITECTURES, **MECHANISMS, **STACKS, **SIDE_BY_SIDE}
    return LoopedTransformerConfig(**{**SIZES, **known[architecture], **changes})


def tiny_model(architecture: str, **changes: Any):
    """A randomly initialised model, with norm gains, biases and gates drawn as well."""
    from tl_loops.model.looped import LoopedTransformer

    model = LoopedTransformer(tiny_config(architecture, **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.physical_named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if leaf == "w":
                parameter.copy_(1.0 + 0.3 * torch.randn(parameter.shape, generator=generator))
            elif leaf.lstrip("_").startswith("b"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_tokens(batch: int = 2, pos: int = 9, seed: int = 3) -> torch.Tensor:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SIZES["d_vocab"], (batch, pos), generator=generator)


def padded_tokens(lengths: Sequence[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids [batch, pos] of prompts of several lengths, and 0 where they are padding."""
    n_pos = max(lengths)
    starts = [n_pos - length if side == "left" else 0 for length in lengths]
    mask = torch.zeros(len(lengths), n_pos, dtype=torch.long)
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        mask[row, start : start + length] = 1
    return tiny_tokens(*mask.shape, seed=sum(lengths)), mask


MECHANISMS: dict[str, dict[str, Any]] = {
    "universal": dict(
        n_core=1,
        n_iterations=4,
        block_norm="post_norm",
        normalization_type="LN",
        positional_embedding_type="none",
        step_embedding="position_and_step",
        gated_mlp=False,
        act_fn="relu",
        attn_bias=True,
        mlp_bias=True,
    ),
    "act": dict(n_prelude=1, n_core=2, n_coda=1, n_iterations=4, exit_gate=True, halting="act"),
    "ponder": dict(n_core=2, n_iterations=4, exit_gate=True, halting="ponder", injection="add"),
    "recursions": dict(n_prelude=1, n_core=2, n_coda=1, n_iterations=3, router="token_choice"),
    "recursions_sigmoid": dict(
        n_core=1,
        n_iterations=4,
        router="token_choice",
        router_score="sigmoid",
        router_scale=0.5,
        router_gates="last",
        injection="add",
    ),
    "hyperloop": dict(n_prelude=1, n_core=2, n_coda=1, n_iterations=3, hyper_connections=3),
    "learned_steps": dict(
        n_prelude=1, n_core=2, n_iterations=3, max_iterations=5, step_embedding="learned"
    ),
}
"""Loops that do more than run their core."""

STACKS: dict[str, dict[str, Any]] = {
    "hrm_text": dict(
        n_core=2,
        n_iterations=6,
        stacks=("L", "L", "H"),
        initial_state="learned",
        norm_between_iterations=True,
        normalization_type="RMSPre",
        attn_gate=True,
        prefix_mask=True,
        embed_scale=5.0,
    ),
    "injected": dict(
        n_prelude=1,
        n_core=2,
        n_coda=1,
        n_iterations=4,
        stacks=("fast", "slow"),
        initial_state="normal",
        slow_initial_state="learned",
        injection="add",
        n_key_value_heads=2,
    ),
    "injected_twice": dict(
        n_prelude=1,
        n_core=2,
        n_coda=1,
        n_iterations=4,
        stacks=("L", "H"),
        slow_injection=True,
        initial_state="hashed_normal",
        injection="gated_diagonal",
    ),
    "repeated": dict(
        n_prelude=1,
        n_core=4,
        n_coda=1,
        n_iterations=4,
        stacks=("L", "H"),
        layer_repeats=2,
        slow_injection=True,
        injection="gated_diagonal",
    ),
}
"""Architectures with two stacks, which some tools refuse."""

VARIATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("retrofitted", dict(injection=None, initial_state="embed")),
    "biased_sandwich": (
        "ouro",
        dict(
            n_prelude=1,
            n_core=2,
            n_coda=1,
            n_iterations=3,
            injection="concat",
            injection_bias=True,
            attn_bias=True,
            mlp_bias=True,
        ),
    ),
    "layer_norm_between": (
        "layer_norm",
        dict(n_prelude=1, injection=None, initial_state="embed", norm_between_iterations=True),
    ),
    "huginn_without_coda": ("huginn", dict(n_coda=0)),
    "branch_normed_between": (
        "olmo_grouped",
        dict(n_coda=0, norm_between_iterations=True, injection=None, initial_state="embed"),
    ),
    "universal_steps": ("universal", dict(n_core=2, n_iterations=3)),
    "biased_post_residual": (
        "huginn",
        dict(injection="add", initial_state="learned", attn_bias=True, mlp_bias=True),
    ),
}
"""Combinations that no released model has, by name: the architecture varied, and the changes."""


def any_model(name: str, **changes: Any):
    """A model of :data:`ARCHITECTURES` or :data:`VARIATIONS`."""
    architecture, variation = VARIATIONS.get(name, (name, {}))
    return tiny_model(architecture, **{**variation, **changes})


SIDE_BY_SIDE: dict[str, dict[str, Any]] = {
    "parallel": dict(
        n_prelude=1,
        n_core=2,
        n_coda=1,
        n_iterations=2,
        parallel_attn_mlp=True,
        rotary_dim=4,
        normalization_type="LN",
        gated_mlp=False,
        act_fn="gelu",
        qk_bias=True,
        value_bias=True,
        mlp_bias=True,
    ),
}
"""Attention and MLP read the same stream: there is none between the two."""
