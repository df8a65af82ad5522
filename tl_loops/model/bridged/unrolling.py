"""The looped models of TransformerBridge under the names of their iterations."""

from typing import Any

from tl_loops.errors import LoopedSemanticsError
from tl_loops.model.bridged.family import BridgedFamily
from tl_loops.model.bridged.feedforward import BRIDGED_FEEDFORWARD
from tl_loops.model.bridged.hrm_text import BRIDGED_HRM_TEXT
from tl_loops.model.bridged.huginn import BRIDGED_HUGINN
from tl_loops.model.bridged.opening import bridged_family, open_bridge
from tl_loops.model.bridged.ouro import BRIDGED_OURO
from tl_loops.model.bridged.unrolled import UnrolledBridge

BRIDGED: tuple[BridgedFamily, ...] = (BRIDGED_OURO, BRIDGED_HUGINN, BRIDGED_HRM_TEXT)
"""The looped families that TransformerLens has an adapter for and tl_loops unrolls."""


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
            ``enable_compatibility_mode()`` or are spread over devices, or it is of a variant that
            tl_loops does not know.
    """
    bridged = bridged_family(bridge, BRIDGED)
    if bridged is None:
        known = ", ".join(family.name for family in BRIDGED)
        instead = "a model without a loop needs no unrolling"
        if bridged_family(bridge, BRIDGED_FEEDFORWARD) is not None:
            instead += ": tl_loops.loop(bridge, start, stop, n_iterations) gives it a loop"
        raise LoopedSemanticsError(
            f"unroll takes a TransformerBridge of a looped model ({known}), got "
            f"{type(bridge).__name__} with {type(getattr(bridge, 'adapter', None)).__name__}; "
            f"{instead}"
        )
    return open_bridge(bridge, bridged)
