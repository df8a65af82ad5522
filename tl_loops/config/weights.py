"""Names, shapes and storage of the physical weights of a config."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:  # the config counts its parameters here
    from tl_loops.config.config import LoopedTransformerConfig

N_FREQUENCIES = 256
"""Width of the sinusoids that time conditioning embeds."""

Layout = Literal["plain", "transposed", "heads_in", "heads_out"]


@dataclass(frozen=True)
class PhysicalTensor:
    """Shape of a physical weight, and how the model wants it stored.

    Attributes:
        shape: In TransformerLens's orientation, ``x @ W``.
        layout: ``"plain"``: row-major. The others are views of a row-major ``[out, in]`` matrix,
            so that ``F.linear`` takes the weight without a copy: ``"transposed"`` of ``[in, out]``,
            ``"heads_in"`` of ``[head, d_model, d_head]``, ``"heads_out"`` of
            ``[head, d_head, d_model]``.
    """

    shape: tuple[int, ...]
    layout: Layout = "plain"


def key_value_name(cfg: "LoopedTransformerConfig", name: str) -> str:
    """``W_K`` under grouped-query attention is ``_W_K``, as in TransformerLens."""
    return name if cfg.n_key_value_heads is None else f"_{name}"


def physical_tensors(cfg: "LoopedTransformerConfig") -> dict[str, PhysicalTensor]:
    """All weights of a config, each once, by physical name.

    Returns:
        From ``"embed.W_E"`` over ``"core.0.attn.W_Q"`` to ``"unembed.W_U"``; the numbers of
        elements add up to ``cfg.n_params``.
    """
    d = cfg.d_model
    d_vocab_out = cfg.d_vocab if cfg.d_vocab_out == -1 else cfg.d_vocab_out
    found = {"embed.W_E": PhysicalTensor((cfg.d_vocab, d))}
    if cfg.n_extra_tokens:
        found["embed.W_extra"] = PhysicalTensor((cfg.n_extra_tokens, d))
    if cfg.post_embedding_ln:
        found |= _norm(cfg, "embed.ln", d)
    if cfg.positional_embedding_type == "standard":
        found["pos_embed.W_pos"] = PhysicalTensor((cfg.n_ctx, d))
    for number, layer in enumerate(cfg.layout.physical_names()):
        found |= {f"{layer}.{name}": tensor for name, tensor in _layer(cfg, number).items()}
    if cfg.norm_injection:
        found |= _norm(cfg, "ln_injection", d)
    if cfg.injection in ("concat", "concat_injection_first"):
        found["injection.W"] = PhysicalTensor((2 * d, d), "transposed")
    elif cfg.injection == "gated_diagonal":
        found["injection.A_log"] = PhysicalTensor((d,))
        found["injection.dt_bias"] = PhysicalTensor((d,))
        found["injection.W_B"] = PhysicalTensor((d, d), "transposed")
    found |= _mechanisms(cfg)
    if cfg.slow_initial_state == "learned":
        found["slow_initial_state.state"] = PhysicalTensor((d,))
    if cfg.time_conditioning:
        for part in ("time", "step"):
            name = f"time_conditioning.{part}"
            found[f"{name}.W_in"] = PhysicalTensor((N_FREQUENCIES, d), "transposed")
            found[f"{name}.W_out"] = PhysicalTensor((d, d), "transposed")
            found[f"{name}.b_in"] = found[f"{name}.b_out"] = PhysicalTensor((d,))
    if cfg.state_gate_rank is not None:
        found["state_gate.W_in"] = PhysicalTensor((d, cfg.state_gate_rank), "transposed")
        found["state_gate.W_out"] = PhysicalTensor((cfg.state_gate_rank, d), "transposed")
        found["state_gate.b_out"] = found["state_gate.A_log"] = PhysicalTensor((d,))
    if cfg.halt_head:
        found["halt_head.w"] = found["halt_head.b"] = PhysicalTensor((d,))
        found["halt_head.W"] = PhysicalTensor((d, 1), "transposed")
        found["halt_head.b_out"] = PhysicalTensor((1,))
    if cfg.linear_before_coda:
        found["coda_in.W"] = PhysicalTensor((d, d), "transposed")
    if cfg.final_norm:
        found |= _norm(cfg, "ln_final", d)
    if not cfg.tie_word_embeddings:
        found["unembed.W_U"] = PhysicalTensor((d, d_vocab_out), "transposed")
    if cfg.unembed_bias:
        found["unembed.b_U"] = PhysicalTensor((d_vocab_out,))
    if cfg.exit_gate:
        found["exit_gate.W"] = PhysicalTensor((d, 1), "transposed")
        found["exit_gate.b"] = PhysicalTensor((1,))
    if cfg.initial_state == "learned":
        found["initial_state.state"] = PhysicalTensor((d,))
    return found


def _mechanisms(cfg: "LoopedTransformerConfig") -> dict[str, PhysicalTensor]:
    """Weights of step embeddings, routers and hyper-connections."""
    d, rows = cfg.d_model, cfg.max_iterations or cfg.n_iterations
    found: dict[str, PhysicalTensor] = {}
    if cfg.step_embedding == "learned":
        found["step_embedding.W_E"] = PhysicalTensor((rows, d))
    if cfg.router is not None:
        found["router.W"] = PhysicalTensor((d, rows), "transposed")
    if cfg.hyper_connections is not None:
        n = cfg.hyper_connections
        found["hyper_connections.W_gates"] = PhysicalTensor((rows, n * d, 3 * n))
        found["hyper_connections.b_gates"] = PhysicalTensor((rows, 3 * n))
        found["hyper_connections.W_E"] = PhysicalTensor((rows, d))
    return found


def _layer(cfg: "LoopedTransformerConfig", number: int) -> dict[str, PhysicalTensor]:
    d, heads, d_head, d_mlp = cfg.d_model, cfg.n_heads, cfg.d_head, cfg.d_mlp or 0
    kv_heads = cfg.n_key_value_heads or heads
    found: dict[str, PhysicalTensor] = {}
    if cfg.block_norm not in ("post_branch", "post_norm"):
        found |= _block_norm(cfg, "ln1") | _block_norm(cfg, "ln2")
    if cfg.block_norm != "pre":
        found |= _block_norm(cfg, "ln1_post") | _block_norm(cfg, "ln2_post")
    W_K, W_V, b_K, b_V = (key_value_name(cfg, name) for name in ("W_K", "W_V", "b_K", "b_V"))
    found["attn.W_Q"] = PhysicalTensor((heads, d, d_head), "heads_in")
    found[f"attn.{W_K}"] = PhysicalTensor((kv_heads, d, d_head), "heads_in")
    found[f"attn.{W_V}"] = PhysicalTensor((kv_heads, d, d_head), "heads_in")
    found["attn.W_O"] = PhysicalTensor((heads, d_head, d), "heads_out")
    if cfg.qk_bias or cfg.attn_bias:
        found["attn.b_Q"] = PhysicalTensor((heads, d_head))
        found[f"attn.{b_K}"] = PhysicalTensor((kv_heads, d_head))
    if cfg.attn_bias:
        found[f"attn.{b_V}"] = PhysicalTensor((kv_heads, d_head))
        found["attn.b_O"] = PhysicalTensor((d,))
    if cfg.qk_norm == "full":
        found |= _norm(cfg, "attn.q_norm", heads * d_head)
        found |= _norm(cfg, "attn.k_norm", kv_heads * d_head)
    if cfg.time_conditioning:
        found["modulation.W"] = PhysicalTensor((d, 4 * d), "transposed")
        found["modulation.b"] = PhysicalTensor((4 * d,))
    if cfg.qk_norm == "head_weight":
        found |= _norm(cfg, "attn.q_norm", d_head) | _norm(cfg, "attn.k_norm", d_head)
    if cfg.first_pass_window is not None:
        found["attn.first_pass.W"] = PhysicalTensor((heads, d_head))
        found["attn.first_pass.b"] = PhysicalTensor((heads,))
    if cfg.attn_gate:
        found["attn.W_gate"] = PhysicalTensor((heads, d, d_head), "heads_in")
    if cfg.has_value_embedding(number):
        found["attn.value_embed.W_E"] = PhysicalTensor((cfg.d_vocab, kv_heads, d_head))
        channels = cfg.value_gate_channels
        found["attn.value_embed.W_gate"] = PhysicalTensor((channels, kv_heads), "transposed")
    if cfg.gated_mlp:
        found["mlp.W_gate"] = PhysicalTensor((d, d_mlp), "transposed")
    found["mlp.W_in"] = PhysicalTensor((d, d_mlp), "transposed")
    found["mlp.W_out"] = PhysicalTensor((d_mlp, d), "transposed")
    if cfg.mlp_bias:
        found["mlp.b_in"] = PhysicalTensor((d_mlp,))
        found["mlp.b_out"] = PhysicalTensor((d,))
    return found


def _block_norm(cfg: "LoopedTransformerConfig", name: str) -> dict[str, PhysicalTensor]:
    return _norm(cfg, name, cfg.d_model) if cfg.block_norm_weight else {}


def _norm(cfg: "LoopedTransformerConfig", name: str, length: int) -> dict[str, PhysicalTensor]:
    if not cfg.norm_has_weight:
        return {}
    found = {f"{name}.w": PhysicalTensor((length,))}
    if cfg.normalization_type == "LN":
        found[f"{name}.b"] = PhysicalTensor((length,))
    return found


def empty_as(
    shape: tuple[int, ...],
    layout: Layout,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """An uninitialised physical weight with the strides that ``layout`` asks for."""
    order = {"plain": range(len(shape)), "transposed": (1, 0), "heads_in": (0, 2, 1)}.get(
        layout, (2, 0, 1)
    )
    stored = torch.empty([shape[axis] for axis in order], dtype=dtype, device=device)
    return stored.permute([list(order).index(axis) for axis in range(len(shape))])
