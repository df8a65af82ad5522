"""A gate on what attention writes, head by head and dimension by dimension (HRM-Text, Dory)."""

from typing import Any

import torch
from torch import Tensor, nn

from tl_loops.errors import ConfigError
from tl_loops.layout.names import spec
from tl_loops.mechanisms.block_parts import AttentionPart, Context
from tl_loops.mechanisms.mechanism import Config, Mechanism, Setting
from tl_loops.mechanisms.tensors import PhysicalTensor, Scale, Tensors, project_in
from tl_loops.mechanisms.words import exactly
from tl_loops.upstream import HookPoint


class _Gate(AttentionPart):
    """``z = sigmoid(x W_gate · (c w)²) · z``, with x what the queries read."""

    def __init__(self, attention: Any):
        self._attention = attention

    def heads(self, z: Tensor, query_input: Tensor) -> Tensor:
        logits = project_in(query_input, self._attention.W_gate)
        scale = getattr(self._attention, "gate_scale", None)
        logits = logits if scale is None else logits * scale().square()
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
        Setting(
            "attn_gate_scale",
            float | None,
            None,
            "c of ``(c w)²``, by which that map is multiplied for every head and dimension, with a "
            "trained w (Dory). ``None``: it is not.",
            above=0,
        ),
    )
    points = (spec("attn.hook_gate", "block", "batch pos head d_head"),)

    def check(self, cfg: Config) -> None:
        if cfg.attn_gate_scale is not None and not cfg.attn_gate:
            raise ConfigError("attn_gate_scale needs attn_gate")

    def describe(self, cfg: Config) -> list[str]:
        c = cfg.attn_gate_scale
        scale = "" if c is None else f"·({exactly(c)}·w)²"
        return [f"gate     z = σ(x W_gate{scale})·z, for every head and dimension"]

    def block_weights(self, cfg: Config, number: int) -> Tensors:
        shape = (cfg.n_heads, cfg.d_model, cfg.d_head)
        found = {"attn.W_gate": PhysicalTensor(shape, "heads_in")}
        if cfg.attn_gate_scale is not None:
            found["attn.gate_scale.w"] = PhysicalTensor((cfg.n_heads, cfg.d_head))
        return found

    def block_modules(self, cfg: Config, number: int, device: Any = None) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"attn.hook_gate": HookPoint()}  # in (0, 1)
        if cfg.attn_gate_scale is not None:
            weight = self.block_weights(cfg, number)["attn.gate_scale.w"]
            modules["attn.gate_scale"] = Scale(weight, cfg.attn_gate_scale, cfg.dtype, device)
        return modules

    def attention_part(self, attention: Any, context: Context) -> AttentionPart:
        return _Gate(attention)

    def fold_attention_norm(self, block: Any, gain: Tensor) -> None:
        block.attn.W_gate.mul_(gain[:, None])

    def keeps_value_biases(self, cfg: Config) -> str:
        return "attn_gate scales what they add"


ATTENTION_GATE = _AttentionGate()
