"""Reading the labels of heads and neurons that decompositions give."""

import re
from dataclasses import dataclass
from typing import Literal

from tl_loops.arguments import checked

_PART = re.compile(r"(?:(?P<place>[^.\s]+)\.)?L(?P<layer>\d+)(?P<part>[HN])(?P<number>\d+)")
_ITERATION = re.compile(r"r(?P<iteration>\d+)")


@dataclass(frozen=True)
class PartLabel:
    """What the label of a head or a neuron says.

    Attributes:
        kind: ``"head"`` or ``"neuron"``.
        place: ``"p"``, ``"r3"`` or ``"c"``; ``None`` in a label of TransformerLens.
        iteration: The iteration; ``None`` outside of the loop.
        layer: The layer inside the prelude, core or coda.
        number: Which head or neuron.
    """

    kind: Literal["head", "neuron"]
    place: str | None
    iteration: int | None
    layer: int
    number: int


@checked
def read_part_label(label: str) -> PartLabel | None:
    """What a label of a decomposition says, if it is that of a head or a neuron.

    Args:
        label: ``"r3.L1H4"`` or ``"p.L0N7"``, of ``stack_head_results``, ``stack_neuron_results`` or
            ``get_full_resid_decomposition``; also ``"L3H4"`` of TransformerLens.

    Returns:
        Its parts; ``None`` for every other label, such as ``"embed"`` or ``"r0_injection"``.
    """
    found = _PART.fullmatch(label)
    if found is None:
        return None
    iteration = _ITERATION.match(found["place"] or "")
    return PartLabel(
        "head" if found["part"] == "H" else "neuron",
        found["place"],
        None if iteration is None else int(iteration["iteration"]),
        int(found["layer"]),
        int(found["number"]),
    )
