"""The range of every number field, and the one check that goes over them."""

import dataclasses
import math
import numbers
import operator
from typing import Any

from tl_loops.config.fields import setting_of
from tl_loops.errors import ConfigError
from tl_loops.mechanisms.mechanism import Setting

MOST_BLOCKS = 100_000
"""Unrolled blocks of a model: each is a module with hook points, some 100 kB of memory."""

_LARGEST = 2**31 - 1
"""Of sizes and counts."""


def _size(**bounds: Any) -> Setting:
    return Setting("", int, None, "", **{"at_least": 1, "at_most": _LARGEST, **bounds})


def _number(**bounds: Any) -> Setting:
    return Setting("", float, None, "", **bounds)


# TransformerLens says -1 where it works a value out itself.
_OF_TRANSFORMER_LENS: dict[str, Setting] = {
    "d_model": _size(),
    "d_head": _size(),
    "n_ctx": _size(),
    "n_heads": _size(unset=-1),
    "d_mlp": _size(),
    "d_vocab": _size(unset=-1),
    "d_vocab_out": _size(unset=-1),
    "n_key_value_heads": _size(),
    "n_layers": _size(unset=-1),
    "rotary_dim": _size(),
    "NTK_original_ctx_len": _size(),
    "eps": _number(at_least=0),
    "attn_scale": _number(above=0, unset=-1),
    "initializer_range": _number(at_least=0, unset=-1),
    "attn_scores_soft_cap": _number(at_least=0, unset=-1),
    "output_logits_soft_cap": _number(at_least=0, unset=-1),
    "rotary_base": _number(above=0),
    "rotary_scaling_factor": _number(above=0),
    "NTK_by_parts_factor": _number(above=0),
    "NTK_by_parts_low_freq_factor": _number(above=0),
    "NTK_by_parts_high_freq_factor": _number(above=0),
}
"""The ranges of the fields that TransformerLens has; ours say theirs themselves."""


def range_of(field: dataclasses.Field) -> Setting | None:
    """What a field may hold; ``None`` for a field that is no number."""
    kind = str(field.type)
    if "tuple" in kind or ("float" not in kind and "int" not in kind):
        return None
    own = setting_of(field) or _OF_TRANSFORMER_LENS.get(field.name)
    return dataclasses.replace(own or Setting("", None, None, ""), kind=_kind(kind))


def _kind(annotation: str) -> type:
    return float if "float" in annotation else int


def check_numbers(cfg: Any) -> None:
    """Raise on numbers that are of another type, not finite or out of their range.

    Numbers of NumPy become Python's.

    Raises:
        ConfigError: The message names the field, what it holds and what is expected.
    """
    for field in dataclasses.fields(cfg):
        allowed, value = range_of(field), getattr(cfg, field.name)
        if allowed is None or value is None:
            continue
        number = _as_number(field.name, allowed.kind, value)
        if number is not value:
            setattr(cfg, field.name, number)
        if number != allowed.unset:
            _check_bounds(field.name, allowed, number)
    _check_together(cfg)


def check_depth(n_layers: int, how: str = "n_prelude + n_iterations * n_core + n_coda") -> None:
    """Raise on more unrolled blocks than a computer can hold, before any is counted out.

    Args:
        n_layers: How many there would be.
        how: The sum that gives their number.

    Raises:
        ConfigError: There are more than :data:`MOST_BLOCKS`.
    """
    if n_layers > MOST_BLOCKS:
        raise ConfigError(
            f"{how} = {n_layers:,} unrolled blocks, each a "
            f"module of its own; at most {MOST_BLOCKS:,} are supported: use fewer n_iterations"
        )


def _as_number(name: str, kind: type, value: Any) -> int | float:
    what = "an integer" if kind is int else "a number"
    wanted = numbers.Integral if kind is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise ConfigError(f"{name} must be {what}, got {_shown(value)}")
    if isinstance(value, numbers.Integral):
        number = operator.index(value)
        if abs(number) >= 2**63:
            raise ConfigError(f"{name} must be {what} below 2^63, got {_shown(value)}")
        return number
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value}")
    return value if type(value) is float else float(value)


def _check_bounds(name: str, allowed: Setting, value: int | float) -> None:
    at_least, above, at_most = allowed.at_least, allowed.above, allowed.at_most
    if at_least is not None and value < at_least:
        raise ConfigError(f"{name} must be at least {at_least:g}, got {value}")
    if above is not None and value <= above:
        raise ConfigError(f"{name} must be above {above:g}, got {value}")
    if at_most is not None and value > at_most:
        raise ConfigError(f"{name} must be at most {at_most:,}, got {_shown(value)}")


def _check_together(cfg: Any) -> None:
    if cfg.rotary_dim is not None and cfg.rotary_dim > cfg.d_head:
        raise ConfigError(
            f"rotary_dim={cfg.rotary_dim} must be at most d_head={cfg.d_head}, whose dimensions "
            "it rotates"
        )
    if cfg.positional_embedding_type == "rotary" and cfg.rotary_dim is None and cfg.d_head % 2:
        raise ConfigError(f"d_head must be even with rotary positions, got {cfg.d_head}")
    if cfg.padded_vocab is not None and -1 != cfg.d_vocab < cfg.padded_vocab:
        raise ConfigError(
            f"padded_vocab={cfg.padded_vocab} must be at most d_vocab={cfg.d_vocab}: token ids "
            "from it on are padding"
        )
    low, high = cfg.NTK_by_parts_low_freq_factor, cfg.NTK_by_parts_high_freq_factor
    if cfg.use_NTK_by_parts_rope and high <= low:
        raise ConfigError(
            f"NTK_by_parts_high_freq_factor={high} must be above NTK_by_parts_low_freq_factor={low}"
        )


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 10**30:
        return "an integer of more than 30 digits"
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
