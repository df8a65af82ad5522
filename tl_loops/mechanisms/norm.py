"""Norms with TransformerLens's hook points, and their weights as data."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_loops.mechanisms.tensors import Tensors, vector
from tl_loops.upstream import HookPoint, Module

Config = Any  # its class takes fields from the mechanisms

OUTPUT_NORMED = ("sandwich", "post_branch", "stream")
"""Values of ``block_norm`` with a norm between a branch and the add."""

SUM_NORMED = ("post_residual", "post_norm")
"""Those with a norm on the sum, after the add."""


class Norm(Module):
    """Normalisation over the last axis, in float32, as ``cfg.normalization_type`` says.

    ``"RMS"``: x / sqrt(mean(x²) + eps) · w. ``"LN"``: the same on the centred input, plus b.
    ``"RMSPre"`` and ``"LNPre"`` have no weights. ``"L2"``: x / sqrt(sum(x²) + eps), without one.

    Args:
        cfg: The config.
        length: Of the last axis; ``None``: the width of the model.
        device: Where the weights go.
        weight: Whether it has those weights.
        off: Whether it only stands there: the scale is 1.

    Hook points: ``hook_scale`` [..., 1], ``hook_normalized`` [..., length] (before the weight).
    """

    def __init__(
        self,
        cfg: Config,
        length: int | None = None,
        device: torch.device | str | None = None,
        weight: bool = True,
        off: bool = False,
    ):
        super().__init__()
        self.eps, self.dtype = cfg.eps, cfg.dtype
        self.off = off
        self.sums = cfg.normalization_type == "L2"
        self.centred = cfg.normalization_type in ("LN", "LNPre") and not off
        width: int = cfg.d_model if length is None else length
        self.w: nn.Parameter | None = None
        self.b: nn.Parameter | None = None
        if cfg.norm_has_weight and weight and not off:
            self.w = nn.Parameter(torch.ones(width, dtype=cfg.dtype, device=device))
            if self.centred:
                self.b = nn.Parameter(torch.zeros(width, dtype=cfg.dtype, device=device))
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def scale_of(self, x: Float[Tensor, "*batch length"]) -> Float[Tensor, "*batch 1"]:
        """What a (centred) input is divided by."""
        if self.off:
            return torch.ones_like(x[..., :1])
        squares = x.pow(2)
        power = squares.sum(-1, keepdim=True) if self.sums else squares.mean(-1, keepdim=True)
        return (power + self.eps).sqrt()

    def forward(self, x: Float[Tensor, "*batch length"]) -> Float[Tensor, "*batch length"]:
        dtype = x.dtype
        if dtype not in (torch.float32, torch.float64):
            x = x.float()
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        scale = self.hook_scale(self.scale_of(x))
        # The weight multiplies after the cast, as in the released models' RMSNorm.
        normalized = self.hook_normalized(x / scale).to(dtype)
        w, b = self.w, self.b
        if w is None:
            return normalized
        return normalized * w if b is None else normalized * w + b


def norm_tensors(cfg: Config, name: str, length: int) -> Tensors:
    """The gain, and LayerNorm's bias, of a norm; without weights none."""
    if not cfg.norm_has_weight:
        return {}
    found = {f"{name}.w": vector(length)}
    if cfg.normalization_type == "LN":
        found[f"{name}.b"] = vector(length)
    return found
