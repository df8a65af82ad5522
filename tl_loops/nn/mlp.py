"""Plain and gated multi-layer perceptrons with TransformerLens's hook points."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tl_loops.config.activations import ACTIVATIONS
from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.config.weights import mlp_tensors
from tl_loops.mechanisms.tensors import add_parameters
from tl_loops.nn.block_modules import add_block_modules
from tl_loops.upstream import HookPoint, Module


class MLP(Module):
    """``act(x W_in + b_in) W_out + b_out``, plain or gated.

    Gated: ``(act(x W_gate) · x W_in + b_in) W_out + b_out``.

    Args:
        cfg: The config.
        device: Where the weights go.
        number: Of the physical layer, counted through prelude, core and coda.
    """

    W_gate: nn.Parameter
    W_in: nn.Parameter
    W_out: nn.Parameter
    b_in: Tensor
    b_out: Tensor

    def __init__(
        self,
        cfg: LoopedTransformerConfig,
        device: torch.device | str | None = None,
        number: int = 0,
    ):
        super().__init__()
        assert cfg.d_mlp is not None and cfg.act_fn is not None
        self.gated = cfg.gated_mlp
        self.act_fn = ACTIVATIONS[cfg.act_fn]
        add_parameters(self, mlp_tensors(cfg), "mlp", cfg.dtype, device)
        if not cfg.mlp_bias:  # Zero, but there: TransformerLens's tools add them.
            for name, width in (("b_in", cfg.d_mlp), ("b_out", cfg.d_model)):
                zeros = torch.zeros(width, dtype=cfg.dtype, device=device)
                self.register_buffer(name, zeros, persistent=False)
        self._mechanisms = add_block_modules(self, cfg, number, device, "mlp")
        self.hook_pre = HookPoint()  # [batch, pos, d_mlp], what the activation function gets
        if self.gated:
            self.hook_pre_linear = HookPoint()  # [batch, pos, d_mlp]
        self.hook_post = HookPoint()  # [batch, pos, d_mlp], what W_out reads

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        parts = [p for m in self._mechanisms if (p := m.mlp_part(self)) is not None]
        if self.gated:
            pre, linear = F.linear(x, self.W_gate.T), F.linear(x, self.W_in.T)
            for part in parts:
                pre, linear = part.pre(pre), part.linear(linear)
            pre, linear = self.hook_pre(pre), self.hook_pre_linear(linear)
            # In one operation, so that a bias of zero costs nothing.
            post = torch.addcmul(self.b_in.to(pre.dtype), self.act_fn(pre), linear)
        else:
            pre = F.linear(x, self.W_in.T, self.b_in)
            for part in parts:
                pre = part.pre(pre)
            post = self.act_fn(self.hook_pre(pre))
        for part in parts:
            post = part.neurons(post)
        return F.linear(self.hook_post(post), self.W_out.T, self.b_out)
