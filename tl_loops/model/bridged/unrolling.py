"""From a TransformerBridge to a model with a name for every pass of every layer."""

from typing import Any

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import CheckpointError, LoopedSemanticsError
from tl_loops.families.registry import recognise
from tl_loops.model.bridged.family import BridgedFamily
from tl_loops.model.bridged.hrm_text import BRIDGED_HRM_TEXT
from tl_loops.model.bridged.huginn import BRIDGED_HUGINN
from tl_loops.model.bridged.ouro import BRIDGED_OURO
from tl_loops.model.bridged.unrolled import UnrolledBridge, check_unprocessed

BRIDGED: tuple[BridgedFamily, ...] = (BRIDGED_OURO, BRIDGED_HUGINN, BRIDGED_HRM_TEXT)
"""The looped families that TransformerLens has an adapter for and tl_loops unrolls."""


def bridged_family(bridge: Any) -> BridgedFamily | None:
    """The looped family of a bridge; ``None`` if it is no loop, or no bridge."""
    adapter = getattr(bridge, "adapter", None)
    for parent in type(adapter).__mro__:
        for family in BRIDGED:
            if parent.__name__ == family.adapter:
                return family
    return None


def unroll(bridge: Any) -> UnrolledBridge:
    """Give a bridged looped model a hook point for every pass of every layer.

    Args:
        bridge: A ``transformer_lens.model_bridge.TransformerBridge`` of Ouro, Huginn (Raven) or
            HRM-Text. It stays what runs, and stays as it is: its own hook points keep firing at
            every iteration.

    Returns:
        The bridge under the names of :class:`tl_loops.LoopedTransformer`: ``blocks.{i}`` by
        unrolled index, ``iter.{t}.{l}`` and the other aliases, and the hook points between
        iterations. ``missing`` of the result says which names the Hugging Face code cannot give.

    Raises:
        LoopedSemanticsError: The model is no loop that is known here, its weights were processed by
            ``enable_compatibility_mode()``, or it is of a variant that tl_loops does not know.
    """
    bridged = bridged_family(bridge)
    if bridged is None:
        known = ", ".join(family.name for family in BRIDGED)
        raise LoopedSemanticsError(
            f"unroll takes a TransformerBridge of a looped model ({known}), got "
            f"{type(bridge).__name__} with {type(getattr(bridge, 'adapter', None)).__name__}; "
            "a model without a loop needs no unrolling"
        )
    check_unprocessed(bridge)
    released = bridge.original_model.config.to_dict()
    released.setdefault("model_type", bridge.original_model.config.model_type)
    where = f"the config of the bridged {type(bridge.original_model).__name__}"
    keys = [name.replace("._original_component", "") for name, _ in _parameters(bridge)]
    try:
        family = recognise(released, where, lambda: keys)
        fields = family.config_fields(released, where)
    except CheckpointError as error:
        raise LoopedSemanticsError(f"this bridge cannot be unrolled: {error}") from error
    if family.name != bridged.name:
        raise LoopedSemanticsError(
            f"this bridge runs a model of family {family.name} with the adapter of {bridged.name}: "
            "load it with tl_loops.LoopedTransformer.from_pretrained"
        )
    fields |= {
        "model_name": bridge.cfg.model_name,
        "original_architecture": type(bridge.original_model).__name__,
        "dtype": next(bridge.original_model.parameters()).dtype,
        "device": str(next(bridge.original_model.parameters()).device),
    }
    cfg = LoopedTransformerConfig.from_dict(fields)
    return UnrolledBridge(bridge, family, bridged, cfg)


def _parameters(bridge: Any) -> Any:
    return bridge.original_model.named_parameters(remove_duplicate=False)
