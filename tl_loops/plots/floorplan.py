"""The looped floorplan: every attention pattern of a model on one page."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.drawing.colours import MUTED
from tl_loops.drawing.depth import PHASES, block_groups, block_values
from tl_loops.drawing.draw import draw
from tl_loops.drawing.figure import Axis, Box, ColourScale, Figure, Heat, Mark, Panel, as_array
from tl_loops.drawing.subject import Subject, subject_of
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.upstream import Cache, PromptsShown

_BETWEEN_TILES, _BETWEEN_GROUPS = 1, 4
_WIDEST = 1400


@checked
def plot_floorplan(
    source: Cache | Tensor,
    *,
    heads: str = "all",
    row: int = 0,
    tile: int = 64,
    iterations_per_row: int | None = None,
    model: Model | str | None = None,
    prompts: PromptsShown | None = None,
    title: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """All attention patterns of one prompt, block after block, one row per head.

    Prelude and coda are outlined, iterations stand apart. Each square is one pattern, queries from
    top to bottom and keys from left to right.

    Args:
        source: An activation cache with ``pattern`` of all blocks; or patterns
            [block, head, dest, src].
        heads: ``"all"``, or ``"mean"`` for one square per block.
        row: Which prompt of a cache.
        tile: Pixels of a square at most; patterns of more tokens are shown by the largest weight in
            each pixel, which keeps sinks and diagonals visible.
        iterations_per_row: Iterations in one line of the page; ``None``: as many as fit.
        model: Model or its name, where the source is a tensor; a model also says where iterations
            begin.
        prompts: The text, where it is known.
        title: In place of the general one.
        backend: See :func:`tl_loops.plots.draw`.
        **options: ``width``, ``height``, and what the library takes.

    Returns:
        A figure of the library.

    Raises:
        ValueError: Patterns of another shape, or a cache that lacks them.
        ImportError: The library is missing.
    """
    if heads not in ("all", "mean"):
        raise ValueError(f"heads={heads!r}, expected 'all' or 'mean'")
    if tile < 2 or (iterations_per_row is not None and iterations_per_row < 1):
        raise ValueError("expected tile of at least 2 and iterations_per_row of at least 1")
    subject = subject_of(source, model=model, prompts=prompts)
    if hasattr(source, "cache_dict"):
        source = block_values(source, "pattern", row)
    if not isinstance(source, Tensor) or source.ndim != 4 or source.shape[-1] != source.shape[-2]:
        got = list(source.shape) if isinstance(source, Tensor) else type(source).__name__
        raise ValueError(f"patterns must be [block, head, dest, src] of one prompt, got {got}")
    patterns = source.mean(1, keepdim=True) if heads == "mean" else source
    heading = title or (
        "Looped floorplan: attention patterns of all blocks and heads"
        if heads == "all"
        else "Looped floorplan: attention patterns of all blocks, mean over heads"
    )
    line = subject.line(complete=title is None)
    if not patterns.numel():
        note = "Nothing to draw: there is no pattern."
        panel = Panel((), Axis("unrolled block"), Axis("head"), note=note)
        return draw(Figure(heading, line, (panel,)), backend, **options)

    tiles = as_array(_pooled(patterns, tile))
    layout = _layout(subject, len(tiles))
    groups = _groups(layout, len(tiles))
    side = tiles.shape[-1] + _BETWEEN_TILES
    if iterations_per_row is None:
        widest = max(len(members) for _, members, _ in groups) * side + _BETWEEN_GROUPS
        iterations_per_row = max(1, _WIDEST // widest)
    pages = _pages(groups, iterations_per_row)
    names = [str(b) for b in range(len(tiles))] if layout is None else layout.labels()
    head_names = ["mean"] if heads == "mean" else [f"H{h}" for h in range(tiles.shape[1])]
    widest = max(sum(len(m) * side + _BETWEEN_GROUPS for _, m, _ in page) for page in pages)
    panels = [_panel(page, tiles, names, head_names, widest) for page in pages]
    n_pos = source.shape[-1]
    footnote = f"{n_pos} tokens; in each square queries run down, keys to the right."
    if n_pos > tile:
        footnote += f" Each of its {tiles.shape[-1]} pixels is the largest of several weights."
    width = max(400, min(1000, widest))
    height = max(60, round(tiles.shape[1] * side * width / widest))
    figure = Figure(
        heading,
        line,
        tuple(panels),
        panel_size=(width, height),
        colours=ColourScale("attention weight", "weights"),
        footnotes=(footnote,),
        keeps_shape=True,
    )
    return draw(figure, backend, **options)


def _pooled(
    patterns: Float[Tensor, "block head dest src"], tile: int
) -> Float[Tensor, "block head row column"]:
    n_pos = patterns.shape[-1]
    patterns = patterns.detach().float()
    if n_pos <= tile:
        return patterns
    # A NaN is not the largest of anything: keep it visible.
    pooled = F.adaptive_max_pool2d(patterns.nan_to_num(nan=math.inf), tile)
    return torch.where(pooled.isinf(), math.nan, pooled)


def _layout(subject: Subject, n_blocks: int) -> LoopLayout | None:
    layout = subject.layout
    return layout if layout is not None and layout.n_layers == n_blocks else None


Group = tuple[str, list[int], str | None]


def _groups(layout: LoopLayout | None, n_blocks: int) -> list[Group]:
    """Blocks that stand together: title, blocks, colour of the outline."""
    if layout is None:
        return [("layers", list(range(n_blocks)), None)]
    return [(name, blocks, PHASES.get(name)) for name, _, blocks in block_groups(layout)]


def _pages(groups: list[Group], per_row: int) -> list[list[Group]]:
    """Lines of the page; prelude and coda stand with the first and the last iteration."""
    pages: list[list[Group]] = [[]]
    for group in groups:
        iterations = sum(colour is None for _, _, colour in pages[-1])
        if group[2] is None and iterations == per_row:
            pages.append([])
        pages[-1].append(group)
    return pages


def _panel(
    page: list[Group],
    tiles: np.ndarray,
    names: list[str],
    head_names: list[str],
    widest: int,
) -> Panel:
    n_heads, size = tiles.shape[1], tiles.shape[-1]
    side = size + _BETWEEN_TILES
    width = sum(len(members) * side + _BETWEEN_GROUPS for _, members, _ in page)
    canvas = np.full((n_heads * side, width), np.nan)
    marks: list[Mark] = []
    ticks: list[tuple[float, str]] = []
    undefined = False
    at = 0
    for name, members, colour in page:
        first = at
        for block in members:
            for head in range(n_heads):
                square = tiles[block, head]
                undefined |= bool(np.isnan(square).any())
                canvas[head * side : head * side + size, at : at + size] = square
            ticks.append((at + (size - 1) / 2, names[block]))
            at += side
        outline = colour or MUTED
        # Without its name an outline tells nothing, so iterations are named by their ticks.
        label = name if colour else ""
        marks.append(
            Box(
                (first - 1.5, at - _BETWEEN_TILES + 0.5),
                (-1.5, n_heads * side - _BETWEEN_TILES + 0.5),
                outline,
                label,
            )
        )
        at += _BETWEEN_GROUPS
    head_ticks = tuple((h * side + (size - 1) / 2, name) for h, name in enumerate(head_names))
    marks.insert(0, Heat(canvas, blank=True))
    note = ""
    if undefined and not np.isfinite(canvas).any():
        note = "Nothing to draw: every attention weight is undefined (NaN)."
    return Panel(
        tuple(marks),
        Axis("unrolled block", ticks=tuple(ticks), limits=(-2.5, widest - 0.5)),
        Axis("head", ticks=head_ticks, limits=(n_heads * side + 0.5, -2.5)),
        note=note,
    )
