"""A circuit: the edges of a run's graph that are kept."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

import networkx
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_loops.arguments import argument, checked, checked_fields
from tl_loops.attribution.components import Component
from tl_loops.circuits.formats import circuit_as_json, circuit_as_networkx, circuit_of_json
from tl_loops.circuits.graph import EdgeGraph, folded_label
from tl_loops.errors import did_you_mean
from tl_loops.layout.selection import Selection, distinct_indices
from tl_loops.writing import write_whole

PartKind = Literal["edge", "node", "layer", "iteration"]


@checked_fields
@dataclass(frozen=True, eq=False)
class Circuit:
    """Some edges of a graph.

    Attributes:
        graph: The graph.
        kept: Whether an edge is kept, [sender, receiver].
        scores: What each edge was chosen by, if it was, [sender, receiver].

    Raises:
        ValueError: ``kept`` or ``scores`` is not of the graph's shape, or an edge that cannot exist
            is kept.
    """

    graph: EdgeGraph
    kept: Bool[Tensor, "sender receiver"]
    scores: Float[Tensor, "sender receiver"] | None = None

    def __post_init__(self) -> None:
        expected = self.graph.exists.shape
        for name, value in (("kept", self.kept), ("scores", self.scores)):
            if value is not None and value.shape != expected:
                raise ValueError(
                    f"{name} must be [sender, receiver] = {list(expected)}, got {list(value.shape)}"
                )
        if bool((self.kept.cpu() & ~self.graph.exists).any()):
            s, r = (self.kept.cpu() & ~self.graph.exists).nonzero()[0].tolist()
            names = self.graph.senders[s].label, self.graph.receivers[r].label
            raise ValueError(f"there is no edge from {names[0]} to {names[1]}, which reads earlier")
        object.__setattr__(self, "kept", self.kept.cpu())
        if self.scores is not None:
            object.__setattr__(self, "scores", self.scores.detach().cpu())

    @classmethod
    @checked
    def whole(cls, graph: EdgeGraph) -> "Circuit":
        """The circuit of all edges."""
        return cls(graph, graph.exists.clone())

    @classmethod
    @checked
    def empty(cls, graph: EdgeGraph) -> "Circuit":
        """The circuit without any edge."""
        return cls(graph, torch.zeros_like(graph.exists))

    def __repr__(self) -> str:
        folded = "folded " if self.graph.folded else ""
        return (
            f"Circuit({self.n_edges} of {self.graph.n_edges} {folded}edges, "
            f"{len(self.nodes)} nodes, {self.graph.n_iterations} iterations)"
        )

    @property
    def n_edges(self) -> int:
        """Number of edges that are kept, all or in part; of a folded graph, of folded edges."""
        return len(self.graph.edge_classes[self.kept].unique())

    @property
    def nodes(self) -> list[str]:
        """Labels of the components that an edge touches, in the order of the run."""
        graph = self.graph
        names = [(graph._moment(c), c.label, s) for s, c in enumerate(graph.senders)]
        sends, reads = self.kept.any(1), self.kept.any(0)
        touched = {graph.senders[s].label for s in sends.nonzero().flatten().tolist()}
        touched |= {graph.node_of(r) for r in reads.nonzero().flatten().tolist()}
        found = [label for _, label, _ in names if label in touched]
        return [*found, "logits"] if "logits" in touched else found

    def edges(self) -> list[tuple[Component, Component, float | None]]:
        """The edges that are kept, those of largest score first (unfolded ones)."""
        senders, receivers, scores = self.graph.senders, self.graph.receivers, self.scores
        pairs = self.kept.nonzero().tolist()
        if scores is None:
            return [(senders[s], receivers[r], None) for s, r in pairs]
        pairs.sort(key=lambda pair: -abs(float(scores[pair[0], pair[1]])))
        return [(senders[s], receivers[r], float(scores[s, r])) for s, r in pairs]

    def by_iteration(self) -> Int[Tensor, "from_iteration to_iteration"]:
        """How many edges are kept from one iteration's components to another's."""
        n = self.graph.n_iterations
        counts = torch.zeros(n, n, dtype=torch.int64)
        for sender, receiver, _ in self.edges():
            if sender.iteration is not None and receiver.iteration is not None:
                counts[sender.iteration, receiver.iteration] += 1
        return counts

    @checked
    def parts(self, by: str) -> dict[str, Bool[Tensor, "sender receiver"]]:
        """The circuit's edges in groups, by label; an edge can be in several.

        Args:
            by: ``"edge"``: each alone (of a folded graph each folded one). ``"node"``: the edges
                that touch a component (of a folded graph, at any iteration). ``"layer"``,
                ``"iteration"``: those that touch a component there, also one outside of the core
                by ``"layer"``.

        Raises:
            ValueError: ``by`` is none of these.
        """
        if by not in get_args(PartKind):
            raise ValueError(f"by must be one of {', '.join(get_args(PartKind))}, got {by!r}")
        graph = self.graph
        if by == "edge":
            return self._edge_parts()
        groups: dict[str, Tensor] = {}
        sent = [self._group(c, by, c.label) for c in graph.senders]
        read = [self._group(c, by, graph.node_of(r)) for r, c in enumerate(graph.receivers)]
        for label in dict.fromkeys([*sent, *read]):
            if label is None:
                continue
            touches = torch.zeros_like(self.kept)
            touches[[s == label for s in sent]] = True
            touches[:, [r == label for r in read]] = True
            if bool((touches & self.kept).any()):
                groups[label] = touches & self.kept
        return groups

    def _edge_parts(self) -> dict[str, Tensor]:
        graph, parts = self.graph, {}
        name = folded_label if graph.folded else (lambda component: component.label)
        for s, r in self.kept.nonzero().tolist():
            label = f"{name(graph.senders[s])} -> {name(graph.receivers[r])}"
            if label not in parts:
                parts[label] = self.kept & (graph.edge_classes == graph.edge_classes[s, r])
        return parts

    def _group(self, component: Component, by: str, node: str) -> str | None:
        """What a component is counted under."""
        if by == "iteration":
            return None if component.iteration is None else f"iteration {component.iteration}"
        if by == "layer":
            if component.phase is None:
                return component.label
            return f"{component.phase} {component.stack or ''}{component.layer}"
        if node in ("embed", "logits"):
            return None  # without it nothing is left
        return folded_label(replace(component, label=node)) if self.graph.folded else node

    @checked
    def without(
        self,
        nodes: str | Iterable[str] = (),
        *,
        iterations: Selection | None = None,
        edges: Bool[Tensor, "sender receiver"] | None = None,
    ) -> "Circuit":
        """The circuit without some of its edges.

        Args:
            nodes: Labels of components, such as ``"r1.L0H2"``; all their edges go.
            iterations: Iterations whose components go.
            edges: Edges, such as one of :meth:`parts`.

        Raises:
            ValueError: A label that no component has.
            IndexError: There is no such iteration.
        """
        graph = self.graph
        gone = torch.zeros_like(self.kept)
        labels = argument("nodes", [nodes] if isinstance(nodes, str) else list(nodes), list[str])
        known = {c.label for c in graph.senders} | {c.label for c in graph.receivers}
        for label in labels:
            if label not in known:
                raise ValueError(f"no component is called {label!r}: {did_you_mean(label, known)}")
        at = set()
        if iterations is not None:
            at = {*distinct_indices("iteration", graph.n_iterations, iterations)}
        gone[[c.label in labels or c.iteration in at for c in graph.senders]] = True
        read = [
            {c.label, graph.node_of(r)} & {*labels} or c.iteration in at
            for r, c in enumerate(graph.receivers)
        ]
        gone[:, [bool(one) for one in read]] = True
        if edges is not None:
            gone |= edges.cpu()
        return replace(self, kept=self.kept & ~gone)

    def complement(self) -> "Circuit":
        """All edges of the graph that this circuit lacks."""
        return replace(self, kept=self.graph.exists & ~self.kept)

    def live(self) -> tuple[Bool[Tensor, "sender"], Bool[Tensor, "receiver"]]:
        """Which components can reach the logits along edges that are kept."""
        graph = self.graph
        receivers = torch.tensor([c.kind == "logits" for c in graph.receivers])
        senders = torch.zeros(len(graph.senders), dtype=torch.bool)
        # What feeds a sender comes before what it sends to.
        for s in reversed(range(len(graph.senders))):
            if bool((self.kept[s] & receivers).any()):
                senders[s] = True
                receivers |= graph.feeds[:, s]
        return senders, receivers

    def connected(self) -> "Circuit":
        """The edges that lie on a path from the embedding to the logits.

        Edges that cannot reach the logits never change a result. Edges whose sender hears nothing
        of the embedding carry no more than the rest does, where the rest is that of one other
        prompt (``rest="paired"`` or ``"resample"``), in models whose tokens enter by the embedding
        alone; with means or zeros they do.
        """
        graph = self.graph
        _, live = self.live()
        hears = torch.tensor([c.kind == "embed" for c in graph.senders])
        for r in range(len(graph.receivers)):
            if bool((self.kept[:, r] & hears).any()):
                hears |= graph.feeds[r]
        return replace(self, kept=self.kept & live & hears[:, None])

    def to_networkx(self) -> networkx.DiGraph:
        """The circuit as a graph; see :func:`tl_loops.circuits.formats.circuit_as_networkx`.

        Nodes are labels with the fields of :class:`tl_loops.attribution.Component`; an edge has its
        ``score``. A query, key or value is a node of its own with an edge of ``part=True`` to its
        head. Of a folded graph a node has no iteration, an edge the ``n`` edges that it stands for,
        and there may be circles.
        """
        return circuit_as_networkx(self)

    def to_json(self) -> str:
        """The circuit and its whole graph as JSON text, which :meth:`from_json` reads."""
        return circuit_as_json(self)

    @classmethod
    @checked
    def from_json(cls, text: str) -> "Circuit":
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: The text is not such a circuit; the message says where.
        """
        graph, kept, scores = circuit_of_json(text)
        return cls(graph, kept, scores)

    @checked
    def save(self, path: str | PathLike[str]) -> None:
        """Write :meth:`to_json` to a file, whole or not at all.

        Raises:
            FileNotFoundError: The directory does not exist.
        """
        write_whole(path, self.to_json().encode())

    @classmethod
    @checked
    def load(cls, path: str | PathLike[str]) -> "Circuit":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not such a circuit.
        """
        try:
            return cls.from_json(Path(path).read_bytes().decode())
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
