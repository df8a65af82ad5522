"""A circuit as a networkx graph and as JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import networkx
import torch
from torch import Tensor

from tl_loops.attribution.components import Component
from tl_loops.circuits.graph import EdgeGraph, folded_label
from tl_loops.errors import shortened

if TYPE_CHECKING:  # a circuit saves itself by this
    from tl_loops.circuits.circuit import Circuit

_FORMAT = "tl_loops circuit 1"
_NUMBERS = ("block", "iteration", "layer", "head")


def circuit_as_networkx(circuit: "Circuit") -> networkx.DiGraph:
    """Nodes are labels with the fields of their component, edges have a ``score``.

    An edge of ``part=True`` leads from a query, key or value to the heads that read it and send
    something. Of a folded graph, a node has no iteration and no block, and an edge has the number
    ``n`` of edges that it stands for.
    """
    graph, folded = circuit.graph, circuit.graph.folded
    found = networkx.DiGraph(n_iterations=graph.n_iterations, folded=folded)

    def add(component: Component) -> str:
        label = folded_label(component) if folded else component.label
        if label not in found:
            known = {k: v for k, v in asdict(component).items() if k != "label" and v is not None}
            for lost in ("iteration", "block", "name") if folded else ():
                if component.iteration is not None:
                    known.pop(lost, None)
            found.add_node(label, **known)
        return label

    for s, r in circuit.kept.nonzero().tolist():
        ends = add(graph.senders[s]), add(graph.receivers[r])
        if found.has_edge(*ends):
            found.edges[ends]["n"] += 1
            continue
        known: dict[str, Any] = {"n": 1} if folded else {}
        if circuit.scores is not None:
            known["score"] = float(circuit.scores[s, r])
        found.add_edge(*ends, **known)
    # A head is joined to what it reads, where that is told apart.
    reads, sends = circuit.kept.any(0), circuit.kept.any(1)
    for r, s in graph.feeds.nonzero().tolist():
        if reads[r] and sends[s] and graph.receivers[r].label != graph.senders[s].label:
            found.add_edge(add(graph.receivers[r]), add(graph.senders[s]), part=True)
    return found


def circuit_as_json(circuit: "Circuit") -> str:
    """JSON text: the graph's components, and every edge that has a score or is kept."""
    graph, scores = circuit.graph, circuit.scores
    edges = []
    for s, r in (graph.exists if scores is not None else circuit.kept).nonzero().tolist():
        edge: dict[str, Any] = {"from": graph.senders[s].label, "to": graph.receivers[r].label}
        if scores is not None:
            score = float(scores[s, r])
            edge["score"] = score if math.isfinite(score) else None
        edges.append({**edge, "kept": bool(circuit.kept[s, r])})
    content = {
        "format": _FORMAT,
        "n_iterations": graph.n_iterations,
        "folded": graph.folded,
        "parallel": graph.parallel,
        "dtype": None if scores is None else str(scores.dtype).removeprefix("torch."),
        "senders": [_component_fields(c) for c in graph.senders],
        "receivers": [_component_fields(c) for c in graph.receivers],
        "edges": edges,
    }
    return json.dumps(content, indent=1)


def circuit_of_json(text: str) -> tuple[EdgeGraph, Tensor, Tensor | None]:
    """The graph, the kept edges and the scores of :func:`circuit_as_json`.

    Raises:
        ValueError: The text is no such circuit.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error}") from None
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise ValueError(f"its format is {shortened(found)}, expected {_FORMAT!r}")
    try:
        graph = EdgeGraph(
            _components(content["senders"]),
            _components(content["receivers"]),
            _whole_number(content["n_iterations"]),
            bool(content["folded"]),
            bool(content["parallel"]),
        )
        kept = torch.zeros_like(graph.exists)
        scores = None
        if content["dtype"] is not None:
            dtype = {"float32": torch.float32, "float64": torch.float64}[content["dtype"]]
            scores = torch.zeros(kept.shape, dtype=dtype)
        sent = {c.label: s for s, c in enumerate(graph.senders)}
        read = {c.label: r for r, c in enumerate(graph.receivers)}
        for edge in content["edges"]:
            s, r = sent[edge["from"]], read[edge["to"]]
            kept[s, r] = edge["kept"] is True
            if scores is not None:
                scores[s, r] = math.nan if edge["score"] is None else float(edge["score"])
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"it lacks or misspells {error}") from None
    return graph, kept, scores


def _component_fields(component: Component) -> dict[str, Any]:
    return {name: value for name, value in asdict(component).items() if value is not None}


def _components(rows: Sequence[Mapping[str, Any]]) -> tuple[Component, ...]:
    known = {field.name for field in fields(Component)}
    for row in rows:
        unknown = set(row) - known
        if unknown:
            raise ValueError(f"a component has the unknown field {sorted(unknown)[0]!r}")
        for name in _NUMBERS:
            if name in row:
                _whole_number(row[name])
    return tuple(Component(**row) for row in rows)


def _whole_number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"expected a whole number, got {shortened(value)}")
    return value
