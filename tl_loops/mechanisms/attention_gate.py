"""A gate on what attention writes, head by head and dimension by dimension (HRM-Text)."""

from typing import Any

import torch
from torch import Tensor, nn

from tl_loops.layout.names import spec
from tl_loops.mechanisms.block_parts import AttentionPart, Context
from tl_loops.mechanisms.mechanism import Config, Mechanism, Setting
from tl_loops.mechanisms.tensors import PhysicalTensor, Tensors, project_in
from tl_loops.upstream import HookPoint


class _Gate(AttentionPart):
    """``z = sigmoid(x W_gate) · z``, with x what the queries read."""

    def __init__(self, attention: Any):
        self._attention = attention

    def heads(self, z: Tensor, query_input: Tensor) -> Tensor:
        logits = project_in(query_input, self._attention.W_gate)
        return self._attention.hook_gate(torch.sigmoid(logits)) * z


class _AttentionGate(Mechanism):
    name = "attn_gate"
    settings = (
        Setting(
            "attn_gate",
            bool,
            False,
            "What attention writes is gated, head by head and dimension by dimension, by the "
            "sigmoid of a linear map of what the queries read (HRM-Text).",
        ),
    )
    points = (spec("attn.hook_gate", "block", "batch pos head d_head"),)

    def describe(self, cfg: Config) -> list[str]:
        return ["gate     z = σ(x W_gate)·z, for every head and dimension"]

    def block_weights(self, cfg: Config, number: int) -> Tensors:
        shape = (cfg.n_heads, cfg.d_model, cfg.d_head)
        return {"attn.W_gate": PhysicalTensor(shape, "heads_in")}

    def block_modules(self, cfg: Config, number: int, device: Any = None) -> dict[str, nn.Module]:
        return {"attn.hook_gate": HookPoint()}  # [batch, pos, head, d_head], in (0, 1)

    def attention_part(self, attention: Any, context: Context) -> AttentionPart:
        return _Gate(attention)

    def fold_attention_norm(self, block: Any, gain: Tensor) -> None:
        block.attn.W_gate.mul_(gain[:, None])

    def keeps_value_biases(self, cfg: Config) -> str:
        return "attn_gate scales what they add"


ATTENTION_GATE = _AttentionGate()
