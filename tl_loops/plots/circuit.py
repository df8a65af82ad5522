"""A circuit as a figure: iterations as columns, components in them, edges between."""

from collections import defaultdict
from typing import Any

import numpy as np

from tl_loops.arguments import checked
from tl_loops.attribution.components import Component
from tl_loops.circuits.circuit import Circuit
from tl_loops.circuits.graph import folded_label
from tl_loops.drawing.colours import CODA, DISTINCT, MUTED, PRELUDE, iteration_colours
from tl_loops.drawing.draw import draw
from tl_loops.drawing.figure import Axis, Figure, Line, Panel, Rule, Ticks
from tl_loops.drawing.subject import subject_of
from tl_loops.layout.coordinate import PHASES
from tl_loops.layout.model import Model
from tl_loops.upstream import PromptsShown

_HELPS, _HURTS = DISTINCT[0], DISTINCT[1]
_WIDEST = 7.0
_READS = ("query", "key", "value")


@checked
def plot_circuit(
    circuit: Circuit,
    *,
    most_edges: int = 200,
    model: Model | str | None = None,
    prompts: PromptsShown | None = None,
    title: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> Any:
    """The components of a circuit, one column per iteration, and the edges that are kept.

    Blue edges raise the metric, orange ones lower it; the wider, the more. Point at a component or
    at the middle of an edge for its name and score. Of a folded graph there is one column for all
    iterations.

    Args:
        circuit: From :func:`tl_loops.circuits.prune`.
        most_edges: How many edges are drawn at most, those of largest score.
        model: Model or its name, for the line under the title.
        prompts: Their number or text.
        title: In place of the general one.
        backend: See :func:`tl_loops.plots.draw`.
        **options: ``width``, ``height``, and what the library takes.

    Returns:
        A figure of the library.

    Raises:
        ValueError: ``most_edges`` is below 1.
        ImportError: The library is missing.
    """
    if most_edges < 1:
        raise ValueError(f"most_edges must be at least 1, got {most_edges}")
    graph, folded = circuit.graph, circuit.graph.folded
    places = _Places(circuit)
    edges: dict[tuple[str, str, str], float | None] = {}
    for sender, receiver, score in circuit.edges():
        read = receiver.kind if receiver.kind in _READS else ""
        edges.setdefault((places.name(sender), places.name(receiver), read), score)
    drawn = list(edges.items())[:most_edges]
    largest = max((abs(score) for _, score in drawn if score is not None), default=0.0)
    marks: list[Any] = [Rule(at + 0.4) for at in range(-1, places.n_columns - 2)]
    for (sender, receiver, read), score in reversed(drawn):
        marks.append(_edge(places, sender, receiver, read, score, largest))
    touching = defaultdict(list)
    for (sender, receiver, read), score in drawn:
        told = f"{sender} → {receiver}{f' ({read})' if read else ''}" + _number(score)
        touching[sender].append(told)
        touching[receiver].append(told)
    marks += [
        _nodes(places, column, heading, touching)
        for column, heading in enumerate(places.headings, start=-1)
    ]
    notes = [f"{circuit.n_edges} of {graph.n_edges} {'folded ' if folded else ''}edges."]
    if len(edges) > most_edges:
        notes.append(f"Only the {most_edges} of largest score are drawn.")
    if circuit.scores is not None:
        notes.append("Blue: the metric is lower without the edge; orange: higher.")
    columns: Ticks = tuple((x - 1, heading) for x, heading in enumerate(places.headings))
    subject = subject_of(model=model, prompts=prompts, n_iterations=graph.n_iterations)
    figure = Figure(
        title or ("The circuit, all iterations folded" if folded else "The circuit by iteration"),
        subject.line(complete=title is None),
        (
            Panel(
                tuple(marks) if edges else (),
                Axis("iteration", ticks=columns, limits=(-1.6, places.n_columns - 1.5)),
                Axis("layer and component", ticks=places.lanes, limits=(len(places.lanes), -1)),
                note="" if edges else "Nothing to draw: no edge is kept.",
            ),
        ),
        panel_size=(
            max(420, min(1500, 110 * places.n_columns)),
            max(260, min(900, 24 * len(places.lanes))),
        ),
        footnotes=(" ".join(notes),),
    )
    return draw(figure, backend, **options)


class _Places:
    """Where components stand: the iteration's column, and a lane for each kind, layer and head."""

    def __init__(self, circuit: Circuit):
        graph, self.folded = circuit.graph, circuit.graph.folded
        self.components: dict[str, Component] = {}
        for component in [*graph.senders, *graph.receivers]:
            self.components.setdefault(self.name(component), component)
        touched = {*circuit.nodes}
        of_phase: dict[str | None, list[str]] = defaultdict(list)
        for component in graph.senders:
            if component.label in touched and component.phase is not None:
                of_phase[component.phase].append(self._lane(component))
        within = [lane for phase in PHASES for lane in of_phase[phase]]
        names = ["embed", *dict.fromkeys(within), "logits"]
        self.lanes: Ticks = tuple(enumerate(names))
        self._lane_of = {name: lane for lane, name in self.lanes}
        middle = ["all"] if self.folded else [str(t) for t in range(graph.n_iterations)]
        self.headings = ["prelude", *middle, "coda"]
        self.n_columns = len(self.headings)
        depth: dict[str | None, list[int]] = defaultdict(list)
        for component in graph.senders:
            if component.layer is not None:
                depth[component.phase].append(component.layer)
        self._n_layers = {phase: max(layers) + 1 for phase, layers in depth.items()}

    def name(self, component: Component) -> str:
        """Label of the node that a component is part of."""
        label = folded_label(component) if self.folded else component.label
        return label.removesuffix(f".{component.kind}")

    def at(self, name: str) -> tuple[float, float]:
        """Place of a node."""
        c = self.components[name]
        column = self.column(c)
        if c.layer is None:
            return float(column) - (0.3 if c.kind == "embed" else -0.3), float(
                self._lane_of[c.kind]
            )
        late = 0.5 if c.kind == "mlp" else 0.0
        within = (c.layer + late) / self._n_layers[c.phase]
        return column - 0.3 + 0.6 * within, float(self._lane_of[self._lane(c)])

    def column(self, c: Component) -> int:
        """-1 for the prelude, the iteration, then the coda."""
        if c.kind == "embed" or c.phase == "prelude":
            return -1
        if c.kind == "logits" or c.phase == "coda":
            return self.n_columns - 2
        return 0 if self.folded or c.iteration is None else c.iteration

    def _lane(self, c: Component) -> str:
        part = "MLP" if c.kind == "mlp" else "attention" if c.kind == "attn" else f"H{c.head}"
        where = (
            f"{c.stack or ''}{c.layer}" if c.phase == "core" else f"{(c.phase or '')[0]}{c.layer}"
        )
        return f"{where} {part}"


def _edge(
    places: _Places, sender: str, receiver: str, read: str, score: float | None, largest: float
) -> Line:
    """One edge; its middle tells what it is."""
    (x0, y0), (x1, y1) = places.at(sender), places.at(receiver)
    share = 0.4 if score is None or not largest else abs(score) / largest
    name = f"{sender} → {receiver}" + (f" ({read})" if read else "")
    return Line(
        np.array([x0, (x0 + x1) / 2, x1]),
        np.array([y0, (y0 + y1) / 2, y1]),
        name,
        MUTED if score is None else _HELPS if score >= 0 else _HURTS,
        hover=("", name + _number(score), ""),
        symbol=None,
        width=0.6 + (_WIDEST - 0.6) * share,
        in_legend=False,
    )


def _nodes(places: _Places, column: int, heading: str, touching: dict[str, list[str]]) -> Line:
    """The components of one column that an edge touches."""
    names = [n for n in touching if places.column(places.components[n]) == column]
    at = np.array([places.at(name) for name in names]).reshape(-1, 2)
    ramp = iteration_colours(max(1, places.n_columns - 2))
    colour = PRELUDE if column < 0 else CODA if column == places.n_columns - 2 else ramp[column]
    return Line(
        at[:, 0],
        at[:, 1],
        heading,
        colour,
        hover=tuple(" | ".join([name, *touching[name][:8]]) for name in names),
        joined=False,
        in_legend=False,
    )


def _number(score: float | None) -> str:
    return "" if score is None else f": {score:.4g}"
