"""Where one block stands: its phase, iteration and layer."""

from dataclasses import dataclass
from typing import Literal

Phase = Literal["prelude", "core", "coda"]
PHASES: tuple[Phase, ...] = ("prelude", "core", "coda")


@dataclass(frozen=True)
class BlockCoordinate:
    """Where one unrolled block stands.

    Attributes:
        phase: ``"prelude"``, ``"core"`` or ``"coda"``.
        iteration: The pass through the core, counted from 0; ``None`` outside the core.
        layer: The physical layer inside its phase (inside its stack where there are several).
        stack: The stack that this iteration calls, for models with more than one; else ``None``.
    """

    phase: Phase
    iteration: int | None
    layer: int
    stack: str | None = None
