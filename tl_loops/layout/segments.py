"""The layout of a model with several loops, whose passes may have different numbers of layers."""

from dataclasses import dataclass
from itertools import pairwise
from string import ascii_uppercase
from typing import NoReturn, SupportsIndex

from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.layout import BlockCoordinate, LoopLayout
from tl_loops.layout.selection import one_index


@dataclass(frozen=True)
class Segment:
    """Physical layers ``start`` to ``stop`` (exclusive), run ``n_iterations`` times in a row."""

    start: int
    stop: int
    n_iterations: int = 1

    @property
    def n_layers(self) -> int:
        """Layers of one pass."""
        return self.stop - self.start


class SegmentedLayout(LoopLayout):
    """Several loops one after the other, between a prelude and a coda.

    Every pass through a segment counts as one iteration, numbered through all segments; layers
    between two loops are a segment that is passed once. The stack of a coordinate names the
    segment: ``"A"``, ``"B"``, ...; a block is then ``iter.{t}.{l}`` with ``t`` counted through and
    ``l`` inside its segment. What needs one number of layers an iteration (``n_core``,
    :meth:`by_iteration`) is refused where the segments differ in length.

    Args:
        segments: What follows the prelude, in order, without gaps.
        n_coda: Layers behind the last segment.

    Raises:
        ValueError: The segments are empty, overlap or leave a gap.
    """

    segments: tuple[Segment, ...]

    def __init__(self, segments: tuple[Segment, ...], n_coda: int):
        if not 1 <= len(segments) <= len(ascii_uppercase):
            raise ValueError(f"1 to {len(ascii_uppercase)} segments, got {len(segments)}")
        for before, behind in pairwise(segments):
            if before.stop != behind.start:
                raise ValueError(
                    f"segments must follow each other, but one ends before layer {before.stop} "
                    f"and the next starts at layer {behind.start}"
                )
        calls = [
            (name, segment)
            for name, segment in zip(ascii_uppercase, segments, strict=False)
            for _ in range(segment.n_iterations)
        ]
        first, firsts = segments[0].start, []
        for _, segment in calls:
            firsts.append(first)
            first += segment.n_layers
        for name, value in (
            ("segments", tuple(segments)),
            ("n_prelude", segments[0].start),
            ("n_coda", n_coda),
            ("n_iterations", len(calls)),
            ("stacks", tuple(name for name, _ in calls)),
            ("_lengths", tuple(segment.n_layers for _, segment in calls)),
            ("_firsts", tuple(firsts)),
        ):
            object.__setattr__(self, name, value)

    _lengths: tuple[int, ...]
    _firsts: tuple[int, ...]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SegmentedLayout):
            return False
        return (self.segments, self.n_coda) == (other.segments, other.n_coda)

    def __hash__(self) -> int:
        return hash((self.segments, self.n_coda))

    def __repr__(self) -> str:
        return f"SegmentedLayout({self.notation(injected=False)})"

    @property
    def n_core(self) -> int:  # type: ignore[override]
        """Layers of one iteration.

        Raises:
            LoopedSemanticsError: The iterations have different numbers of layers.
        """
        if len(set(self._lengths)) > 1:
            raise LoopedSemanticsError(
                f"the iterations of {self.notation(injected=False)} have different numbers of "
                "layers, so this has no one number of layers an iteration: go by unrolled block"
            )
        return self._lengths[0]

    @property
    def n_layers(self) -> int:
        """Unrolled depth: the number of ``blocks``."""
        return self.coda_start + self.n_coda

    @property
    def n_physical_layers(self) -> int:
        """Number of distinct sets of block weights."""
        return self.segments[-1].stop + self.n_coda

    @property
    def coda_start(self) -> int:
        """Index of the first block behind the last segment."""
        return self.n_prelude + sum(self._lengths)

    @property
    def n_pass(self) -> int:
        """Blocks on one way through the layers, each segment once."""
        return self.n_physical_layers

    def state_path(self, iteration: int) -> str:
        """``"loop"``: one stream goes through all loops."""
        return "loop"

    def pass_blocks(self, iteration: SupportsIndex) -> NoReturn:
        """Refused: iterations of different loops stand at different depths.

        Raises:
            LoopedSemanticsError: Always.
        """
        raise LoopedSemanticsError(
            f"the loops of {self.notation(injected=False)} stand at different depths, so there is "
            "no one way from prelude to coda through an iteration: go by unrolled block"
        )

    def place_in_pass(self, index: int) -> int:
        """The physical layer of an unrolled block, counted from 0."""
        at = self.coordinate(index)
        if at.stack is None:
            return super().place_in_pass(index)
        return self.segments[ascii_uppercase.index(at.stack)].start + at.layer

    def notation(self, injected: bool) -> str:
        """For example ``(2, 2⊗3, 1, 1⊗2, 4)``: a number alone is passed once."""
        middle = [
            str(s.n_layers) if s.n_iterations == 1 else f"{s.n_layers}⊗{s.n_iterations}"
            for s in self.segments
        ]
        parts = ", ".join([str(self.n_prelude), *middle, str(self.n_coda)])
        return f"({parts})" + ("_I" if injected else "")

    def iteration_blocks(self, iteration: SupportsIndex) -> range:
        """Indices of the unrolled blocks of one iteration; negative counts from the last."""
        t = one_index("iteration", iteration, self.n_iterations)
        return range(self._firsts[t], self._firsts[t] + self._lengths[t])

    def index(
        self,
        *,
        iteration: SupportsIndex | None = None,
        layer: SupportsIndex = 0,
        phase: str | None = None,
    ) -> int:
        """Index of the unrolled block at a coordinate; see :meth:`LoopLayout.index`."""
        if phase in ("prelude", "coda") or iteration is None or phase not in (None, "core"):
            if phase == "core" or (phase is None and iteration is None):
                raise ValueError("index() needs iteration=... or phase='prelude' or 'coda'")
            return super().index(iteration=iteration, layer=layer, phase=phase)
        blocks = self.iteration_blocks(iteration)
        return blocks[one_index(f"layer of iteration {iteration}", layer, len(blocks))]

    def coordinate(self, index: SupportsIndex) -> BlockCoordinate:
        """Coordinate of an unrolled block; negative indices count from the last block."""
        index = one_index("block", index, self.n_layers)
        if index < self.n_prelude:
            return BlockCoordinate("prelude", None, index)
        if index >= self.coda_start:
            return BlockCoordinate("coda", None, index - self.coda_start)
        t = max(t for t, first in enumerate(self._firsts) if first <= index)
        assert self.stacks is not None
        return BlockCoordinate("core", t, index - self._firsts[t], self.stacks[t])

    def canonical_name(self, name: str) -> str:
        """Translate aliases; see :meth:`LoopLayout.canonical_name`."""
        parts = name.split(".", 3)
        if parts[0] == "iter" and len(parts) == 4 and parts[1].isdigit() and parts[2].isdigit():
            block = self.index(iteration=int(parts[1]), layer=int(parts[2]))
            return f"blocks.{block}.{parts[3]}"
        return super().canonical_name(name)

    def with_iterations(self, n_iterations: int) -> NoReturn:
        """Refused: several loops have no one number of iterations.

        Raises:
            LoopedSemanticsError: Always.
        """
        raise LoopedSemanticsError(
            f"{self.notation(injected=False)} has several loops, so one number of iterations does "
            "not say which: call tl_loops.loop(model, loops=...) again, which copies no weight"
        )
