"""From a TransformerBridge to a model with a name for every pass of every layer."""

from collections.abc import Iterable
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig, with_layout
from tl_loops.errors import CheckpointError, LoopedSemanticsError
from tl_loops.families.registry import recognise
from tl_loops.layout.layout import LoopLayout
from tl_loops.model.bridged.family import BridgedFamily
from tl_loops.model.bridged.unrolled import UnrolledBridge
from tl_loops.model.bridged.weights import check_unprocessed, named_weights


def bridged_family(bridge: Any, families: Iterable[BridgedFamily]) -> BridgedFamily | None:
    """The one of some families that a bridge is of; ``None`` if of none, or if it is no bridge."""
    adapter = getattr(bridge, "adapter", None)
    names = [parent.__name__ for parent in type(adapter).__mro__]
    known = {family.adapter: family for family in families}
    return next((known[name] for name in names if name in known), None)


def open_bridge(
    bridge: Any, bridged: BridgedFamily, layout: LoopLayout | None = None
) -> UnrolledBridge:
    """A bridge under the names of its iterations.

    Args:
        bridge: The bridge.
        bridged: Its family.
        layout: Of the loop, where the Hugging Face model has none.

    Raises:
        LoopedSemanticsError: The bridge's weights were processed or are spread over devices, or it
            is of a variant that tl_loops does not know.
    """
    check_unprocessed(bridge)
    released = bridge.original_model.config.to_dict()
    released.setdefault("model_type", bridge.original_model.config.model_type)
    where = f"the config of the bridged {type(bridge.original_model).__name__}"
    weights = dict(named_weights(bridge))
    try:
        family = recognise(released, where, lambda: list(weights))
        fields = family.config_fields(released, where)
    except CheckpointError as error:
        done = "unrolled" if layout is None else "looped"
        raise LoopedSemanticsError(f"this bridge cannot be {done}: {error}") from error
    if family.name != bridged.name:
        raise LoopedSemanticsError(
            f"this bridge runs a model of family {family.name} with the adapter of {bridged.name}: "
            "load it with tl_loops.LoopedTransformer.from_pretrained"
        )
    devices = sorted({str(weight.device) for weight in weights.values()})
    if len(devices) > 1:
        raise LoopedSemanticsError(
            f"the weights of this bridge are spread over {', '.join(devices)}: boot it on one "
            "device"
        )
    fields |= {
        "model_name": bridge.cfg.model_name,
        "original_architecture": type(bridge.original_model).__name__,
        "dtype": next(bridge.original_model.parameters()).dtype,
        "device": devices[0],
    }
    if layout is not None:
        fields = with_layout(fields, layout)
    cfg = LoopedTransformerConfig.from_dict(fields)
    return UnrolledBridge(bridge, family, bridged, cfg)
