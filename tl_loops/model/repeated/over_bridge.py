"""A loop over the layers of a feedforward model that a TransformerBridge runs."""

from typing import Any

from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.layout import LoopLayout
from tl_loops.model.bridged.family import BridgedFamily
from tl_loops.model.bridged.feedforward import BRIDGED_FEEDFORWARD
from tl_loops.model.bridged.opening import bridged_family, open_bridge
from tl_loops.model.bridged.unrolled import UnrolledBridge
from tl_loops.model.bridged.unrolling import BRIDGED


def bridge_to_loop(bridge: Any) -> BridgedFamily:
    """The family of a bridge whose layers may repeat.

    Raises:
        LoopedSemanticsError: It runs a loop of its own, or a model whose layers are not known here.
    """
    bridged = bridged_family(bridge, BRIDGED_FEEDFORWARD)
    if bridged is not None:
        return bridged
    looped = bridged_family(bridge, BRIDGED)
    if looped is not None:
        raise LoopedSemanticsError(
            f"this bridge runs a model that is looped already ({looped.name}): name its iterations "
            "with tl_loops.unroll(bridge), and change their number with set_iterations(n)"
        )
    known = ", ".join(family.name for family in BRIDGED_FEEDFORWARD)
    raise LoopedSemanticsError(
        f"loop() repeats the blocks of a TransformerBridge of {known}, got one with "
        f"{type(bridge.adapter).__name__}, whose layers tl_loops does not know"
    )


def loop_over_bridge(bridge: Any, bridged: BridgedFamily, layout: LoopLayout) -> UnrolledBridge:
    """A bridge whose Hugging Face layers run several times, under the names of their iterations.

    Args:
        bridge: Of a feedforward model.
        bridged: Its family.
        layout: Of one loop or several over all of its layers.

    Raises:
        LoopedSemanticsError: As :func:`open_bridge`.
    """
    return open_bridge(bridge, bridged, layout)
