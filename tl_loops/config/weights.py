"""Names, shapes and storage of the physical weights of a config."""

from typing import Any

from tl_loops.mechanisms import MECHANISMS
from tl_loops.mechanisms.norm import norm_tensors
from tl_loops.mechanisms.tensors import PhysicalTensor, Tensors, matrix, vector

Config = Any  # the config counts its parameters here


def key_value_name(cfg: Config, name: str) -> str:
    """``W_K`` under grouped-query attention is ``_W_K``, as in TransformerLens."""
    return name if cfg.n_key_value_heads is None else f"_{name}"


def physical_tensors(cfg: Config) -> Tensors:
    """All weights of a config, each once, by physical name.

    Returns:
        From ``"embed.W_E"`` over ``"core.0.attn.W_Q"`` to ``"unembed.W_U"``; the numbers of
        elements add up to ``cfg.n_params``.
    """
    d = cfg.d_model
    active = [mechanism for mechanism in MECHANISMS if mechanism.active(cfg)]
    found = {"embed.W_E": PhysicalTensor((cfg.d_vocab, d))}
    if cfg.post_embedding_ln:
        found |= norm_tensors(cfg, "embed.ln", d)
    if cfg.positional_embedding_type == "standard":
        found["pos_embed.W_pos"] = PhysicalTensor((cfg.n_ctx, d))
    for number, layer in enumerate(cfg.layout.physical_names()):
        found |= {f"{layer}.{name}": tensor for name, tensor in block_tensors(cfg, number).items()}
    for mechanism in active:
        for norm in mechanism.norms(cfg):
            found |= norm_tensors(cfg, norm, d)
        if not mechanism.reads_out:
            found |= mechanism.weights(cfg)
    if cfg.final_norm:
        found |= norm_tensors(cfg, "ln_final", d)
    if not cfg.tie_word_embeddings:
        found["unembed.W_U"] = matrix(d, cfg.d_vocab_out)
    if cfg.unembed_bias:
        found["unembed.b_U"] = vector(cfg.d_vocab_out)
    for mechanism in active:
        if mechanism.reads_out:
            found |= mechanism.weights(cfg)
    return found


def block_tensors(cfg: Config, number: int) -> Tensors:
    """The weights of a physical layer, counted through prelude, core and coda."""
    found: Tensors = {}
    if cfg.block_norm_weight:
        for name in block_norms(cfg):
            found |= norm_tensors(cfg, name, cfg.d_model)
    found |= attention_tensors(cfg)
    for mechanism in MECHANISMS:
        if mechanism.active(cfg):
            found |= mechanism.block_weights(cfg, number)
    return found | mlp_tensors(cfg)


def block_norms(cfg: Config) -> tuple[str, ...]:
    """The names of a block's norms."""
    before = () if cfg.block_norm in ("post_branch", "post_norm") else ("ln1", "ln2")
    after = () if cfg.block_norm == "pre" else ("ln1_post", "ln2_post")
    return (*before, *after)


def attention_tensors(cfg: Config) -> Tensors:
    """The weights of an attention, from ``"attn.W_Q"`` on."""
    d, heads, d_head = cfg.d_model, cfg.n_heads, cfg.d_head
    kv_heads = cfg.n_key_value_heads or heads
    W_K, W_V, b_K, b_V = (key_value_name(cfg, name) for name in ("W_K", "W_V", "b_K", "b_V"))
    found: Tensors = {
        "attn.W_Q": PhysicalTensor((heads, d, d_head), "heads_in"),
        f"attn.{W_K}": PhysicalTensor((kv_heads, d, d_head), "heads_in"),
        f"attn.{W_V}": PhysicalTensor((kv_heads, d, d_head), "heads_in"),
        "attn.W_O": PhysicalTensor((heads, d_head, d), "heads_out"),
    }
    if cfg.qk_bias or cfg.attn_bias:
        found["attn.b_Q"] = PhysicalTensor((heads, d_head))
        found[f"attn.{b_K}"] = PhysicalTensor((kv_heads, d_head))
    if cfg.value_bias or cfg.attn_bias:
        found[f"attn.{b_V}"] = PhysicalTensor((kv_heads, d_head))
    if cfg.attn_bias:
        found["attn.b_O"] = vector(d)
    for name, length in query_key_norms(cfg).items():
        found |= norm_tensors(cfg, f"attn.{name}", length)
    return found


def query_key_norms(cfg: Config) -> dict[str, int]:
    """The norms of queries and keys that have weights, with the lengths that they act on."""
    kv_heads = cfg.n_key_value_heads or cfg.n_heads
    if cfg.qk_norm == "full":
        return {"q_norm": cfg.n_heads * cfg.d_head, "k_norm": kv_heads * cfg.d_head}
    if cfg.qk_norm == "head_weight":
        return {"q_norm": cfg.d_head, "k_norm": cfg.d_head}
    return {}


def mlp_tensors(cfg: Config) -> Tensors:
    """The weights of an MLP, from ``"mlp.W_in"`` on."""
    d, d_mlp = cfg.d_model, cfg.d_mlp or 0
    found = {"mlp.W_gate": matrix(d, d_mlp)} if cfg.gated_mlp else {}
    found["mlp.W_in"] = matrix(d, d_mlp)
    found["mlp.W_out"] = matrix(d_mlp, d)
    if cfg.mlp_bias:
        found["mlp.b_in"], found["mlp.b_out"] = vector(d_mlp), vector(d)
    return found
