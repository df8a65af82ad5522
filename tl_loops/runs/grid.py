"""Grids of patches: named axes turned into the region that each cell covers."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import layout_of
from tl_loops.layout.selection import Selection, contiguous_parts, distinct_indices
from tl_loops.runs.activations import AXES, Activation, find_activation
from tl_loops.upstream.inputs import token_ids

_SYNONYMS = {"head_index": "head", "dest_pos": "pos"}


@dataclass(frozen=True)
class Region:
    """What one cell of a grid covers: hook points, and along each axis the contiguous parts.

    Attributes:
        names: Canonical hook names.
        pos: Parts of the position axis (destinations, for a pattern).
        head: Parts of the head axis; ``None`` where there is none.
        src_pos: Parts of a pattern's source axis; ``None`` where there is none.
    """

    names: tuple[str, ...]
    pos: tuple[slice, ...]
    head: tuple[slice, ...] | None = None
    src_pos: tuple[slice, ...] | None = None

    @property
    def first_pos(self) -> int:
        """The first position that is covered."""
        return self.pos[0].start

    def parts(self) -> Iterator[tuple[slice, slice | None, slice | None]]:
        """The blocks (position, head, source) of contiguous index ranges that make it up."""
        return itertools.product(self.pos, self.head or (None,), self.src_pos or (None,))


@dataclass(frozen=True)
class Grid:
    """All cells of a grid.

    Attributes:
        activation: What is patched.
        axes: Names of the axes.
        values: Index values along each axis.
        regions: One region per cell, the last axis fastest.
    """

    activation: Activation
    axes: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    regions: tuple[Region, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of cells along each axis."""
        return tuple(map(len, self.values))

    @property
    def names(self) -> list[str]:
        """Every hook point that some cell touches."""
        return list(dict.fromkeys(name for region in self.regions for name in region.names))


def make_grid(
    model: Model,
    activation: str,
    axes: Sequence[str],
    n_pos: int,
    window: int = 1,
    where: Mapping[str, Selection] | None = None,
    layout: LoopLayout | None = None,
) -> Grid:
    """Lay out a grid over an activation; nothing is run.

    Args:
        model: A looped model or a plain HookedTransformer.
        activation: Shorthand, see :func:`tl_loops.runs.activations.find_activation`.
        axes: One name an axis of the result.
        n_pos: Number of positions of the prompt.
        window: Cell t covers iterations (or blocks) t to t + window - 1.
        where: Index values to which an axis, named or not, is restricted.
        layout: Of the run, where it had another number of iterations than the model has now.

    Raises:
        ValueError: Unknown or unsuitable activation, axis or window.
        IndexError: A value in ``where`` is out of range.
    """
    found = find_activation(model, activation)
    layout = layout_of(model) if layout is None else layout
    axes = _checked_axes(layout, found, axes)
    where = {_SYNONYMS.get(axis, axis): chosen for axis, chosen in (where or {}).items()}
    _checked_axes(layout, found, list(where), "where")
    ranges = _ranges(model, layout, found, axes, n_pos, where)
    values = {axis: distinct_indices(axis, size, where.get(axis)) for axis, size in ranges.items()}
    cells: dict[str, list[tuple[int, ...]]] = {
        axis: [(value,) for value in values[axis]] for axis in axes
    }
    if window != 1:
        _check_window(window, axes)
        axis = "iteration" if "iteration" in axes else "block"
        cells[axis] = _windows(axis, values[axis], window)

    regions = []
    for chosen in itertools.product(*(cells[axis] for axis in axes)):
        at = dict(zip(axes, chosen, strict=True))
        cover = {axis: at.get(axis, values[axis]) for axis in ranges}
        regions.append(
            Region(
                _hook_names(layout, found, cover),
                contiguous_parts(cover["pos"]),
                contiguous_parts(cover["head"]) if "head" in cover else None,
                contiguous_parts(cover["src_pos"]) if "src_pos" in cover else None,
            )
        )
    named = tuple(tuple(part[0] for part in cells[axis]) for axis in axes)
    return Grid(found, axes, named, tuple(regions))


