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
        layer: The layer inside its phase (inside its stack where there are several), counted on
            where an iteration runs its layers several times.
        stack: The stack that this iteration calls, for models with more than one; else ``None``.
    """

    phase: Phase
    iteration: int | None
    layer: int
    stack: str | None = None

    @property
    def alias(self) -> str:
        """What its hook names begin with: ``"prelude.0"``, ``"iter.3.1"``, ``"coda.1"``."""
        where = self.phase if self.iteration is None else f"iter.{self.iteration}"
        return f"{where}.{self.layer}"

    @property
    def place(self) -> str:
        """Where it is, without its layer: ``"p"``, ``"r3"`` (with stacks ``"r3H"``), ``"c"``."""
        if self.iteration is None:
            return self.phase[0]
        return f"r{self.iteration}{self.stack or ''}"

    @property
    def label(self) -> str:
        """Short label for plots: ``"p0"``, ``"r3.1"`` (iteration 3, layer 1), ``"c1"``."""
        return f"{self.place}{'' if self.iteration is None else '.'}{self.layer}"
