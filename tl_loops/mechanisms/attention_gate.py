"""A gate on what attention writes, head by head and dimension by dimension (HRM-Text)."""

from typing import Any

from torch import Tensor

from tl_loops.layout.names import spec
from tl_loops.mechanisms.mechanism import Config, Mechanism, Setting
from tl_loops.mechanisms.tensors import PhysicalTensor, Tensors


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

    def fold_attention_norm(self, block: Any, gain: Tensor) -> None:
        block.attn.W_gate.mul_(gain[:, None])

    def keeps_value_biases(self, cfg: Config) -> str:
        return "attn_gate scales what they add"


ATTENTION_GATE = _AttentionGate()
