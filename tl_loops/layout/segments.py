"""Runs of layers that repeat: what a layout of several loops is made of."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_uppercase


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


def check_segments(segments: tuple[Segment, ...]) -> None:
    """Check that segments follow each other, so that they can be the middle of a model.

    Raises:
        ValueError: There are none or too many to name, they overlap or leave a gap, or one is
            empty or never runs.
    """
    if not 1 <= len(segments) <= len(ascii_uppercase):
        raise ValueError(f"1 to {len(ascii_uppercase)} segments, got {len(segments)}")
    for segment in segments:
        if not 0 <= segment.start < segment.stop or segment.n_iterations < 1:
            raise ValueError(
                "a segment needs 0 <= start < stop and at least one iteration, got "
                f"({segment.start}, {segment.stop}, {segment.n_iterations})"
            )
    for before, after in pairwise(segments):
        if before.stop != after.start:
            raise ValueError(
                f"segments must follow each other, but one ends before layer {before.stop} "
                f"and the next starts at layer {after.start}"
            )


def named_segments(segments: tuple[Segment, ...]) -> Iterator[tuple[str, Segment]]:
    """Each segment with its name: ``"A"``, ``"B"``, ..."""
    return zip(ascii_uppercase, segments, strict=False)


def segment_calls(segments: tuple[Segment, ...]) -> list[tuple[str, Segment]]:
    """One entry per iteration, numbered through all segments: the segment's name and itself."""
    return [call for call in named_segments(segments) for _ in range(call[1].n_iterations)]


def loop_notation(loop: Segment, layer_repeats: int = 1) -> str:
    """For example ``4⊗8``; ``(2⊗2)⊗8`` where an iteration runs two layers twice."""
    n = loop.n_layers
    core = str(n) if layer_repeats == 1 else f"({n // layer_repeats}⊗{layer_repeats})"
    return f"{core}⊗{loop.n_iterations}"


def segments_notation(segments: tuple[Segment, ...]) -> str:
    """For example ``2⊗3, 1, 1⊗2``: a number alone is passed once."""
    return ", ".join(
        str(segment.n_layers) if segment.n_iterations == 1 else loop_notation(segment)
        for segment in segments
    )
