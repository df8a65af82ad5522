"""The baseline of the forward benchmark: Ouro's forward pass in plain torch, without hooks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tl_loops import LoopedTransformer, LoopedTransformerConfig


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * self.weight


class Layer(nn.Module):
    """Sandwich-norm block with rotary attention and a gated SiLU MLP."""

    def __init__(self, d: int, heads: int, d_mlp: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(RMSNorm(d, eps) for _ in range(4))
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(d, d_mlp, bias=False), nn.Linear(d, d_mlp, bias=False)
        self.down = nn.Linear(d_mlp, d, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: list[Tensor] | None = None
    ) -> Tensor:
        n = self.norms[0](x)
        q, k, v = (
            m(n).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past:
            k, v = (torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True))
        if past is not None:
            past[:] = k, v
        z = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        x = x + self.norms[1](self.o(z.transpose(1, 2).flatten(-2)))
        n = self.norms[2](x)
        return x + self.norms[3](self.down(F.silu(self.gate(n)) * self.up(n)))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class PlainOuro(nn.Module):
    def __init__(self, d, heads, d_mlp, layers, loops, vocab, base=1e6, eps=1e-6):
        super().__init__()
        self.loops, self.base = loops, base
        self.embed = nn.Embedding(vocab, d)
        self.layers = nn.ModuleList(Layer(d, heads, d_mlp, eps) for _ in range(layers))
        self.norm, self.gate = RMSNorm(d, eps), nn.Linear(d, 1)
        self.head = nn.Linear(d, vocab, bias=False)
        self.d_head = d // heads

    def forward(
        self, tokens: Tensor, start: int = 0, past: list[list[Tensor]] | None = None
    ) -> Tensor:
        theta = self.base ** (-torch.arange(0, self.d_head, 2) / self.d_head)
        angles = torch.outer(torch.arange(start, start + tokens.shape[1]).float(), theta)
        angles = angles.to(tokens.device, non_blocking=True)
        cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
        x = self.embed(tokens)
        for t in range(self.loops):
            for i, layer in enumerate(self.layers):
                held = None if past is None else past[t * len(self.layers) + i]
                x = layer(x, cos, sin, held)
            x = self.norm(x)
            self.gate(x)
        return self.head(x)

    def decode(self, tokens: Tensor, n_new: int) -> Tensor:
        """Greedy tokens, with keys and values kept per loop and layer."""
        past: list[list[Tensor]] = [[] for _ in range(self.loops * len(self.layers))]
        new, at, every = tokens, 0, [tokens]
        for _ in range(n_new):
            logits = self(new, at, past)
            at += new.shape[1]
            new = logits[:, -1:].argmax(-1)
            every.append(new)
        return torch.cat(every, dim=1)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the physical weights of a LoopedTransformer, so that both compute the same."""
        with torch.no_grad():
            self.embed.weight.copy_(weights["embed.W_E"])
            self.head.weight.copy_(weights["unembed.W_U"].T)
            self.norm.weight.copy_(weights["ln_final.w"])
            self.gate.weight.copy_(weights["exit_gate.W"].T)
            for i, layer in enumerate(self.layers):
                p = f"core.{i}."
                names = ("ln1.w", "ln1_post.w", "ln2.w", "ln2_post.w")
                for norm, name in zip(layer.norms, names, strict=True):
                    norm.weight.copy_(weights[p + name])
                for linear, name in ((layer.q, "W_Q"), (layer.k, "W_K"), (layer.v, "W_V")):
                    w = weights[p + f"attn.{name}"]
                    linear.weight.copy_(w.transpose(1, 2).reshape(-1, w.shape[1]))
                layer.o.weight.copy_(weights[p + "attn.W_O"].flatten(0, 1).T)
                for linear, name in (
                    (layer.gate, "W_gate"),
                    (layer.up, "W_in"),
                    (layer.down, "W_out"),
                ):
                    linear.weight.copy_(weights[p + f"mlp.{name}"].T)


def ouro(
    d: int, layers: int, loops: int, vocab: int, device: str = "cpu"
) -> tuple[LoopedTransformer, PlainOuro]:
    """A random model of Ouro's kind, ``(0, layers⊗loops, 0)``, and the same in plain torch."""
    heads, d_mlp = d // 64, d * 11 // 4
    cfg = LoopedTransformerConfig(
        n_core=layers,
        n_iterations=loops,
        d_model=d,
        d_head=64,
        n_heads=heads,
        d_mlp=d_mlp,
        d_vocab=vocab,
        n_ctx=2048,
        block_norm="sandwich",
        norm_between_iterations=True,
        exit_gate=True,
        rotary_base=1e6,
        seed=0,
        device=device,
    )
    model = LoopedTransformer(cfg).eval()
    plain = PlainOuro(d, heads, d_mlp, layers, loops, vocab).to(device)
    plain.load(model.physical_state_dict())
    return model, plain
