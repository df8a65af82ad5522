"""Rotary position embedding in both pair layouts, with the published frequency scalings."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.config.config import LoopedTransformerConfig


def rotary_frequencies(
    cfg: LoopedTransformerConfig, base: float | None = None
) -> Float[Tensor, "half_rotary_dim"]:
    """Angle per position of each rotated pair, in radians.

    θ_i = base^(-2i / rotary_dim), divided by ``rotary_scaling_factor``; with
    ``use_NTK_by_parts_rope`` long wavelengths are stretched as in Llama 3.1 (equal to section 3.2
    of 2309.00071 with linear interpolation between the two wavelength bounds).

    Args:
        cfg: The config.
        base: In the place of ``cfg.rotary_base``.

    Source: 2104.09864, section 3.2.2.
    """
    assert cfg.rotary_dim is not None
    exponents = torch.arange(0, cfg.rotary_dim, 2, dtype=torch.float32) / cfg.rotary_dim
    theta = 1.0 / (float(cfg.rotary_base if base is None else base) ** exponents)
    if cfg.use_NTK_by_parts_rope:
        wavelength = 2 * math.pi / theta
        low, high = cfg.NTK_by_parts_low_freq_factor, cfg.NTK_by_parts_high_freq_factor
        smooth = ((cfg.NTK_original_ctx_len / wavelength - low) / (high - low)).clamp(0.0, 1.0)
        return (1 - smooth) * theta / cfg.NTK_by_parts_factor + smooth * theta
    return theta / cfg.rotary_scaling_factor


class RotaryTable:
    """Cosines and sines by position, computed once per device and grown on demand.

    One table serves all blocks of a model that rotate by one base.
    """

    def __init__(self, cfg: LoopedTransformerConfig, base: float | None = None):
        self.frequencies = rotary_frequencies(cfg, base)
        self.frequencies = -self.frequencies if cfg.rotary_reversed else self.frequencies
        self.layout = cfg.rotary_layout
        rounded = cfg.rotary_table_dtype
        self._rounding: torch.dtype | None = None if rounded is None else getattr(torch, rounded)
        self._table: Float[Tensor, "two n_positions half_rotary_dim"] | None = None

    def __call__(
        self, positions: Int[Tensor, "*batch pos"]
    ) -> tuple[Float[Tensor, "*batch pos 1 rotary"], Float[Tensor, "*batch pos 1 rotary"]]:
        """What :func:`apply_rotary` takes at each position, with a head axis to broadcast over."""
        cos, sin = (part.unsqueeze(-2) for part in self.of_pairs(positions))
        if self.layout == "half":
            return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        return cos.repeat_interleave(2, dim=-1), torch.stack([-sin, sin], dim=-1).flatten(-2)

    def of_pairs(
        self, positions: Int[Tensor, "*batch pos"]
    ) -> tuple[Float[Tensor, "*batch pos half"], Float[Tensor, "*batch pos half"]]:
        """Cosine and sine of each rotated pair at each position (float32)."""
        needed = int(positions.max()) + 1 if positions.numel() else 0
        table = self._table
        if table is None or table.device != positions.device or table.shape[1] < needed:
            n_positions = max(needed, 64 if table is None else 2 * table.shape[1])
            angles = torch.outer(torch.arange(n_positions, dtype=torch.float32), self.frequencies)
            table = torch.stack([angles.cos(), angles.sin()])
            if self._rounding is not None:
                table = table.to(self._rounding).float()
            table = table.to(positions.device)
            # An inference tensor could not be used in a later backward pass.
            self._table = None if table.is_inference() else table
        return table[0][positions], table[1][positions]


def apply_rotary(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "*#batch pos 1 rotary"],
    sin: Float[Tensor, "*#batch pos 1 rotary"],
    layout: str,
) -> Float[Tensor, "batch pos head d_head"]:
    """Rotate the first dimensions of each head by its position's angles.

    A pair (a, b) becomes (a cos - b sin, b cos + a sin), in float32 for half-precision inputs.

    Args:
        x: Queries or keys.
        cos: The cosine of each rotated dimension.
        sin: Its sine, with a minus in the first dimension of a pair.
        layout: Whether pairs are ``"half"`` of the rotated dimensions apart, or neighbours.
    """
    width = cos.shape[-1]
    rotated = x if width == x.shape[-1] else x[..., :width]
    rotated = rotated if rotated.dtype == torch.float64 else rotated.float()
    if layout == "half":
        other = rotated.roll(width // 2, dims=-1)
    else:
        other = rotated.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    out = (rotated * cos + other * sin).to(x.dtype)
    return out if width == x.shape[-1] else torch.cat([out, x[..., width:]], dim=-1)


def rotary_tables(
    cfg: LoopedTransformerConfig,
) -> tuple[RotaryTable | None, dict[float, RotaryTable]]:
    """The table of a model, where positions are rotated, and those of its mechanisms, by base."""
    main = RotaryTable(cfg) if cfg.positional_embedding_type == "rotary" else None
    bases = (base for mechanism in cfg.mechanisms for base in mechanism.rotary_bases(cfg))
    return main, {base: RotaryTable(cfg, base) for base in bases}
