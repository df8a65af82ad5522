"""A loop that the caller states, for checkpoints that have none of their own."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.config.weights import physical_tensors
from tl_loops.errors import ConfigError, did_you_mean, shortened
from tl_loops.families.base import Family
from tl_loops.layout.selection import as_index
from tl_loops.mechanisms import MECHANISMS

StatedLoop: TypeAlias = Sequence[Any] | Mapping[str, Any]
"""``(start, stop, n_iterations)``, or fields of the config."""

_SIZES = ("n_prelude", "n_core", "n_coda")
_OF_THE_LOOP = (
    *(*_SIZES, "n_iterations", "norm_between_iterations", "norm_before_coda"),
    *(setting.name for mechanism in MECHANISMS for setting in mechanism.settings),
)


def stated_family(loop: StatedLoop | None) -> str | None:
    """The family that a stated loop says the checkpoint's blocks are of, if it does."""
    return loop.get("family") if isinstance(loop, Mapping) else None


def loop_fields(loop: StatedLoop, family: Family, n_layers: int, name: str) -> dict[str, Any]:
    """The config fields that a stated loop gives.

    Args:
        loop: ``(start, stop, n_iterations)``: the layers from ``start`` to ``stop`` (exclusive)
            run so often. Or a mapping of config fields: ``n_prelude``, ``n_core``, ``n_coda``,
            ``n_iterations``, ``norm_between_iterations``, ``norm_before_coda``, and those of the
            mechanisms that need no weights; and ``family``, for a ``config.json`` that names none.
        family: Of the checkpoint.
        n_layers: Its number of layers.
        name: The checkpoint, for messages.

    Raises:
        ConfigError: The checkpoint has a loop of its own, the layers do not add up, or a field is
            no field of a loop.
    """
    if not family.feedforward:
        raise ConfigError(
            f"{name} is of the family {family.name}, whose loop its config.json says: leave loop= "
            "out, and choose n_iterations"
        )
    fields = dict(loop) if isinstance(loop, Mapping) else _of_range(loop, n_layers)
    fields.pop("family", None)
    for field in fields:
        if field not in _OF_THE_LOOP:
            hint = did_you_mean(str(field), _OF_THE_LOOP)
            raise ConfigError(f"loop has no field {shortened(field)}: {hint}")
    sizes = {size: as_index(size, fields.get(size, 0)) for size in _SIZES}
    if sum(sizes.values()) != n_layers or sizes["n_core"] < 1:
        said = " + ".join(f"{size} = {value}" for size, value in sizes.items())
        raise ConfigError(
            f"the loop asks for {said}, but {name} has {n_layers} layers: they must add up to "
            "these, with at least one layer in the core"
        )
    return {**fields, **sizes}


def check_weights(cfg: LoopedTransformerConfig, family: Family, name: str) -> None:
    """Raise for a stated loop that needs weights which the checkpoint cannot have.

    Args:
        cfg: With the fields of the loop.
        family: Of the checkpoint.
        name: The checkpoint, for messages.

    Raises:
        ConfigError: It does.
    """
    held = {part.name for spec in family.tensors(cfg) for part in spec.parts}
    lacking = [weight for weight in physical_tensors(cfg) if weight not in held]
    if lacking:
        raise ConfigError(
            f"the loop asks for weights that {name}, of the family {family.name}, does not have: "
            f"{', '.join(lacking[:5])}. State a loop without them, or build the model from a "
            "LoopedTransformerConfig and train it"
        )


def _of_range(loop: Any, n_layers: int) -> dict[str, Any]:
    try:
        start, stop, n_iterations = loop
        start, stop = as_index("start", start), as_index("stop", stop)
    except (TypeError, ValueError):
        raise ConfigError(
            "loop must be (start, stop, n_iterations) with integers, or a mapping of config "
            f"fields such as {{'n_prelude': 2, 'n_core': 4, 'n_coda': 2, 'n_iterations': 3}}, got "
            f"{shortened(loop)}"
        ) from None
    if not 0 <= start < stop <= n_layers:
        raise ConfigError(
            f"loop=({start}, {stop}, {n_iterations!r}) must lie within the {n_layers} layers of "
            f"the checkpoint: 0 <= start < stop <= {n_layers}"
        )
    return {
        "n_prelude": start,
        "n_core": stop - start,
        "n_coda": n_layers - stop,
        "n_iterations": n_iterations,
    }
