"""What the norms, attentions, positions and MLPs of a config compute, a line for each."""

import math
from typing import Any

from tl_loops.mechanisms.words import exactly

Config = Any  # a LoopedTransformerConfig, which describes itself by this

_NORMS = {
    "RMS": "RMS: x / √(mean(x²) + {eps})·w",
    "RMSPre": "RMS: x / √(mean(x²) + {eps}), without weights",
    "LN": "LayerNorm: (x - mean(x)) / √(var(x) + {eps})·w + b",
    "LNPre": "LayerNorm: (x - mean(x)) / √(var(x) + {eps}), without weights",
    "L2": "L2: x / √(sum(x²) + {eps}), without weights",
}
_SIDE_BY_SIDE = "x += attn(ln1(x)) + mlp(ln2(x))"
_BLOCKS = {
    "pre": "x += attn(ln1(x)); x += mlp(ln2(x))",
    "sandwich": "x += ln1_post(attn(ln1(x))); x += ln2_post(mlp(ln2(x)))",
    "post_residual": "x = ln1_post(x + attn(ln1(x))); x = ln2_post(x + mlp(ln2(x)))",
    "post_branch": "x += ln1_post(attn(x)); x += ln2_post(mlp(x))",
    "post_norm": "x = ln1_post(x + attn(x)); x = ln2_post(x + mlp(x))",
    "stream": "x = ln1(x); x += ln1_post(attn(x)); x = ln2(x); x += ln2_post(mlp(x))",
}
_QUERY_KEY_NORMS = {
    "full": "q and k normed over all heads, with weights",
    "head": "q and k normed in each head after the rotation, without weights",
    "head_weight": "q and k normed in each head, with weights",
}
_PAIRS = {
    "half": "pairs of dimensions i and i + {half}",
    "interleaved": "pairs of dimensions 2i and 2i + 1",
}


def parts(cfg: Config) -> list[str]:
    """The lines of ``describe()`` about what is inside of blocks, and about sizes."""
    return [
        f"norm     {_norm(cfg)}",
        f"attn     {_attention(cfg)}",
        f"position {_positions(cfg)}",
        f"mlp      {_mlp(cfg)}",
        f"sizes    {_sizes(cfg)}",
    ]


def block(cfg: Config) -> str:
    """A block as formulas."""
    return _SIDE_BY_SIDE if cfg.parallel_attn_mlp else _BLOCKS[cfg.block_norm]


def embedding(cfg: Config) -> str:
    """What a token becomes, as a formula."""
    scale = f"·{exactly(cfg.embed_scale)}" if cfg.embed_scale != 1.0 else ""
    embed = f"W_E[tokens]{scale}"
    embed = f"ln({embed})" if cfg.post_embedding_ln else embed
    return embed + " + W_pos[positions]" if cfg.positional_embedding_type == "standard" else embed


def unembedding(cfg: Config, read: str) -> str:
    """The logits as a formula.

    Args:
        cfg: The config.
        read: What is unembedded.
    """
    logits = f"{read} {'W_Eᵀ' if cfg.tie_word_embeddings else 'W_U'}"
    logits += " + b_U" if cfg.unembed_bias else ""
    cap = cfg.output_logits_soft_cap
    if cap <= 0:
        return logits
    return f"{exactly(cap)}·tanh(({logits}) / {exactly(cap)})"


def _norm(cfg: Config) -> str:
    if cfg.normalization_type is None:
        return "none"
    said = _NORMS[cfg.normalization_type].format(eps=exactly(cfg.eps))
    weightless = cfg.norm_has_weight and not cfg.block_norm_weight
    return f"{said}; those of blocks without weights" if weightless else said


def _attention(cfg: Config) -> str:
    grouped = cfg.n_key_value_heads
    said = [
        f"softmax(q kᵀ{_scale(cfg)}) v",
        f"{cfg.n_heads} heads of {cfg.d_head}" + (f" ({grouped} of k and v)" if grouped else ""),
        cfg.attention_dir,
    ]
    biased = ["q, k"] if cfg.qk_bias or cfg.attn_bias else []
    biased += ["v"] if cfg.value_bias or cfg.attn_bias else []
    biased += ["the output"] if cfg.attn_bias else []
    said += [f"biases of {', '.join(biased)}"] if biased else []
    if cfg.qk_norm is not None:
        norm = _QUERY_KEY_NORMS[cfg.qk_norm]
        said.append(norm if cfg.norm_has_weight else norm.replace(", with weights", ""))
    return ", ".join(said)


def _scale(cfg: Config) -> str:
    if not cfg.use_attn_scale:
        return ""
    root = math.sqrt(cfg.d_head)
    return f" / √{cfg.d_head}" if cfg.attn_scale == root else f" / {exactly(cfg.attn_scale)}"


def _positions(cfg: Config) -> str:
    kind = cfg.positional_embedding_type
    if kind != "rotary":
        return "learned, W_pos" if kind == "standard" else str(kind)
    pairs = _PAIRS[cfg.rotary_layout].format(half=cfg.rotary_dim // 2)
    said = [f"rotary, {cfg.rotary_dim} of {cfg.d_head} dimensions, {pairs}"]
    said.append(f"base {exactly(cfg.rotary_base)}")
    if cfg.use_NTK_by_parts_rope:
        low, high = cfg.NTK_by_parts_low_freq_factor, cfg.NTK_by_parts_high_freq_factor
        said.append(
            f"long wavelengths stretched by {exactly(cfg.NTK_by_parts_factor)} (NTK by parts, "
            f"{exactly(low)} to {exactly(high)} of {cfg.NTK_original_ctx_len})"
        )
    elif cfg.rotary_scaling_factor != 1.0:
        said.append(f"positions / {exactly(cfg.rotary_scaling_factor)}")
    said += ["by the negative angle"] if cfg.rotary_reversed else []
    rounded = cfg.rotary_table_dtype
    said += [f"cos and sin rounded to {rounded}"] if rounded is not None else []
    return ", ".join(said)


def _mlp(cfg: Config) -> str:
    if cfg.attn_only or cfg.act_fn is None:
        return "none"
    bias_in, bias_out = (" + b_in", " + b_out") if cfg.mlp_bias else ("", "")
    if cfg.gated_mlp:
        inside = f"{cfg.act_fn}(x W_gate)·(x W_in){bias_in}"
    else:
        inside = f"{cfg.act_fn}(x W_in{bias_in})"
    inside = f"({inside})" if cfg.gated_mlp else inside
    return f"{inside} W_out{bias_out}, d_mlp {cfg.d_mlp}"


def _sizes(cfg: Config) -> str:
    said = [f"d_model {cfg.d_model}", f"d_vocab {cfg.d_vocab}"]
    if cfg.d_vocab_out != cfg.d_vocab:
        said.append(f"d_vocab_out {cfg.d_vocab_out}")
    if cfg.padded_vocab is not None:
        said.append(f"tokens from {cfg.padded_vocab} on are padding")
    said += [f"n_ctx {cfg.n_ctx}", str(cfg.dtype).removeprefix("torch.")]
    bos = "with" if cfg.default_prepend_bos else "without"
    return ", ".join([*said, f"text {bos} a BOS token"])
