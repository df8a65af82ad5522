"""The unrolled depth of a looped model: which block is layer ``l`` at iteration ``t``."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, SupportsIndex, TypeVar

from tl_loops.arguments import check_at_least, checked
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.block_names import BlockNames
from tl_loops.layout.coordinate import PHASES, BlockCoordinate
from tl_loops.layout.segments import (
    Segment,
    check_segments,
    loop_notation,
    segment_calls,
    segments_notation,
)
from tl_loops.layout.selection import one_index

Values = TypeVar("Values")


class LoopLayout(BlockNames):
    """The unrolled depth of a looped model: sizes, coordinates, names and labels. Never changes.

    With one loop, a core block at iteration ``t`` and layer ``l`` has index
    ``n_prelude + t * n_core + l``. With several loops (:meth:`of_segments`) every pass through one
    counts as one iteration, numbered through all of them, and the stack of a coordinate names the
    loop: ``"A"``, ``"B"``, ...

    Attributes:
        n_prelude: Blocks before the loop.
        n_coda: Blocks after the loop.
        n_iterations: Passes through the core.
        stacks: Name of the stack that each iteration calls (one entry per iteration), for models
            whose iterations call one of several stacks; else ``None``.
        shared_stacks: Whether all stacks are the same layers.
        layer_repeats: How often in a row each iteration runs its layers.
        segments: The loops, where there are several; else ``None``.
        loops: The same, or the one loop that there is, by their physical layers.
    """

    def __init__(
        self,
        n_prelude: int,
        n_core: int,
        n_coda: int,
        n_iterations: int,
        stacks: tuple[str, ...] | None = None,
        shared_stacks: bool = False,
        layer_repeats: int = 1,
    ):
        """The layout of one loop, of ``n_core`` blocks.

        Raises:
            ValueError: A size is too small or no multiple, or there is not one stack per iteration.
        """
        check_at_least(0, n_prelude=n_prelude, n_coda=n_coda)
        check_at_least(1, n_core=n_core, n_iterations=n_iterations, layer_repeats=layer_repeats)
        if n_core % layer_repeats:
            raise ValueError(f"n_core={n_core} is no multiple of layer_repeats={layer_repeats}")
        if stacks is not None and len(stacks) != n_iterations:
            raise ValueError(f"stacks names {len(stacks)} calls, not n_iterations={n_iterations}")
        loop = Segment(n_prelude, n_prelude + n_core, n_iterations)
        self._set((loop,), n_coda, stacks, shared_stacks, None, layer_repeats)

    @classmethod
    def of_segments(cls, segments: Sequence[Segment], n_coda: int) -> "LoopLayout":
        """The layout of several loops one after the other; layers between two are passed once.

        Args:
            segments: What follows the prelude, in order, without gaps.
            n_coda: Layers after the last segment.

        Raises:
            ValueError: The segments are empty, overlap or leave a gap.
        """
        segments = tuple(segments)
        check_segments(segments)
        stacks = tuple(name for name, _ in segment_calls(segments))
        layout = object.__new__(cls)
        layout._set(segments, n_coda, stacks, False, segments)
        return layout

    def _set(
        self,
        loops: tuple[Segment, ...],
        n_coda: int,
        stacks: tuple[str, ...] | None,
        shared_stacks: bool,
        segments: tuple[Segment, ...] | None,
        layer_repeats: int = 1,
    ) -> None:
        self.loops = loops
        self.segments = segments
        self.n_prelude = loops[0].start
        self.n_coda = n_coda
        self.stacks = stacks
        self.shared_stacks = shared_stacks
        self.layer_repeats = layer_repeats
        self._calls = tuple(segment for _, segment in segment_calls(loops))
        self.n_iterations = len(self._calls)
        lengths = [segment.n_layers for segment in self._calls]
        self._n_core = lengths[0] if len(set(lengths)) == 1 else None
        # Index of each iteration's first block, and of the coda's.
        self._firsts = tuple(accumulate(lengths, initial=self.n_prelude))

    def _key(self) -> tuple[Any, ...]:
        sizes = self.loops, self.segments, self.n_coda, self.layer_repeats
        return *sizes, self.stacks, self.shared_stacks

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoopLayout) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"LoopLayout({self.notation(injected=False)}, stacks={self.stacks})"

    @property
    def n_core(self) -> int:
        """Blocks in one iteration.

        Raises:
            LoopedSemanticsError: The iterations have different numbers of blocks.
        """
        if self._n_core is None:
            raise LoopedSemanticsError(
                f"the iterations of {self.notation(injected=False)} have different numbers of "
                "layers, so this has no one number of layers an iteration: go by unrolled block"
            )
        return self._n_core

    @property
    def n_layers(self) -> int:
        """Unrolled depth: the number of ``blocks``."""
        return self.coda_start + self.n_coda

    @property
    def n_physical_layers(self) -> int:
        """Number of distinct sets of block weights."""
        if self.segments is not None:
            return self.n_pass
        n_stacks = 1 if self.stacks is None or self.shared_stacks else len({*self.stacks})
        return self.n_prelude + n_stacks * self.n_core // self.layer_repeats + self.n_coda

    @property
    def core_start(self) -> int:
        """Index of the first core block."""
        return self.n_prelude

    @property
    def coda_start(self) -> int:
        """Index of the first block after the core."""
        return self._firsts[-1]

    def iteration_blocks(self, iteration: SupportsIndex) -> range:
        """Indices of the unrolled blocks of one iteration; negative counts from the last.

        Raises:
            IndexError: The iteration is out of range.
        """
        t = one_index("iteration", iteration, self.n_iterations)
        return range(self._firsts[t], self._firsts[t + 1])

    def begins_at(self, index: int) -> int | None:
        """The iteration whose first block an unrolled block is; ``None``: of none."""
        t = self.next_iteration(index)
        return t if t < self.n_iterations and self._firsts[t] == index else None

    def ends_at(self, index: int) -> int | None:
        """The iteration whose last block an unrolled block is; ``None``: of none."""
        t = self.next_iteration(index + 1)
        return t - 1 if t and self._firsts[t] == index + 1 else None

    def next_iteration(self, index: int) -> int:
        """The first iteration that begins at a block or after it; ``n_iterations`` if none does."""
        return bisect_left(self._firsts, index, hi=self.n_iterations)

    def pass_blocks(self, iteration: SupportsIndex) -> list[int]:
        """Indices of the unrolled blocks on the way through one iteration: prelude, it, coda.

        Raises:
            IndexError: The iteration is out of range.
            LoopedSemanticsError: There are several loops, which stand at different depths.
        """
        if self.segments is not None:
            raise LoopedSemanticsError(
                f"the loops of {self.notation(injected=False)} stand at different depths, so there "
                "is no one way from prelude to coda through an iteration: go by unrolled block"
            )
        coda = range(self.coda_start, self.n_layers)
        return [*range(self.n_prelude), *self.iteration_blocks(iteration), *coda]

    def state_path(self, iteration: int) -> str:
        """Which sequence of states an iteration's belongs to: with two stacks, that of its own."""
        t = one_index("iteration", iteration, self.n_iterations)
        return "loop" if self.stacks is None or self.segments is not None else self.stacks[t]

    @property
    def n_pass(self) -> int:
        """Blocks on one way through the layers: prelude, each loop once, coda."""
        return self.loops[-1].stop + self.n_coda

    def place_in_pass(self, index: int) -> int:
        """Which block of one such way an unrolled block is, counted from 0."""
        at = self.coordinate(index)
        if at.iteration is not None:
            return self._calls[at.iteration].start + at.layer
        return at.layer + (self.loops[-1].stop if at.phase == "coda" else 0)

    @checked
    def notation(self, injected: bool) -> str:
        """The paper's notation ``(p, k⊗t, c)``, with ``_I`` when the input is injected.

        With several loops ``(2, 2⊗3, 1, 1⊗2, 4)``: a number alone is passed once.
        Source: 2604.11791, section 3.
        """
        if self.segments is None:
            loops = loop_notation(self.loops[0], self.layer_repeats)
        else:
            loops = segments_notation(self.segments)
        return f"({self.n_prelude}, {loops}, {self.n_coda})" + ("_I" if injected else "")

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
        if phase == "core":
            if iteration is None:
                raise ValueError("a core block needs iteration=...")
            blocks = self.iteration_blocks(iteration)
            return blocks[one_index(self._layer_of(iteration), layer, len(blocks))]
        layer = one_index(f"layer of the {phase}", layer, getattr(self, f"n_{phase}"))
        if iteration is not None:
            raise ValueError(f"the {phase} has no iterations, got iteration={iteration}")
        return layer if phase == "prelude" else self.coda_start + layer

    def _layer_of(self, iteration: SupportsIndex) -> str:
        """What a layer of an iteration is called in messages."""
        return "layer of the core" if self.segments is None else f"layer of iteration {iteration}"

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
        iteration = bisect_right(self._firsts, index) - 1
        stack = self.stacks[iteration] if self.stacks is not None else None
        return BlockCoordinate("core", iteration, index - self._firsts[iteration], stack)

    def coordinates(self) -> Iterator[BlockCoordinate]:
        """Coordinates of all unrolled blocks in order."""
        return (self.coordinate(index) for index in range(self.n_layers))

    def by_iteration(self, values: Values) -> Values:
        """Values ``[n_layers, ...]`` as one row per iteration; prelude and coda are left out.

        Returns:
            ``[n_iterations, n_core, ...]``, a view where the input allows it.

        Raises:
            ValueError: The first axis is not the unrolled depth.
        """
        array: Any = values
        shape: tuple[int, ...] = tuple(getattr(array, "shape", ()))
        if not shape or shape[0] != self.n_layers:
            raise ValueError(f"by_iteration() needs [{self.n_layers}, ...], by block, got {shape}")
        core = array[self.core_start : self.coda_start]
        return core.reshape(self.n_iterations, self.n_core, *shape[1:])

    @checked
    def with_iterations(self, n_iterations: int) -> "LoopLayout":
        """The same layout with another number of iterations.

        Raises:
            ValueError: ``n_iterations`` is below 1.
            LoopedSemanticsError: There are several loops.
        """
        if self.segments is not None:
            if n_iterations == self.n_iterations:
                return self
            raise LoopedSemanticsError(
                f"{self.notation(injected=False)} has several loops, so one number of iterations "
                "does not say which: call tl_loops.loop(model, loops=...) again, at no copy"
            )
        check_at_least(1, n_iterations=n_iterations)
        stacks = None
        if self.stacks is not None:
            stacks = tuple(self.stacks[t % len(self.stacks)] for t in range(n_iterations))
        return LoopLayout(
            self.n_prelude,
            self.n_core,
            self.n_coda,
            n_iterations,
            stacks,
            self.shared_stacks,
            self.layer_repeats,
        )
