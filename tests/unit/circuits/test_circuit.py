"""The graph and its circuits as data: which edges there are, choosing, taking out, and files."""

import json

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import tiny_model
from tests.unit.circuits.made import HEADS, SPLIT, WHOLE, drawn
from tests.unit.plots.reading import BACKENDS, curves, words
from tl_loops import plots
from tl_loops.circuits import (
    Circuit,
    EdgeGraph,
    EdgeScores,
    Faithfulness,
    PartEffects,
    prune,
)
from tl_loops.circuits.graph import folded_label
from tl_loops.circuits.rows import CircuitRows

torch.set_num_threads(1)
OPTIONS = {"layers": WHOLE, "heads": HEADS, "split": SPLIT, "folded": {"folded": True}}
GRAPHS = {
    (model, name): EdgeGraph.of(tiny_model(model, n_iterations=2), **options)
    for model in ("retrofitted", "nanochat")
    for name, options in OPTIONS.items()
}


def scored(graph, seed=0):
    values = torch.randn(graph.exists.shape, generator=torch.Generator().manual_seed(seed))
    classes = graph.edge_classes
    of_class = torch.zeros(graph.n_edges)
    of_class[classes[graph.exists]] = values[graph.exists]
    values = torch.where(graph.exists, of_class[classes], 0.0)
    return EdgeScores(
        graph.senders, graph.receivers, values, graph.n_iterations, graph.folded, graph.parallel
    )


def test_edges_go_forward_and_number_as_many_as_a_formula_says():
    graph = GRAPHS["retrofitted", "layers"]  # 1 + 2 * 2 + 1 blocks of two components
    assert graph.n_edges == sum(range(1, 14)) == int(graph.exists.sum())
    split = GRAPHS["nanochat", "split"]
    # Of block b: 1 + 5 b senders come before each of 4 + 2 + 2 reads, 4 more before its MLP.
    assert split.n_edges == sum(8 * (1 + 5 * b) + (5 + 5 * b) for b in range(6)) + 31
    feeds = split.feeds
    keys = [r for r, c in enumerate(split.receivers) if c.kind == "key" and c.block == 2]
    heads = [s for s, c in enumerate(split.senders) if c.kind == "head" and c.block == 2]
    assert feeds[keys][:, heads].tolist() == [
        [True, True, False, False],
        [False, False, True, True],
    ]
    assert feeds.any(1).sum() == len(split.receivers) - 1  # all but the logits


@pytest.mark.parametrize("key", GRAPHS, ids="-".join)
@given(seed=st.integers(0, 1000), share=st.floats(0.0, 1.0))
@settings(max_examples=8, deadline=None)
def test_rows_give_every_live_component_what_it_sees(key, seed, share):
    graph = GRAPHS[key]
    circuit = drawn(graph, seed, share)
    rows = CircuitRows.of(circuit)
    _, live = circuit.live()
    assert rows.n_rows <= int(live.sum())
    for r in live.nonzero().flatten().tolist():
        before = graph.exists[:, r]
        assert torch.equal(rows.sees[rows.row_of[r]][before], circuit.kept[before, r])
    assert CircuitRows.of(Circuit.whole(graph)).n_rows == 1
    assert CircuitRows.of(Circuit.empty(graph)).n_rows == 1


