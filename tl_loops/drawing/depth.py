"""The unrolled depth along an axis: labels, prelude and coda, where iterations begin."""

import math
from typing import Any

import torch
from torch import Tensor

from tl_loops.drawing.colours import CODA, PRELUDE, iteration_colours
from tl_loops.drawing.figure import Axis, Box, Mark, Rule, Span, Ticks
from tl_loops.drawing.quantities import LAYER
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.names import iteration_spec

PHASES = {"prelude": PRELUDE, "coda": CODA}
DEPTH = "unrolled block (p: prelude, r: iteration.layer, c: coda)"


def depth_axis(layout: LoopLayout | None, n_blocks: int) -> Axis:
    """The axis of all blocks of a model; a feedforward model has none but layers."""
    if layout is None:
        return LAYER
    ticks = block_ticks(layout, range(n_blocks))
    return Axis(DEPTH, ticks=ticks, limits=(-0.5, n_blocks - 0.5))


def block_ticks(layout: LoopLayout, blocks: range, most: int = 30) -> Ticks:
    """Labels of blocks; of many only the first of each iteration, and of prelude and coda."""
    every = math.ceil(layout.n_iterations / most)
    ticks = []
    for block in blocks:
        at = layout.coordinate(block)
        wanted = len(blocks) <= most or (
            at.layer == 0 and (at.iteration is None or at.iteration % every == 0)
        )
        if wanted:
            ticks.append((block, layout.label(block)))
    return tuple(ticks)


def phase_spans(layout: LoopLayout | None) -> tuple[Span, ...]:
    """Prelude and coda as shaded ranges of an axis of blocks."""
    if layout is None:
        return ()
    spans = []
    if layout.n_prelude:
        spans.append(Span(-0.5, layout.core_start - 0.5, "prelude", PRELUDE))
    if layout.n_coda:
        spans.append(Span(layout.coda_start - 0.5, layout.n_layers - 0.5, "coda", CODA))
    return tuple(spans)


def iteration_rules(layout: LoopLayout | None, most: int = 40) -> tuple[Rule, ...]:
    """Lines where one iteration follows the other, along x; none where they would be too many."""
    if layout is None or layout.n_iterations > most:
        return ()
    return tuple(Rule(at - 0.5) for at in _starts(layout)[1:])


def block_groups(layout: LoopLayout) -> list[tuple[str, int | None, list[int]]]:
    """Prelude, each iteration and coda with their blocks, in order; empty ones are left out.

    Args:
        layout: Of the model; its iterations may differ in length.

    Returns:
        Name, iteration (``None`` outside of the core) and blocks.
    """
    groups: list[tuple[str, int | None, list[int]]] = []
    for block, at in enumerate(layout.coordinates()):
        name = at.phase if at.iteration is None else f"iteration {at.iteration}"
        if not groups or groups[-1][0] != name:
            groups.append((name, at.iteration, []))
        groups[-1][2].append(block)
    return groups


def matrix_marks(layout: LoopLayout | None) -> tuple[Mark, ...]:
    """Boxes around prelude and coda on the diagonal of a matrix of blocks, and rules between."""
    if layout is None:
        return ()
    marks: list[Mark] = []
    if layout.n_iterations <= 40:
        for start in _starts(layout)[1:]:
            marks += [Rule(start - 0.5, axis=axis, colour="#ffffff") for axis in ("x", "y")]
    for span in phase_spans(layout):
        marks.append(Box((span.start, span.stop), (span.start, span.stop), span.colour))
    return tuple(marks)


def block_colours(layout: LoopLayout) -> list[str]:
    """Colour of each block: its iteration's, or that of prelude or coda."""
    ramp = iteration_colours(layout.n_iterations)
    return [
        PHASES[at.phase] if at.iteration is None else ramp[at.iteration]
        for at in layout.coordinates()
    ]


def block_values(cache: Any, name: str, row: int | None = None) -> Tensor:
    """One activation of all blocks of a cache, [block, batch, ...] ([block, ...] for one row).

    Args:
        cache: An activation cache, of a looped model or not.
        name: Shorthand of the activation.
        row: Which prompt; ``None``: all.

    Raises:
        ValueError: The cache lacks the activation at some block, or has no such row.
    """
    layout = getattr(cache, "layout", None)
    n_blocks = cache.model.cfg.n_layers if layout is None else layout.n_layers
    try:
        values = [cache[name, block] for block in range(n_blocks)]
    except KeyError as error:
        raise ValueError(
            f"the cache lacks {error}: run_with_cache must keep {name!r} of every block"
        ) from error
    stacked = torch.stack(values)
    if not cache.has_batch_dim:
        stacked = stacked.unsqueeze(1)
    if row is None:
        return stacked
    if not -stacked.shape[1] <= row < stacked.shape[1]:
        raise ValueError(f"there is no prompt {row}: the cache holds {stacked.shape[1]}")
    return stacked[:, row]


def iteration_values(source: Any, name: str) -> Any:
    """What a source holds by iteration: of a cache one activation, anything else as it is.

    Args:
        source: An activation cache of a looped model, or values [iteration, ...].
        name: Shorthand of the activation: of one between iterations (``"state_out"``, which gives
            [iteration, batch, ...]) or of a block ([iteration, layer, batch, ...] of the core).

    Raises:
        ValueError: The cache is of a model without a loop, of one whose iterations differ in
            length, or lacks the activation.
    """
    if not hasattr(source, "cache_dict"):
        return source
    layout = getattr(source, "layout", None)
    if layout is None:
        raise ValueError("the cache is of a model without a loop, so it has no iterations")
    between = iteration_spec(name) is not None
    if not between and layout.segments is not None:
        raise ValueError(
            "the model has several loops, whose iterations may differ in length: pass the states "
            "of one loop, [iteration, layer, ..., d_model]"
        )
    try:
        return source.stack_activation(name, by_iteration=not between)
    except KeyError as error:
        raise ValueError(
            f"the cache lacks {error}: run_with_cache must keep {name!r} of every iteration"
        ) from error


def _starts(layout: LoopLayout) -> list[int]:
    return [layout.index(iteration=t) for t in range(layout.n_iterations)]
