"""Scores: exact ones are path patching and the loss without the edge; folded ones, gradients."""

import pytest
import torch

from tests.closeness import assert_close
from tests.unit.circuits.made import HEADS, SPLIT, TOKENS, WHOLE, made, metric
from tl_loops import LoopedSemanticsError
from tl_loops.attribution import edge_attribution
from tl_loops.circuits import Circuit, EdgeGraph, faithfulness, score
from tl_loops.circuits.graph import folded_label
from tl_loops.patching import Site, path_patch

torch.set_num_threads(1)


def scores_of(model, reference, rest="paired", **options):
    return score(model, TOKENS, metric, rest, reference, progress=False, **options)


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "options", "rest"),
    [
        ("ouro", WHOLE, "zero"),
        ("huginn", WHOLE, "mean"),
        ("olmo_grouped", WHOLE, "paired"),
        ("weightless", SPLIT, "paired"),
        ("nanochat", SPLIT, "mean"),
    ],
)
def test_exact_scores_are_what_the_metric_loses_without_the_edge(architecture, options, rest):
    model, cache = made(architecture, n_iterations=2)
    cache = None if rest == "zero" else cache
    scores = scores_of(model, cache, rest, by="exact", **options)
    graph = scores.graph
    every = graph.exists.nonzero()
    some = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:30]]
    whole = Circuit.whole(graph)
    circuits = []
    for s, r in some.tolist():
        edge = torch.zeros_like(whole.kept)
        edge[s, r] = True
        circuits.append(whole.without(edges=edge))
    runs = faithfulness(model, TOKENS, metric, circuits, rest, cache, progress=False)
    found = scores.scores[some[:, 0], some[:, 1]]
    assert_close(found, runs.full - runs.metrics, atol=1e-5, rtol=1e-5, size=1.0)
    assert found.abs().max() > 1e-2


@torch.no_grad()
def test_exact_score_of_an_edge_is_path_patching():
    model, cache = made("retrofitted", n_iterations=2)
    scores = scores_of(model, cache, by="exact", heads=True)
    at = {c.label: s for s, c in enumerate(scores.senders)}
    to = {c.label: r for r, c in enumerate(scores.receivers)}
    patched = path_patch(
        model,
        TOKENS,
        cache,
        metric,
        [Site("z", iteration=0, layer=1, head=2), Site("embed")],
        [Site("z", iteration=1, layer=0, head=1), Site("mlp_out", iteration=1, layer=1), "logits"],
        progress=False,
    )
    loss = metric(model(TOKENS)) - patched
    names = ["r1.L0H1", "r1.1_mlp_out", "logits"]
    found = torch.stack(
        [
            torch.stack([scores.scores[at[sender], to[receiver]] for receiver in names])
            for sender in ("r0.L1H2", "embed")
        ]
    )
    assert_close(found, loss, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_direct_effect_on_the_logits_is_the_run_with_all_else_held():
    model, cache = made("ouro", n_iterations=2)
    _, own = model.run_with_cache(TOKENS)
    sender = "blocks.1.hook_mlp_out"
    names = [n for n in own if n.endswith(("hook_attn_out", "hook_mlp_out"))]
    hooks = [(n, lambda x, hook: (cache if hook.name == sender else own)[hook.name]) for n in names]
    expected = metric(model.run_with_hooks(TOKENS, fwd_hooks=hooks))
    site = Site("mlp_out", block=1)
    for receivers in (["logits"], [Site("resid_pre", block=3), "logits"]):
        found = path_patch(
            model, TOKENS, cache, metric, [site], receivers, progress=False, batch_size=1
        )
        assert_close(found[0, -1], expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="'logits', got 'logit'"):
        path_patch(model, TOKENS, cache, metric, [site], ["logit"])


@pytest.mark.parametrize("by", ["gradient", "integrated_inputs"])
def test_gradient_scores_are_edge_attribution_with_its_sign_turned(by):
    model, cache = made("retrofitted", n_iterations=2)
    found = scores_of(model, cache, by=by, heads=True, n_steps=3)
    expected = edge_attribution(
        model, TOKENS, cache, metric, heads=True, method=by, n_steps=3, progress=False
    )
    assert_close(found.scores, -expected.scores)
    assert found.top(3)[0][2] == -expected.top(3)[0][2]


def test_small_steps_of_the_rest_make_gradients_exact():
    """Where the rest is near, an edge's loss is its gradient."""
    model, cache = made("ouro", n_iterations=2, dtype=torch.float64)
    with torch.no_grad():
        _, own = model.run_with_cache(TOKENS)
    near = {name: own[name] + 1e-5 * (cache[name] - own[name]) for name in own}
    gradient = scores_of(model, near, by="gradient")
    exact = scores_of(model, near, by="exact")
    assert_close(gradient.scores, exact.scores, atol=1e-4, rtol=1e-3)
    assert exact.scores.abs().max() > 1e-7


def test_folded_scores_are_sums_and_exact_ones_take_all_edges_out():
    model, cache = made("huginn", n_iterations=2)
    apart = scores_of(model, cache, by="gradient", heads=True)
    folded = scores_of(model, cache, by="gradient", heads=True, folded=True)
    graph = folded.graph
    assert graph.n_edges < apart.graph.n_edges
    sums: dict = {}
    for s, r in graph.exists.nonzero().tolist():
        key = folded_label(graph.senders[s]), folded_label(graph.receivers[r])
        sums[key] = sums.get(key, 0.0) + float(apart.scores[s, r])
    assert len(sums) == graph.n_edges
    for s, r in graph.exists.nonzero().tolist():
        key = folded_label(graph.senders[s]), folded_label(graph.receivers[r])
        assert abs(float(folded.scores[s, r]) - sums[key]) < 1e-5
    with torch.no_grad():
        exact = scores_of(model, cache, by="exact", folded=True)
        s, r = exact.graph.exists.nonzero()[7].tolist()
        whole = Circuit.whole(exact.graph)
        gone = exact.graph.edge_classes == exact.graph.edge_classes[s, r]
        without = whole.without(edges=gone)
        runs = faithfulness(model, TOKENS, metric, without, "paired", cache, progress=False)
    assert_close(exact.scores[s, r], runs.full - runs.metrics[0], atol=1e-6, rtol=1e-5)


def test_refusals():
    model, cache = made("parcae", n_iterations=2)
    with pytest.raises(LoopedSemanticsError, match="value embeddings"):
        scores_of(model, cache)
    with pytest.raises(ValueError, match="by must be one of gradient"):
        scores_of(model, cache, by="grad")
    with pytest.raises(ValueError, match="needs reference="):
        scores_of(model, None, by="gradient")
    with pytest.raises(ValueError, match="lacks"):
        scores_of(model, {"hook_embed": cache["hook_embed"]}, by="gradient")
    assert EdgeGraph.of(model, **HEADS).n_edges > EdgeGraph.of(model).n_edges