@pytest.mark.parametrize("key", GRAPHS, ids="-".join)
def test_json_round_trip_and_files(key, tmp_path):
    graph = GRAPHS[key]
    for circuit in (drawn(graph), prune(scored(graph), 9)):
        found = Circuit.from_json(circuit.to_json())
        assert found.graph == graph and torch.equal(found.kept, circuit.kept)
        assert (found.scores is None) == (circuit.scores is None)
        if circuit.scores is not None and found.scores is not None:
            assert torch.equal(found.scores, circuit.scores)
    circuit.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json").to_json() == circuit.to_json()
    (tmp_path / "half.json").write_text(circuit.to_json()[:-20])
    with pytest.raises(ValueError, match=r"half\.json cannot be read"):
        Circuit.load(tmp_path / "half.json")
    content = json.loads(circuit.to_json())
    for damage in (
        {"format": "other"},
        {"senders": [{"label": 3, "what": 1}]},
        {"n_iterations": -1},
        {"edges": [{"from": "nobody", "to": "logits", "kept": True, "score": 0.0}]},
        {"edges": [{"from": graph.senders[-1].label, "to": graph.receivers[0].label,
                    "kept": True, "score": 0.0}]},
        {"dtype": "int8"},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            Circuit.from_json(json.dumps({**content, **damage}))


@pytest.mark.parametrize("key", GRAPHS, ids="-".join)
def test_networkx_has_the_edges_and_their_scores(key):
    graph = GRAPHS[key]
    circuit = prune(scored(graph), 12)
    found = circuit.to_networkx()
    edges = [(a, b, d) for a, b, d in found.edges(data=True) if not d.get("part")]
    assert len(edges) == circuit.n_edges == 12
    for sender, receiver, score in circuit.edges() if not graph.folded else ():
        assert found.edges[sender.label, receiver.label]["score"] == score
        assert found.nodes[sender.label]["kind"] == sender.kind
    if graph.folded:
        assert sum(d["n"] for *_, d in edges) == len(circuit.edges())
        assert not networkx.is_directed_acyclic_graph(Circuit.whole(graph).to_networkx())
    else:
        assert networkx.is_directed_acyclic_graph(found)
    # Greedy: from every component there is a way to the logits.
    assert set(found) == {*networkx.ancestors(found, "logits"), "logits"}


@pytest.mark.parametrize("key", GRAPHS, ids="-".join)
def test_top_takes_the_largest_and_greedy_what_is_reached(key):
    graph = GRAPHS[key]
    scores = scored(graph)
    top = prune(scores, 10, "top")
    assert top.n_edges == 10
    least = scores.scores[top.kept].abs().min()
    assert scores.scores[graph.exists & ~top.kept].abs().max() <= least
    signed = prune(scores, 10, "top", signed=True)
    assert scores.scores[signed.kept].min() > 0
    previous = Circuit.empty(graph)
    for n in range(1, 12):  # each greedy circuit is the last one and the best edge into it
        circuit = prune(scores, n)
        assert circuit.n_edges == n and not (previous.kept & ~circuit.kept).any()
        into = torch.tensor([c.kind == "logits" for c in graph.receivers])
        for s in previous.kept.any(1).nonzero().flatten().tolist():
            into |= graph.feeds[:, s]
        reached = torch.isin(graph.edge_classes, graph.edge_classes[graph.exists & into])
        candidates = scores.scores[graph.exists & reached & ~previous.kept].abs().max()
        new = circuit.kept & ~previous.kept
        assert scores.scores[new].abs().max() == candidates
        previous = circuit
    assert torch.equal(prune(scores, graph.n_edges).kept, graph.exists)
    assert prune(scores, 0).n_edges == 0
    with pytest.raises(ValueError, match="n_edges must be between 0"):
        prune(scores, graph.n_edges + 1)
    with pytest.raises(ValueError, match="'top' or 'greedy'"):
        prune(scores, 3, "best")


def test_taking_out():
    graph = GRAPHS["nanochat", "split"]
    whole = Circuit.whole(graph)
    without = whole.without(iterations=-1)
    assert all(1 not in (a.iteration, b.iteration) for a, b, _ in without.edges())
    assert without.by_iteration()[1].sum() == 0 and without.by_iteration()[0, 0] > 0
    assert torch.equal(without.complement().kept, whole.kept & ~without.kept)
    no_head = whole.without("r1.L0H2")
    assert "r1.L0H2" not in {a.label for a, _, _ in no_head.edges()}
    assert "r1.L0H2.query" not in {b.label for _, b, _ in no_head.edges()}
    assert "r1.L0H1.key" in {b.label for _, b, _ in no_head.edges()}  # heads 2 and 3 share it
    assert len(whole.parts("iteration")) == 2 and len(whole.parts("layer")) == 6
    for part in ("edge", "node", "layer", "iteration"):
        masks = whole.parts(part).values()
        assert all((mask <= whole.kept).all() and mask.any() for mask in masks)
    assert len(whole.parts("edge")) == whole.n_edges
    with pytest.raises(ValueError, match=r"'r1\.L0H9'.*did you mean"):
        whole.without("r1.L0H9")
    with pytest.raises(IndexError, match="iteration 7"):
        whole.without(iterations=7)
    with pytest.raises(ValueError, match="by must be one of"):
        whole.parts("head")
    late = torch.ones_like(graph.exists)
    with pytest.raises(ValueError, match="there is no edge from"):
        Circuit(graph, late)
    with pytest.raises(ValueError, match="kept must be"):
        Circuit(graph, late[:2])
    assert repr(without).startswith(f"Circuit({without.n_edges} of {graph.n_edges} edges")


def test_area_is_that_of_a_curve_known_in_closed_form():
    """f(k) = k² at k = 0, 0.1, ..., 1: trapezoids give 1/3 + 0.1²/6."""
    n = torch.arange(11)
    found = Faithfulness(2 + 3 * (n / 10.0) ** 2, n * 4, full=5.0, empty=2.0, n_all=40)
    assert found.area == pytest.approx(1 / 3 + 0.01 / 6, rel=1e-6)
    assert found.distance == pytest.approx(1 - found.area, rel=1e-6)
    shuffled = torch.tensor([3, 0, 10, 7, 1, 2, 4, 5, 6, 8, 9])
    again = Faithfulness(found.metrics[shuffled], found.n_edges[shuffled], 5.0, 2.0, 40)
    assert again.area == pytest.approx(found.area)
    assert PartEffects(("a", "b"), torch.tensor([0.1, -0.5])).top(1) == [("b", -0.5)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key", [("nanochat", "split"), ("nanochat", "folded")])
def test_figure_has_columns_of_iterations_and_every_edge(key, backend):
    graph = GRAPHS[key]
    circuit = prune(scored(graph), 14)
    figure = plots.plot_circuit(circuit, model="mine", prompts=3, backend=backend)
    drawn_edges = [name for name in curves(figure) if "→" in name]
    assert len(drawn_edges) == 14
    text = words(figure)
    assert f"14 of {graph.n_edges}" in text and "mine" in text
    assert ("all" in text) == graph.folded
    few = plots.plot_circuit(circuit, most_edges=4, backend=backend)
    assert len([name for name in curves(few) if "→" in name]) == 4
    assert "Only the 4 of largest score" in words(few)
    assert "no edge is kept" in words(plots.plot_circuit(Circuit.empty(graph), backend=backend))
    if backend == "plotly":
        strongest = max(figure.data, key=lambda t: t.line.width or 0)
        assert "→" in strongest.name and "→" in strongest.text[1]
        sender = circuit.edges()[0][0]
        name = folded_label(sender) if graph.folded else sender.label
        assert strongest.name.startswith(name)
    with pytest.raises(ValueError, match="most_edges"):
        plots.plot_circuit(circuit, most_edges=0)