@checked
def axis_labels(
    model: Model,
    axes: Sequence[str],
    tokens: Int[Tensor, "*batch pos"] | None = None,
    activation: str = "resid_pre",
    window: int = 1,
    where: Mapping[str, Selection] | None = None,
) -> list[list[str]]:
    """Labels for plots, one list per axis of what ``activation_patch`` returns.

    Args:
        model: The model.
        axes: As given to it.
        tokens: The prompt (its first row gives the labels); needed for an axis of positions.
        activation: As given to :func:`tl_loops.patching.activation_patch`.
        window: As given to :func:`tl_loops.patching.activation_patch`.
        where: As given to :func:`tl_loops.patching.activation_patch`.

    Returns:
        ``"r3"`` for iterations (``"r3-r4"`` for windows), ``"l1"`` for layers, ``layout.label`` for
        blocks, ``"H2"`` for heads, and the token with its position (``"the_4"``) or the position.

    Raises:
        ValueError: As ``activation_patch``; or an axis of positions without tokens.
    """
    positional = {"pos", "src_pos", "dest_pos"} & set(axes)
    if positional and tokens is None:
        raise ValueError("an axis of positions is labelled by tokens: pass tokens=[batch, pos]")
    if tokens is not None:
        tokens = token_ids(model, tokens)
    n_pos = 1 if tokens is None else tokens.shape[-1]
    grid = make_grid(model, activation, axes, n_pos, window, where)
    words = [str(position) for position in range(n_pos)]
    if tokens is not None and getattr(model, "tokenizer", None) is not None:
        row = tokens.reshape(-1, n_pos)[0]
        words = [f"{word}_{i}" for i, word in enumerate(model.to_str_tokens(row))]
    layout = layout_of(model)

    def label(axis: str, value: int) -> str:
        if axis in ("pos", "src_pos"):
            return words[value]
        if axis == "block" and layout is not None:
            return layout.label(value)
        return {"iteration": "r", "layer": "l", "block": "b", "head": "H"}[axis] + str(value)

    labels = [
        [label(axis, v) for v in values]
        for axis, values in zip(grid.axes, grid.values, strict=True)
    ]
    if window != 1:
        at = grid.axes.index("iteration" if "iteration" in grid.axes else "block")
        axis = grid.axes[at]
        labels[at] = [f"{label(axis, v)}-{label(axis, v + window - 1)}" for v in grid.values[at]]
    return labels


def _checked_axes(
    layout: LoopLayout | None, activation: Activation, axes: Sequence[str], what: str = "axes"
) -> tuple[str, ...]:
    if isinstance(axes, str):
        axes = (axes,)
    axes = tuple(_SYNONYMS.get(axis, axis) for axis in axes)
    suitable = [a for a in activation.axes if layout is not None or a != "iteration"]
    for axis in axes:
        if axis not in AXES:
            raise ValueError(f"unknown axis {axis!r} in {what}: choose among {', '.join(suitable)}")
        if axis not in suitable:
            reason = (
                "a model without a loop has no iterations"
                if axis == "iteration" and axis in activation.axes
                else f"activation {activation.name!r} has no axis {axis!r}"
            )
            raise ValueError(f"{reason}: choose {what} among {', '.join(suitable)}")
    if len(set(axes)) != len(axes):
        raise ValueError(f"{what} names an axis twice: {', '.join(axes)}")
    if "block" in axes and {"iteration", "layer"} & set(axes):
        raise ValueError(
            f"{what} mixes 'block' with 'iteration' or 'layer', which name the same depth: give "
            "either 'block' (all unrolled blocks) or iteration and layer (the core)"
        )
    return axes


def _ranges(
    model: Model,
    layout: LoopLayout | None,
    activation: Activation,
    axes: tuple[str, ...],
    n_pos: int,
    where: Mapping[str, Any],
) -> dict[str, int]:
    """Size of every axis in use; the depth is either 'block' or 'iteration' and 'layer'."""
    used = {*axes, *where}
    ranges: dict[str, int] = {}
    if activation.kind == "iteration":
        assert layout is not None
        ranges["iteration"] = layout.n_iterations
    elif activation.kind != "run":
        by_core = bool({"iteration", "layer"} & used)
        if by_core and "block" in used:
            raise ValueError(
                "'block' excludes 'iteration' and 'layer', in axes and where: both name the depth"
            )
        if layout is not None and by_core:
            ranges |= {"iteration": layout.n_iterations, "layer": layout.n_core}
        else:
            n_layers = model.cfg.n_layers if layout is None else layout.n_layers
            ranges["layer" if by_core else "block"] = n_layers
    ranges["pos"] = n_pos
    heads = activation.n_heads(model.cfg)
    if heads is not None:
        ranges["head"] = heads
    if activation.kind == "pattern":
        ranges["src_pos"] = n_pos
    return ranges


def _check_window(window: int, axes: tuple[str, ...]) -> None:
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be an integer of at least 1, got {window!r}")
    if "iteration" not in axes and "block" not in axes:
        raise ValueError("a window slides along 'iteration' or 'block': name one of them in axes")


def _windows(axis: str, values: tuple[int, ...], window: int) -> list[tuple[int, ...]]:
    if window > len(values):
        raise ValueError(f"window={window} is longer than the {axis} axis, which has {len(values)}")
    if values[-1] - values[0] != len(values) - 1 or list(values) != sorted(values):
        raise ValueError(
            f"a window slides over neighbours, but the selection of {axis} is {list(values)}: "
            "give a range"
        )
    return [values[first : first + window] for first in range(len(values) - window + 1)]


def _hook_names(
    layout: LoopLayout | None, activation: Activation, cover: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    if activation.kind == "run":
        return (activation.hook_name(),)
    if activation.kind == "iteration":
        return tuple(activation.hook_name(t) for t in cover["iteration"])
    blocks = cover.get("block")
    if blocks is None:
        blocks = cover["layer"]
        if layout is not None:
            blocks = tuple(
                layout.index(iteration=t, layer=layer)
                for t in cover["iteration"]
                for layer in cover["layer"]
            )
    return tuple(activation.hook_name(block) for block in blocks)
