"""What type the value of a config field must have, from the field's annotation."""

import math
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from tl_loops.errors import ConfigError, shortened

_PLAIN: dict[type, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a finite number",
    str: "text",
    type(None): "None",
}


def check_types(cls: type, fields: Mapping[str, Any]) -> None:
    """Raise on values of another type than the fields of a config class say.

    Fields that hold lists, tensors' types and the like are left to the checks of their values.

    Args:
        cls: The config class.
        fields: Values by name.

    Raises:
        ConfigError: The message names field, expected and found.
    """
    kinds = _kinds(cls)
    for name, value in fields.items():
        allowed = kinds.get(name)
        if allowed is not None and not any(_fits(value, kind) for kind in allowed):
            expected = " or ".join(_PLAIN[kind] for kind in allowed)
            raise ConfigError(f"{name} must be {expected}, got {shortened(value)}")


@cache
def _kinds(cls: type) -> dict[str, tuple[type, ...]]:
    """The types that a field may have, for fields that hold a plain value."""
    found = {}
    for name, annotation in get_type_hints(cls).items():
        union = get_origin(annotation) in (Union, types.UnionType)
        kinds = get_args(annotation) if union else (annotation,)
        if all(kind in _PLAIN for kind in kinds):
            found[name] = kinds
    return found


def _fits(value: Any, kind: type) -> bool:
    if kind is float:
        real = isinstance(value, (int, float)) or hasattr(value, "__float__")
        return real and not isinstance(value, bool) and _finite(value)
    if kind is int:
        return hasattr(value, "__index__") and not isinstance(value, bool) and abs(value) < 2**63
    return isinstance(value, kind)


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (OverflowError, TypeError, ValueError):
        return False
