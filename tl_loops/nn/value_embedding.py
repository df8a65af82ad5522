"""Embeddings of the token that an attention adds to its values."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.nn.mlp import transposed_parameter
from tl_loops.upstream import HookPoint


class ValueEmbedding(nn.Module):
    """``2 · sigmoid(x[..., :channels] W_gate) · W_E[tokens]``, one gate a key-value head.

    Hook points: ``hook_gate`` [batch, pos, kv_head], in (0, 2); ``hook_out`` [batch, pos, kv_head,
    d_head], what is added to the values.
    """

    def __init__(self, cfg: LoopedTransformerConfig, device: torch.device | str | None = None):
        super().__init__()
        kv_heads = cfg.n_key_value_heads or cfg.n_heads
        self.channels = cfg.value_gate_channels
        self.W_E = nn.Parameter(
            torch.empty(cfg.d_vocab, kv_heads, cfg.d_head, dtype=cfg.dtype, device=device)
        )
        self.W_gate = transposed_parameter(self.channels, kv_heads, cfg.dtype, device)
        self.hook_gate = HookPoint()
        self.hook_out = HookPoint()

    def forward(
        self,
        x: Float[Tensor, "batch pos *head_or_not d_model"],
        tokens: Int[Tensor, "batch pos"],
        copies: int = 1,
    ) -> Float[Tensor, "batch pos head d_head"]:
        """What is added to the values.

        Args:
            x: What the values read; with a head axis, each head its own.
            tokens: The tokens at these positions.
            copies: How often each key-value head is shown (for ungrouped values).
        """
        W_gate = self.W_gate.repeat_interleave(copies, dim=1)
        read = x[..., : self.channels]
        if x.ndim == 4:
            logits = torch.einsum("bphc,ch->bph", read, W_gate)
        else:
            logits = F.linear(read, W_gate.T)
        gate = self.hook_gate(2.0 * torch.sigmoid(logits))
        rows = F.embedding(tokens, self.W_E.flatten(1)).unflatten(-1, self.W_E.shape[1:])
        return self.hook_out(gate.unsqueeze(-1) * rows.repeat_interleave(copies, dim=2))
