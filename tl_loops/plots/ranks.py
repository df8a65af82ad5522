"""Rank trajectories: how high a lens ranks chosen tokens, at each point or iteration."""

from typing import Any

import numpy as np

from tl_loops.arguments import checked
from tl_loops.drawing.colours import CODA, DISTINCT, PRELUDE, layer_colours
from tl_loops.drawing.draw import draw
from tl_loops.drawing.figure import Axis, Figure, Line, Mark, Panel, Rule, Span, as_array, every_few
from tl_loops.drawing.quantities import ITERATION, RANK
from tl_loops.drawing.subject import subject_of
from tl_loops.layout.model import Model
from tl_loops.lens.points import LensPoint
from tl_loops.lens.result import LensResult, point_series
from tl_loops.lens.tracking import EntityTracks
from tl_loops.upstream import PromptsShown

_MOST_LABELS = 30


@checked
def plot_ranks(
    result: LensResult | EntityTracks,
    by: str = "depth",
    *,
    model: Model | str | None = None,
    prompts: PromptsShown | None = None,
    title: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """Rank of each tracked token, 1 on top, geometric mean over prompts (arXiv 2507.02199).

    The geometric mean, because ranks have tails too heavy to average.

    Args:
        result: From a lens with ``track=...``, or of :func:`tl_loops.lens.track_entities`.
        by: ``"depth"``: one curve per token along all points. ``"layer"``: one panel per token,
            with one curve per layer over the iterations, which is how places that are not read
            alike (the
            fourth core layer of Huginn under the logit lens) are told apart.
        model: Model or its name.
        prompts: Their number or text; ``None``: as many as were read.
        title: In place of the general one.
        backend: See :func:`tl_loops.plots.draw`.
        **options: ``width``, ``height``, and what the library takes.

    Returns:
        A figure of the library.

    Raises:
        ValueError: Nothing was tracked, or unknown ``by``.
        ImportError: The library is missing.
    """
    if by not in ("depth", "layer"):
        raise ValueError(f"by={by!r}, expected 'depth' or 'layer'")
    ranks = _mean_ranks(result)
    points = result.points
    y = RANK
    n_iterations = len({p.iteration for p in points if p.iteration is not None}) or None
    if by == "depth":
        x = np.arange(len(points), dtype=np.float64)
        marks: list[Mark] = [*_phases(points), *_boundaries(points)]
        for i, (name, rank) in enumerate(ranks.items()):
            hover = [f"{p.label}: {name}, rank {r:.3g}" for p, r in zip(points, rank, strict=True)]
            colour = DISTINCT[i % len(DISTINCT)]
            marks.append(Line(x, rank, name, colour, hover=hover))
        step = max(1, -(-len(points) // _MOST_LABELS))
        ticks = tuple((i, p.label) for i, p in enumerate(points))[::step]
        axis = Axis("point of the residual stream", ticks=ticks, limits=(-0.5, len(points) - 0.5))
        panels = (Panel(tuple(marks), axis, y),)
        legend = "token"
    else:
        panels = tuple(_by_layer(name, rank, points, y) for name, rank in ranks.items())
        legend = "core layer"
    n_prompts = result.positions.shape[-1 if isinstance(result, EntityTracks) else 0]
    subject = subject_of(
        model=model,
        prompts=n_prompts if prompts is None else prompts,
        n_iterations=n_iterations,
    )
    figure = Figure(
        title or f"Rank of tokens under the {result.lens} lens".replace("lens lens", "lens"),
        subject.line(complete=title is None),
        panels,
        columns=min(2, len(panels)),
        panel_size=(640, 360) if len(panels) == 1 else (420, 320),
        legend=legend,
    )
    return draw(figure, backend, **options)


def _mean_ranks(result: LensResult | EntityTracks) -> dict[str, np.ndarray]:
    """[point] by token."""
    if isinstance(result, EntityTracks):
        mean = as_array(10 ** result.mean_log_rank())
        return {
            name: np.where(np.isfinite(row), row, np.nan)
            for name, row in zip(result.entities, mean, strict=True)
        }
    if not result.tracked:
        raise ValueError("the lens tracked no token: pass track=... to it")
    return {
        name: as_array(10 ** track.rank[:, result.real].float().log10().mean(-1))
        for name, track in result.tracked.items()
    }


def _phases(points: tuple[LensPoint, ...]) -> list[Span]:
    spans = []
    for phase, colour in (("prelude", PRELUDE), ("coda", CODA)):
        members = [i for i, p in enumerate(points) if p.phase == phase]
        if members and members[-1] - members[0] == len(members) - 1:
            spans.append(Span(members[0] - 0.5, members[-1] + 0.5, phase, colour))
    return spans


def _boundaries(points: tuple[LensPoint, ...], most: int = 40) -> list[Rule]:
    """Between points of different iterations, where an iteration has more than one."""
    at = [
        i - 0.5
        for i in range(1, len(points))
        if points[i].iteration != points[i - 1].iteration
    ]  # fmt: skip
    return [Rule(x) for x in at] if len(at) < min(most, len(points) - 1) else []


def _by_layer(name: str, rank: np.ndarray, points: tuple[LensPoint, ...], y: Axis) -> Panel:
    series = [
        (key, [(point.iteration, i) for i, point in members])
        for key, members in point_series(points).items()
        if members[0][1].iteration is not None
    ]
    named = every_few(len(series))
    marks = []
    for i, ((key, members), colour) in enumerate(
        zip(series, layer_colours(len(series)), strict=True)
    ):
        kind, _, layer = key
        label = kind.replace("_", " ") if layer is None else f"layer {layer}"
        if layer is not None and kind != "resid_post":
            label += f" {kind}"
        x = np.array([t for t, _ in members], dtype=np.float64)
        values = rank[[at for _, at in members]]
        marks.append(Line(x, values, label, colour, in_legend=named(i)))
    return Panel(tuple(marks), ITERATION, y, title=name)
