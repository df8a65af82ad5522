"""What tells an iteration which one it is: an embedding added to the state that enters it."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_loops.config.config import LoopedTransformerConfig

TIMESCALE = 10000.0
"""Longest wavelength of the sinusoids, over 2π."""


def sinusoids(values: Int[Tensor, "*batch"], width: int) -> Float[Tensor, "*batch width"]:
    """Sines (even dimensions) and cosines (odd ones) of integers, over geometric wavelengths.

    ``out[2j] = sin(value / 10000^(2j / width))``, ``out[2j + 1]`` the cosine.

    Source: Vaswani et al. 2017 (1706.03762), section 3.5.
    """
    exponents = torch.arange(0, width, 2, device=values.device) / width
    angles = values.unsqueeze(-1) * torch.exp(-math.log(TIMESCALE) * exponents)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


class StepEmbedding(nn.Module):
    """The embedding of an iteration, by ``cfg.step_embedding``.

    ``"position_and_step"`` is the Universal Transformer's: sinusoids of the position plus those of
    the iteration, which counts from 1. ``"sinusoidal"`` leaves the position out. ``"learned"`` has
    a trained vector for each of ``cfg.max_iterations``.

    Source: Dehghani et al. 2018 (1807.03819), equations 4 and 5.
    """

    def __init__(self, cfg: LoopedTransformerConfig, device: torch.device | str | None = None):
        super().__init__()
        self.kind = cfg.step_embedding
        if self.kind == "learned":
            rows = cfg.max_iterations or cfg.n_iterations
            self.W_E = nn.Parameter(torch.empty(rows, cfg.d_model, dtype=cfg.dtype, device=device))

    def forward(
        self,
        state: Float[Tensor, "batch pos d_model"],
        iteration: int,
        positions: Int[Tensor, "batch pos"],
    ) -> Float[Tensor, "batch pos d_model"]:
        if self.kind == "learned":
            return self.W_E[iteration].expand_as(state).contiguous()
        step = torch.tensor(iteration + 1, device=state.device)
        embedding = sinusoids(step, state.shape[-1]).expand(state.shape)
        if self.kind == "position_and_step":
            embedding = embedding + sinusoids(positions, state.shape[-1])
        return embedding.to(state).contiguous()
