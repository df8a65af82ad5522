"""Stored rotary tables, which the original rotates by: followed where a base gives them."""

import warnings
from typing import Any

import torch
from torch import Tensor

from tl_loops.config.config import LoopedTransformerConfig, dtype_name
from tl_loops.families.base import Table
from tl_loops.loading.files import CONFIG_FILE, read_rows
from tl_loops.loading.header import StoredTensor
from tl_loops.mechanisms.tensors import FLOATS
from tl_loops.nn.rotary import RotaryTable

_ULPS = 8
"""Roundings of an angle in float32 that two ways of computing it may differ by."""


def followed_fields(
    stored: StoredTensor, kind: Table, cfg: LoopedTransformerConfig
) -> dict[str, Any]:
    """The config fields that make the model rotate by a stored table.

    A table of another base than the config's gives its base, with a warning; one that is stored
    rounded gives the type that it is rounded to. One that nothing gives leaves the config alone,
    and :func:`table_problems` raises for it.

    Args:
        stored: Cosines and sines [1, pos, 1, pair, 2], or one of them [1, pos, 1, pair].
        kind: Which of them.
        cfg: The config without the table.
    """
    if _shape_problems(stored, kind, cfg):
        return {}
    dtype, table = FLOATS[stored.dtype], _read(stored)
    fields: dict[str, Any] = {}
    if not _fits(table, kind, cfg, dtype):
        base = _base(table, kind, cfg)
        if base is None or not _fits(table, kind, _changed(cfg, rotary_base=base), dtype):
            return {}
        warnings.warn(
            f"{stored.file}: the stored {stored.key!r} is of base {base:g}, where {CONFIG_FILE} "
            f"says {cfg.rotary_base:g}; the original rotates by what is stored, and so does this "
            "model",
            stacklevel=3,
        )
        fields["rotary_base"] = base
    if dtype.itemsize == 2:
        fields["rotary_table_dtype"] = dtype_name(dtype)
    return fields


def table_problems(stored: StoredTensor, kind: Table, cfg: LoopedTransformerConfig) -> list[str]:
    """What keeps a model of this config from rotating by a stored table; arguments as above."""
    problems = _shape_problems(stored, kind, cfg)
    if not problems and not _fits(_read(stored), kind, cfg, FLOATS[stored.dtype]):
        problems = [
            f"{stored.file.name}: key {stored.key!r} is what the original rotates by, and differs "
            f"from the table of base {cfg.rotary_base:g}; remove it to rotate by that one"
        ]
    return problems


def _shape_problems(stored: StoredTensor, kind: Table, cfg: LoopedTransformerConfig) -> list[str]:
    where = f"{stored.file.name}: key {stored.key!r}"
    half = (cfg.rotary_dim or 0) // 2
    n_positions = stored.shape[1] if len(stored.shape) > 1 else 0
    expected = (1, n_positions, 1, half, *((2,) if kind == "cos and sin" else ()))
    if stored.shape != expected or n_positions < 2:
        return [
            f"{where} has shape {stored.shape}, expected (1, positions, {str(expected[2:])[1:]}"
        ]
    if stored.dtype not in FLOATS:
        return [f"{where} is stored as {stored.dtype}, expected one of {', '.join(FLOATS)}"]
    return []


def _read(stored: StoredTensor) -> Tensor:
    table = torch.empty(stored.shape, dtype=torch.float32)
    read_rows(stored, 0, table)
    return table[0, :, 0]


def _changed(cfg: LoopedTransformerConfig, **changes: Any) -> LoopedTransformerConfig:
    return type(cfg).from_dict({**cfg.to_dict(), **changes})


def _fits(table: Tensor, kind: Table, cfg: LoopedTransformerConfig, dtype: torch.dtype) -> bool:
    """Whether a table [pos, pair(, 2)] is the computed one, up to rounding."""
    positions = torch.arange(table.shape[0])
    cos, sin = RotaryTable(cfg).of_pairs(positions)
    sin = -sin if cfg.rotary_reversed else sin  # the stored table knows no direction
    computed = {"cos and sin": torch.stack([cos, sin], dim=-1), "cos": cos, "sin": sin}[kind]
    angles = _ULPS * torch.finfo(torch.float32).eps * (1 + positions)
    slack = (torch.finfo(dtype).eps + angles).view(-1, *[1] * (table.ndim - 1))
    return bool(((table - computed).abs() <= slack).all())


def _base(table: Tensor, kind: Table, cfg: LoopedTransformerConfig) -> float | None:
    """The base of a table of cosines and sines, to six digits, from its slowest pair."""
    half = table.shape[1]
    if kind != "cos and sin" or half < 2 or cfg.use_NTK_by_parts_rope:
        return None
    cos, sin = table[1, -1].double()
    slowest = float(torch.atan2(sin, cos)) * cfg.rotary_scaling_factor
    if not 0.0 < slowest < 1.0:
        return None
    return float(f"{slowest ** (-half / (half - 1)):.6g}")
