"""Config fields as data: what each may hold, and what it says about a model."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from tl_loops.mechanisms.iteration_weights import MAX_ITERATIONS
from tl_loops.mechanisms.mechanism import Mechanism, Setting
from tl_loops.upstream.config_fields import (
    CHANGES_NO_NUMBER,
    OF_THIS_RUN,
    SAYS_NOTHING_OF_A_RUN,
    SHAPES,
)

Class = TypeVar("Class", bound=type)


def of_mechanisms(mechanisms: Iterable[Mechanism]) -> Callable[[Class], Class]:
    """A class decorator that adds the fields of mechanisms, under ``@dataclass``.

    The class's docstring gets their descriptions.
    """

    def add(cls: Class) -> Class:
        settings = [s for mechanism in mechanisms for s in mechanism.settings] + [MAX_ITERATIONS]
        lines = []
        for setting in settings:
            cls.__annotations__[setting.name] = setting.kind
            setattr(cls, setting.name, as_field(setting))
            lines.append(f"        {setting.name}: {setting.about}\n")
        documented = cls.__doc__ or ""
        at = documented.find("\n    Raises:")
        cls.__doc__ = documented[:at] + "".join(["\n", *lines])[1:] + documented[at:]
        return cls

    return add


def setting(
    default: Any,
    choices: tuple[Any, ...] | None = None,
    of_the_weights: bool = True,
    at_least: int | float | None = None,
) -> Any:
    """A dataclass field that a class writes down itself; see :class:`Setting`."""
    named = Setting("", Any, default, "", choices, at_least=at_least, of_the_weights=of_the_weights)
    return as_field(named)


def as_field(setting: Setting) -> Any:
    """The dataclass field of a setting; its metadata hold the setting."""
    return dataclasses.field(default=setting.default, kw_only=True, metadata={"setting": setting})


def setting_of(field: dataclasses.Field) -> Setting | None:
    """The setting of a field of ours; ``None`` for a field of TransformerLens."""
    return field.metadata.get("setting")


def fixed_by_weights(cls: type) -> frozenset[str]:
    """The fields of a config class that stored tensors fix, so that a caller cannot choose them."""
    own = {
        field.name
        for field in dataclasses.fields(cls)
        if (setting := setting_of(field)) is not None and setting.of_the_weights
    }
    return SHAPES | own


def computing(cls: type) -> tuple[str, ...]:
    """The fields of a config class that decide what a run computes, in their order.

    ``n_iterations`` is among them; the device, names, seeds of fresh weights and switches of hook
    points are not.
    """
    silent = (CHANGES_NO_NUMBER | OF_THIS_RUN | SAYS_NOTHING_OF_A_RUN) - {"n_iterations"}
    return tuple(
        field.name
        for field in dataclasses.fields(cls)
        if ((own := setting_of(field)) is None or own.computes) and field.name not in silent
    )
