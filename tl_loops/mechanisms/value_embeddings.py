"""Embeddings of the token that an attention adds to its values (Parcae, nanochat)."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_loops.errors import ConfigError
from tl_loops.layout.names import spec
from tl_loops.mechanisms.block_parts import AttentionPart, Context
from tl_loops.mechanisms.mechanism import Config, Mechanism, Setting
from tl_loops.mechanisms.tensors import PhysicalTensor, Tensors, add_parameters, matrix
from tl_loops.upstream import HookPoint


def has_value_embedding(cfg: Config, number: int) -> bool:
    """Whether a physical layer, counted through prelude, core and coda, has one.

    Every second one has, counted so that the last one is among them.
    """
    return bool(cfg.value_embeddings) and (cfg.n_physical_layers - 1 - number) % 2 == 0


class ValueEmbedding(nn.Module):
    """``2 · sigmoid(x[..., :channels] W_gate) · W_E[tokens]``, one gate per key-value head.

    Hook points: ``hook_gate`` [batch, pos, kv_head], in (0, 2); ``hook_out`` [batch, pos, kv_head,
    d_head], what is added to the values.
    """

    W_E: nn.Parameter
    W_gate: nn.Parameter

    def __init__(self, cfg: Config, number: int, device: torch.device | str | None = None):
        super().__init__()
        self.channels = cfg.value_gate_channels
        weights = VALUE_EMBEDDINGS.block_weights(cfg, number)
        add_parameters(self, weights, "attn.value_embed", cfg.dtype, device)
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


class _AddToValues(AttentionPart):
    def __init__(self, attention: Any, tokens: Int[Tensor, "batch pos"]):
        self._attention, self._tokens = attention, tokens

    def values(self, v: Tensor, value_input: Tensor) -> Tensor:
        embed: ValueEmbedding = self._attention.value_embed
        copies = v.shape[2] // embed.W_gate.shape[1]
        return v + embed(value_input, self._tokens, copies)


class _ValueEmbeddings(Mechanism):
    name = "value_embeddings"
    settings = (
        Setting(
            "value_embeddings",
            bool,
            False,
            "Every second physical layer, counted so that the last one is among them, adds an "
            "embedding of its own of the token to its values, gated by the first "
            "``value_gate_channels`` channels of what the values read (Parcae).",
        ),
        Setting("value_gate_channels", int, 32, "See ``value_embeddings``.", at_least=1),
    )
    points = (
        spec("attn.value_embed.hook_gate", "block", "batch pos kv_head"),
        spec("attn.value_embed.hook_out", "block", "batch pos kv_head d_head"),
    )

    def check(self, cfg: Config) -> None:
        if cfg.value_embeddings and not 1 <= cfg.value_gate_channels <= cfg.d_model:
            raise ConfigError(
                f"value_gate_channels must be between 1 and d_model={cfg.d_model}, "
                f"got {cfg.value_gate_channels}"
            )

    def describe(self, cfg: Config) -> list[str]:
        return [
            "values   v += 2·sigmoid(gate(ln1(x)))·W_E[tokens], in every second layer; the gate "
            f"reads {cfg.value_gate_channels} channels"
        ]

    def block_weights(self, cfg: Config, number: int) -> Tensors:
        if not has_value_embedding(cfg, number):
            return {}
        kv_heads = cfg.n_key_value_heads or cfg.n_heads
        return {
            "attn.value_embed.W_E": PhysicalTensor((cfg.d_vocab, kv_heads, cfg.d_head)),
            "attn.value_embed.W_gate": matrix(cfg.value_gate_channels, kv_heads),
        }

    def block_modules(self, cfg: Config, number: int, device: Any = None) -> dict[str, nn.Module]:
        if not has_value_embedding(cfg, number):
            return {}
        return {"attn.value_embed": ValueEmbedding(cfg, number, device)}

    def attention_part(self, attention: Any, context: Context) -> AttentionPart | None:
        if not hasattr(attention, "value_embed"):
            return None
        assert context.tokens is not None
        return _AddToValues(attention, context.tokens)

    def fold_attention_norm(self, block: Any, gain: Tensor) -> None:
        embed = getattr(block.attn, "value_embed", None)
        if embed is not None:
            embed.W_gate.mul_(gain[: embed.channels, None])


VALUE_EMBEDDINGS = _ValueEmbeddings()
