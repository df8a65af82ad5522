"""What unrolled blocks are called: their hook points, their weights, their labels."""

import re
from abc import ABC, abstractmethod
from typing import SupportsIndex

from tl_loops.arguments import argument, checked
from tl_loops.layout.coordinate import BlockCoordinate
from tl_loops.layout.names import activation_name, iteration_spec
from tl_loops.layout.selection import one_index

_ALIAS = re.compile(r"^(?:(prelude|coda)|iter\.(\d+))\.(\d+)\.(.+)$")
_ITERATION = re.compile(r"^iter\.(\d+)\.(.+)$")
_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")


class BlockNames(ABC):
    """The names and labels of a layout, which says where each block stands."""

    n_iterations: int
    n_layers: int
    n_core: int
    shared_stacks: bool
    layer_repeats: int

    @abstractmethod
    def index(
        self,
        *,
        iteration: SupportsIndex | None = None,
        layer: SupportsIndex = 0,
        phase: str | None = None,
    ) -> int:
        """Index of the unrolled block at a coordinate."""

    @abstractmethod
    def coordinate(self, index: SupportsIndex) -> BlockCoordinate:
        """Coordinate of an unrolled block."""

    @checked
    def hook_name(
        self,
        name: str,
        *,
        iteration: SupportsIndex | None = None,
        layer: SupportsIndex | None = None,
        phase: str | None = None,
    ) -> str:
        """Canonical hook name of an activation at a coordinate.

        Args:
            name: TransformerLens shorthand (``"pattern"``, ``"resid_pre"``), or the full rest of
                the name (``"ln1.hook_scale"``), or, without a layer, one of the hook points
                between iterations (``"state_out"``, ``"injected"``).
            iteration: Iteration of a core block.
            layer: Layer inside the phase.
            phase: As for :meth:`index`.

        Returns:
            For example ``"blocks.14.attn.hook_pattern"`` or ``"iter.3.hook_state_out"``.

        Raises:
            ValueError: Unknown activation name or incomplete coordinate.
            IndexError: Coordinate out of range.
        """
        if layer is not None:
            index = self.index(iteration=iteration, layer=layer, phase=phase)
            return f"blocks.{index}.{activation_name(name)}"
        between = iteration_spec(name)
        if between is None:
            raise ValueError(f"{name!r} sits in a block: give layer=...")
        if iteration is None:
            raise ValueError(f"{name!r} sits between iterations: give iteration=...")
        return f"iter.{self._iteration(iteration)}.{between.name}"

    def canonical_name(self, name: str) -> str:
        """Translate ``prelude.{l}.REST``, ``iter.{t}.{l}.REST`` and ``coda.{l}.REST``.

        Any other name is returned as it is, so that canonical names stay valid.

        Raises:
            IndexError: The alias names a layer or an iteration that does not exist.
        """
        name = argument("name", name, str)
        try:
            if (alias := _ALIAS.match(name)) is not None:
                phase, t, layer, rest = alias.groups()
                iteration = None if t is None else int(t)
                index = self.index(phase=phase, iteration=iteration, layer=int(layer))
                return f"blocks.{index}.{rest}"
            if (between := _ITERATION.match(name)) is not None:
                self._iteration(int(between.group(1)))
        except IndexError as error:
            raise IndexError(f"hook name {name!r}: {error}") from None
        return name

    def alias(self, name: str) -> str:
        """The inverse of :meth:`canonical_name`: ``blocks.{i}.REST`` by its coordinate."""
        match = _BLOCK.match(argument("name", name, str))
        if match is None:
            return name
        return f"{self.coordinate(int(match.group(1))).alias}.{match.group(2)}"

    def physical_name(self, index: int) -> str:
        """Name of the physical layer of an unrolled block, e.g. ``"core.2"`` or ``"coda.0"``.

        With several stacks the core is named by the stack: ``"core.L.2"``.
        """
        at = self.coordinate(index)
        stack = f"{at.stack}." if at.stack is not None and not self.shared_stacks else ""
        repeats = self.layer_repeats if at.phase == "core" else 1
        layer = at.layer if repeats == 1 else at.layer % (self.n_core // repeats)
        return f"{at.phase}.{stack}{layer}"

    def physical_names(self) -> list[str]:
        """Names of all physical layers, in the order of their first use."""
        return list(dict.fromkeys(self.physical_name(index) for index in range(self.n_layers)))

    def label(self, index: int) -> str:
        """The label of an unrolled block; see :attr:`BlockCoordinate.label`."""
        return self.coordinate(index).label

    def labels(self) -> list[str]:
        """Labels of all unrolled blocks."""
        return list(map(self.label, range(self.n_layers)))

    def _iteration(self, iteration: SupportsIndex) -> int:
        return one_index("iteration", iteration, self.n_iterations)
