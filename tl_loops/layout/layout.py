"""Coordinates and names: which block is layer ``l`` at iteration ``t``, and its hooks' names."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, SupportsIndex, TypeVar

from tl_loops.layout.names import activation_name, iteration_spec
from tl_loops.layout.selection import one_index

Phase = Literal["prelude", "core", "coda"]
PHASES: tuple[Phase, ...] = ("prelude", "core", "coda")


Values = TypeVar("Values")

_ALIAS = re.compile(r"^(?:(prelude|coda)\.(\d+)|iter\.(\d+)\.(\d+))\.(.+)$")
_ITERATION = re.compile(r"^iter\.(\d+)\.(.+)$")
_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")


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


@dataclass(frozen=True)
class LoopLayout:
    """The unrolled depth of a looped model: sizes, coordinates, names and labels.

    A core block at iteration ``t`` and layer ``l`` has index ``n_prelude + t * n_core + l``.

    Attributes:
        n_prelude: Blocks before the loop.
        n_core: Blocks in one iteration.
        n_coda: Blocks after the loop.
        n_iterations: Passes through the core.
        stacks: Name of the stack that each iteration calls (one entry an iteration), for models
            whose iterations call one of several stacks; else ``None``.
        shared_stacks: Whether all stacks are the same layers.
    """

    n_prelude: int
    n_core: int
    n_coda: int
    n_iterations: int
    stacks: tuple[str, ...] | None = None
    shared_stacks: bool = False

    def __post_init__(self) -> None:
        for name in ("n_prelude", "n_coda"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("n_core", "n_iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.stacks is not None and len(self.stacks) != self.n_iterations:
            raise ValueError(
                f"stacks names {len(self.stacks)} calls, but n_iterations is {self.n_iterations}"
            )

    @property
    def n_layers(self) -> int:
        """Unrolled depth: the number of ``blocks``."""
        return self.n_prelude + self.n_iterations * self.n_core + self.n_coda

    @property
    def n_physical_layers(self) -> int:
        """Number of distinct sets of block weights."""
        several = self.stacks is not None and not self.shared_stacks
        n_stacks = len(set(self.stacks or ())) if several else 1
        return self.n_prelude + n_stacks * self.n_core + self.n_coda

    @property
    def core_start(self) -> int:
        """Index of the first core block."""
        return self.n_prelude

    @property
    def coda_start(self) -> int:
        """Index of the first block behind the core."""
        return self.n_prelude + self.n_iterations * self.n_core

    def iteration_blocks(self, iteration: SupportsIndex) -> range:
        """Indices of the unrolled blocks of one iteration; negative counts from the last.

        Raises:
            IndexError: The iteration is out of range.
        """
        first = self.index(iteration=iteration)
        return range(first, first + self.n_core)

    def pass_blocks(self, iteration: SupportsIndex) -> list[int]:
        """Indices of the unrolled blocks on the way through one iteration: prelude, it, coda.

        Raises:
            IndexError: The iteration is out of range.
        """
        coda = range(self.coda_start, self.n_layers)
        return [*range(self.n_prelude), *self.iteration_blocks(iteration), *coda]

    def state_path(self, iteration: int) -> str:
        """Which sequence of states an iteration's belongs to: with two stacks, that of its own."""
        return self.stacks[iteration] if self.stacks is not None else "loop"

    @property
    def n_pass(self) -> int:
        """Blocks on one way through the layers: prelude, core once, coda."""
        return self.n_prelude + self.n_core + self.n_coda

    def place_in_pass(self, index: int) -> int:
        """Which block of one such way an unrolled block is, counted from 0."""
        at = self.coordinate(index)
        if at.phase == "coda":
            return self.n_pass - self.n_coda + at.layer
        return at.layer + (self.n_prelude if at.phase == "core" else 0)

    def notation(self, injected: bool) -> str:
        """The paper's notation ``(p, k⊗t, c)``, with ``_I`` when the input is injected.

        Source: 2604.11791, section 3.
        """
        loop = f"{self.n_core}⊗{self.n_iterations}"
        return f"({self.n_prelude}, {loop}, {self.n_coda})" + ("_I" if injected else "")

    def index(
        self,
        *,
        iteration: SupportsIndex | None = None,
        layer: SupportsIndex = 0,
        phase: str | None = None,
    ) -> int:
        """Index of the unrolled block at a coordinate.

        Args:
            iteration: Iteration of a core block; negative counts from the last.
            layer: Layer inside the phase; negative counts from the last.
            phase: ``"core"`` when an iteration is given, else needed.

        Raises:
            ValueError: The phase is missing, unknown, or has no iterations.
            IndexError: The layer or the iteration is out of range.
        """
        if phase is None:
            if iteration is None:
                raise ValueError("index() needs iteration=... or phase='prelude' or 'coda'")
            phase = "core"
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
        size = self.n_core if phase == "core" else getattr(self, f"n_{phase}")
        layer = one_index(f"layer of the {phase}", layer, size)
        if phase == "core":
            if iteration is None:
                raise ValueError("a core block needs iteration=...")
            iteration = one_index("iteration", iteration, self.n_iterations)
            return self.n_prelude + iteration * self.n_core + layer
        if iteration is not None:
            raise ValueError(f"the {phase} has no iterations, got iteration={iteration}")
        return layer if phase == "prelude" else self.coda_start + layer

    def coordinate(self, index: SupportsIndex) -> BlockCoordinate:
        """Coordinate of an unrolled block; negative indices count from the last block.

        Raises:
            IndexError: There is no such block.
        """
        index = one_index("block", index, self.n_layers)
        if index < self.n_prelude:
            return BlockCoordinate("prelude", None, index)
        if index >= self.coda_start:
            return BlockCoordinate("coda", None, index - self.coda_start)
        iteration, layer = divmod(index - self.n_prelude, self.n_core)
        stack = self.stacks[iteration] if self.stacks is not None else None
        return BlockCoordinate("core", iteration, layer, stack)

    def coordinates(self) -> Iterator[BlockCoordinate]:
        """Coordinates of all unrolled blocks in order."""
        return (self.coordinate(index) for index in range(self.n_layers))

    def physical_name(self, index: int) -> str:
        """Name of the physical layer behind an unrolled block, e.g. ``"core.2"`` or ``"coda.0"``.

        With several stacks the core is named by the stack: ``"core.L.2"``.
        """
        at = self.coordinate(index)
        stack = f"{at.stack}." if at.stack is not None and not self.shared_stacks else ""
        return f"{at.phase}.{stack}{at.layer}"

    def physical_names(self) -> list[str]:
        """Names of all physical layers, in the order of their first use."""
        return list(dict.fromkeys(self.physical_name(index) for index in range(self.n_layers)))

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
        between = iteration_spec(name)
        if layer is None and between is not None:
            if iteration is None:
                raise ValueError(f"{name!r} sits between iterations: give iteration=...")
            return f"iter.{one_index('iteration', iteration, self.n_iterations)}.{between.name}"
        if layer is None:
            raise ValueError(f"{name!r} sits in a block: give layer=...")
        index = self.index(iteration=iteration, layer=layer, phase=phase)
        return f"blocks.{index}.{activation_name(name)}"

    def canonical_name(self, name: str) -> str:
        """Translate ``prelude.{l}.REST``, ``iter.{t}.{l}.REST`` and ``coda.{l}.REST``.

        Any other name is returned as it is, so that canonical names stay valid.

        Raises:
            IndexError: The alias names a layer or an iteration that does not exist.
        """
        match, where = _ALIAS.match(name), f" in hook name {name!r}"
        if match is None:
            at_iteration = _ITERATION.match(name)
            if at_iteration is not None:
                one_index("iteration", int(at_iteration.group(1)), self.n_iterations, where)
            return name
        outer, outer_layer, iteration, layer, rest = match.groups()
        if outer is not None:
            size = self.n_prelude if outer == "prelude" else self.n_coda
            first = 0 if outer == "prelude" else self.coda_start
            block = first + one_index(f"layer of the {outer}", int(outer_layer), size, where)
        else:
            t = one_index("iteration", int(iteration), self.n_iterations, where)
            block = self.n_prelude + t * self.n_core
            block += one_index("layer of the core", int(layer), self.n_core, where)
        return f"blocks.{block}.{rest}"

    def alias(self, name: str) -> str:
        """The inverse of :meth:`canonical_name`: ``blocks.{i}.REST`` by its coordinate."""
        match = _BLOCK.match(name)
        if match is None:
            return name
        at = self.coordinate(int(match.group(1)))
        where = f"iter.{at.iteration}" if at.phase == "core" else at.phase
        return f"{where}.{at.layer}.{match.group(2)}"

    def label(self, index: int) -> str:
        """Short label for plots: ``"p0"``, ``"r3.1"`` (iteration 3, layer 1), ``"c1"``."""
        at = self.coordinate(index)
        if at.phase == "core":
            stack = at.stack if at.stack is not None else ""
            return f"r{at.iteration}{stack}.{at.layer}"
        return f"{at.phase[0]}{at.layer}"

    def labels(self) -> list[str]:
        """Labels of all unrolled blocks."""
        return [self.label(index) for index in range(self.n_layers)]

    def by_iteration(self, values: Values) -> Values:
        """Reshape per-block values to one row an iteration; prelude and coda are left out.

        Args:
            values: Tensor or array ``[n_layers, ...]``.

        Returns:
            ``[n_iterations, n_core, ...]``, a view where the input allows it.

        Raises:
            ValueError: The first axis is not the unrolled depth.
        """
        shape = tuple(values.shape)  # type: ignore[attr-defined]
        if not shape or shape[0] != self.n_layers:
            raise ValueError(
                f"by_iteration() needs [{self.n_layers}, ...] (one entry a block), got {shape}"
            )
        core = values[self.core_start : self.coda_start]  # type: ignore[index]
        return core.reshape(self.n_iterations, self.n_core, *shape[1:])

    def with_iterations(self, n_iterations: int) -> "LoopLayout":
        """The same layout with another number of iterations.

        Raises:
            ValueError: ``n_iterations`` is below 1.
        """
        stacks = self.stacks
        if stacks is not None:
            stacks = tuple(stacks[t % len(stacks)] for t in range(max(n_iterations, 0)))
        return LoopLayout(
            self.n_prelude, self.n_core, self.n_coda, n_iterations, stacks, self.shared_stacks
        )


def part_labels(layout: LoopLayout, block: int, part: str, numbers: Iterable[int]) -> list[str]:
    """Labels of heads (part ``"H"``) or neurons (``"N"``): ``"r3.L1H4"``, ``"p.L0H2"``."""
    at = layout.coordinate(block)
    place = at.phase[0] if at.iteration is None else f"r{at.iteration}{at.stack or ''}"
    return [f"{place}.L{at.layer}{part}{number}" for number in numbers]


def part_label(layout: LoopLayout, block: int, part: str, number: int) -> str:
    """One of :func:`part_labels`."""
    return part_labels(layout, block, part, [number])[0]
