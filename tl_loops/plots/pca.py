"""Latent trajectories in the plane (or space) of their principal components."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.drawing.colours import MUTED, iteration_colours
from tl_loops.drawing.depth import PHASES, block_groups, block_values
from tl_loops.drawing.draw import draw
from tl_loops.drawing.figure import Axis, Figure, Line, Mark, Panel, as_array, every_few
from tl_loops.drawing.subject import Subject, subject_of
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.metrics.pca import PCATrajectory, pca_trajectory, random_walk_null
from tl_loops.upstream import Cache, PromptsShown


@checked
def plot_pca(
    source: Cache | Tensor | PCATrajectory,
    n_components: int = 2,
    *,
    null: bool = True,
    seed: int = 0,
    position: int = -1,
    row: int = 0,
    model: Model | str | None = None,
    prompts: PromptsShown | None = None,
    title: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """The path of one token's residual stream through the blocks (arXiv 2604.11791, App. D.3).

    Beside it stands a random walk with the same start and the same step lengths, under the same
    analysis: any smooth path in many dimensions shows loops in such a plane, so what both show is
    no property of the model (arXiv 1806.08805).

    Args:
        source: An activation cache with ``resid_post`` of all blocks (one token's path through
            prelude, every iteration and coda); or states [step, d_model]; or what
            :func:`tl_loops.metrics.pca_trajectory` gave for one token (then without a null).
        n_components: 2 or 3.
        null: Whether to draw the random walk.
        seed: Of the random walk.
        position: Which token of a cache; the paper takes the last.
        row: Which prompt of a cache.
        model: Model or its name, where the source is a tensor; with as many steps as the model has
            blocks, they are labelled so.
        prompts: The text, where it is known.
        title: In place of the general one.
        backend: See :func:`tl_loops.plots.draw`.
        **options: ``width``, ``height``, and what the library takes.

    Returns:
        A figure of the library.

    Raises:
        ValueError: Another number of components, several tokens, or a cache that lacks the stream.
        IndexError: The prompt has no such position.
        ImportError: The library is missing.
    """
    if n_components not in (2, 3):
        raise ValueError(f"n_components={n_components}, expected 2 or 3")
    heading = "Principal components of one token's path"
    fitted, states = None, None
    if isinstance(source, PCATrajectory):
        fitted = source
        n_steps = source.coordinates.shape[0]
        if source.coordinates.ndim != 2:
            raise ValueError(
                f"coordinates have shape {list(source.coordinates.shape)}, expected "
                "[step, component] of one token"
            )
        if source.coordinates.shape[1] < n_components:
            raise ValueError(
                f"there are {source.coordinates.shape[1]} components, expected {n_components}: "
                f"pca_trajectory(states, n_components={n_components})"
            )
    else:
        if hasattr(source, "cache_dict"):
            path = block_values(source, "resid_post", row)
            if not -path.shape[1] <= position < path.shape[1]:
                raise IndexError(f"no position {position}: the prompt has {path.shape[1]} tokens")
            heading += f" (position {position % path.shape[1]} of {path.shape[1]})"
            states = path[:, position]
        else:
            states = source
        if not isinstance(states, Tensor) or states.ndim != 2:
            raise ValueError(
                "states must be [step, d_model] of one token, got "
                f"{list(states.shape) if isinstance(states, Tensor) else type(states).__name__}"
            )
        n_steps = states.shape[0]
    subject = subject_of(source, model=model, prompts=prompts)
    places = _places(subject, n_steps)
    if subject.n_iterations is None and places is None:
        subject = subject_of(source, model=model, prompts=prompts, n_iterations=n_steps)

    note = _why_not(states, n_steps)
    panels = []
    for name in ("model", "random walk (null)") if null and fitted is None else ("model",):
        if note:
            panels.append(Panel((), Axis("PC 1"), Axis("PC 2"), title=name, note=note))
            continue
        result = fitted
        if result is None:
            assert states is not None
            path = states if name == "model" else random_walk_null(states, seed)[0]
            result = pca_trajectory(path, n_components)
        panels.append(_panel(result, n_components, places, name))
    flat = n_components == 2
    figure = Figure(
        title or heading,
        subject.line(complete=title is None),
        tuple(panels),
        columns=len(panels),
        panel_size=(400, 360) if flat else (430, 420),
        legend="iteration",
    )
    return draw(figure, backend, **options)


def _places(subject: Subject, n_steps: int) -> LoopLayout | None:
    """The layout, if the steps are its blocks."""
    layout = subject.layout
    return layout if layout is not None and layout.n_layers == n_steps else None


def _why_not(states: Tensor | None, n_steps: int) -> str:
    if n_steps < 2:
        return "Nothing to draw: a path needs two states or more."
    if states is not None and not torch.isfinite(states).all():
        bad = int((~torch.isfinite(states)).any(-1).sum())
        return f"Nothing to draw: {bad} of {n_steps} states are not finite (NaN or infinite)."
    return ""


def _panel(result: PCATrajectory, n_components: int, layout: LoopLayout | None, name: str) -> Panel:
    at = as_array(result.coordinates)[:, :n_components]
    ratio = as_array(result.explained_variance_ratio)[:n_components]
    labels = [str(t) for t in range(len(at))] if layout is None else layout.labels()
    marks: list[Mark] = [_points(at, range(len(at)), "path", MUTED, (), joined=True)]
    for group, colour, members, symbol, named in _groups(layout, len(at)):
        hover = [labels[i] for i in members]
        marks.append(_points(at, members, group, colour, hover, symbol=symbol, named=named))
    axes = [
        Axis(f"PC {i + 1} ({100 * r:.0f}% of variance)" if np.isfinite(r) else f"PC {i + 1}")
        for i, r in enumerate(ratio)
    ]
    return Panel(tuple(marks), axes[0], axes[1], axes[2] if n_components == 3 else None, name)


def _groups(layout: LoopLayout | None, n: int) -> list[tuple[str, str, list[int], Any, bool]]:
    """Points by iteration: name, colour, steps, symbol, whether the legend names them."""
    if layout is None:
        named = every_few(n)
        return [
            (f"iteration {t}", colour, [t], "circle", named(t))
            for t, colour in enumerate(iteration_colours(n))
        ]
    named = every_few(layout.n_iterations)
    ramp = iteration_colours(layout.n_iterations)
    symbols = {"prelude": "diamond", "coda": "square"}
    return [
        (name, PHASES[name], blocks, symbols[name], True)
        if t is None
        else (name, ramp[t], blocks, "circle", named(t))
        for name, t, blocks in block_groups(layout)
    ]


def _points(
    at: np.ndarray,
    members: Any,
    name: str,
    colour: str,
    hover: Any,
    joined: bool = False,
    symbol: Any = None,
    named: bool = False,
) -> Line:
    chosen = at[list(members)]
    return Line(
        chosen[:, 0],
        chosen[:, 1],
        name,
        colour,
        z=chosen[:, 2] if at.shape[1] == 3 else None,
        hover=hover,
        joined=joined,
        symbol=symbol,
        width=1,
        in_legend=named,
    )
