"""Published equations in plain torch, for tests to compare with."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0, scale: float = 0.3) -> Weights:
    """Random tensors; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in shapes.items():
        weights[key] = scale * torch.randn(shape, generator=generator)
        if "norm" in key and key.endswith("weight"):
            weights[key] += 1.0
    return weights


def write(directory: Path, config: dict, weights: Weights) -> Path:
    """A checkpoint directory."""
    (directory / "config.json").write_text(json.dumps(config))
    save_file({key: w.contiguous() for key, w in weights.items()}, directory / "model.safetensors")
    return directory


def rms(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """RMSNorm."""
    x = x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    return x if weight is None else x * weight


def rotate(x: Tensor, base: float) -> Tensor:
    """Half-split rotary embedding of [batch, pos, head, d_head]."""
    half = x.shape[-1] // 2
    theta = base ** (-torch.arange(half) / half)
    angles = torch.arange(x.shape[1])[:, None] * theta
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax attention of [batch, pos, head, d_head]; keys may have fewer heads."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / q.shape[-1] ** 0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), v)


def causal(n_pos: int) -> Tensor:
    """Which key each query may see."""
    return torch.ones(n_pos, n_pos).tril().bool()


def llama_shapes(config: dict, n_layers: int, prefix: str = "model.layers.") -> dict:
    """Keys and shapes of Llama layers."""
    d, d_mlp, e = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * e, config["num_key_value_heads"] * e
    shapes = {}
    for layer in range(n_layers):
        key = f"{prefix}{layer}"
        shapes |= {
            f"{key}.input_layernorm.weight": (d,),
            f"{key}.post_attention_layernorm.weight": (d,),
            f"{key}.self_attn.q_proj.weight": (q, d),
            f"{key}.self_attn.k_proj.weight": (kv, d),
            f"{key}.self_attn.v_proj.weight": (kv, d),
            f"{key}.self_attn.o_proj.weight": (d, q),
            f"{key}.mlp.gate_proj.weight": (d_mlp, d),
            f"{key}.mlp.up_proj.weight": (d_mlp, d),
            f"{key}.mlp.down_proj.weight": (d, d_mlp),
        }
    return shapes


def llama_qkv(config: dict, weights: Weights, key: str, x: Tensor) -> tuple[Tensor, ...]:
    """Rotated queries and keys, and values, of a normed input; Qwen3's norms where stored."""
    e, base = config["head_dim"], config["rope_theta"]
    q, k, v = (
        F.linear(x, weights[f"{key}.self_attn.{n}_proj.weight"]).unflatten(-1, (-1, e))
        for n in "qkv"
    )
    if f"{key}.self_attn.q_norm.weight" in weights:
        eps = config["rms_norm_eps"]
        q = rms(q, weights[f"{key}.self_attn.q_norm.weight"], eps)
        k = rms(k, weights[f"{key}.self_attn.k_norm.weight"], eps)
    return rotate(q, base), rotate(k, base), v


def llama_mlp(weights: Weights, key: str, x: Tensor) -> Tensor:
    """SwiGLU."""
    gate = F.silu(F.linear(x, weights[f"{key}.mlp.gate_proj.weight"]))
    up = F.linear(x, weights[f"{key}.mlp.up_proj.weight"])
    return F.linear(gate * up, weights[f"{key}.mlp.down_proj.weight"])


def llama_layer(config: dict, weights: Weights, key: str, x: Tensor, mix=None) -> Tensor:
    """A pre-norm layer; ``mix(q, k, v)`` stands for causal attention."""
    eps = config["rms_norm_eps"]
    read = rms(x, weights[f"{key}.input_layernorm.weight"], eps)
    q, k, v = llama_qkv(config, weights, key, read)
    z = attend(q, k, v, causal(x.shape[1])) if mix is None else mix(q, k, v)
    x = x + F.linear(z.flatten(-2), weights[f"{key}.self_attn.o_proj.weight"])
    read = rms(x, weights[f"{key}.post_attention_layernorm.weight"], eps)
    return x + llama_mlp(weights, key, read)
