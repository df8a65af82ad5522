"""Running pruned graphs: the identities at both ends, by hand in between, and refusals."""

from typing import Any

import pytest
import torch

from tests.closeness import assert_close
from tests.models import ARCHITECTURES, MECHANISMS, STACKS
from tests.unit.circuits.made import (
    HEADS,
    REFERENCE,
    SPLIT,
    TOKENS,
    WHOLE,
    drawn,
    made,
    metric,
)
from tl_loops import LoopedSemanticsError
from tl_loops.circuits import Circuit, EdgeGraph, faithfulness
from tl_loops.circuits.pruned import rest_values

torch.set_num_threads(1)
SHAPE = (TOKENS.shape[0], TOKENS.shape[1])


def run(model, circuits, rest="paired", reference=None, measure=metric, **options):
    return faithfulness(
        model, TOKENS, measure, circuits, rest, reference, progress=False, **options
    )


@torch.no_grad()
@pytest.mark.parametrize("options", [WHOLE, SPLIT], ids=["layers", "split"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MECHANISMS, *STACKS])
def test_whole_graph_is_the_model_and_empty_graph_the_reference(architecture, options):
    model, cache = made(architecture)
    if options is SPLIT and (model.cfg.attn_gate or model.cfg.qk_norm == "full"):
        options = HEADS  # queries, keys and values are not all that a head reads
    graph = EdgeGraph.of(model, **options)
    found = run(model, [Circuit.whole(graph), Circuit.empty(graph)], reference=cache)
    size = abs(found.full) + abs(found.empty)
    assert abs(found.full - float(metric(model(TOKENS)))) < 1e-6
    assert_close(found.metrics[0], torch.tensor(found.full), atol=1e-6, rtol=1e-5, size=size)
    reference = float(metric(model(REFERENCE)))
    assert abs(found.empty - reference) < 1e-5 * size
    assert_close(found.values, torch.tensor([1.0, 0.0]), atol=1e-4, rtol=1e-4)
    assert abs(found.full - found.empty) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("rest", ["zero", "mean", "resample"])
@pytest.mark.parametrize("architecture", ["ouro", "huginn"])
def test_empty_graph_is_the_run_with_every_output_replaced(architecture, rest):
    model, cache = made(architecture)
    cache = None if rest == "zero" else cache
    for options in (WHOLE, HEADS):
        graph = EdgeGraph.of(model, **options)
        values = rest_values(model, graph, rest, cache, SHAPE, seed=3)
        hooks = [(name, lambda x, hook, v=v: v.expand_as(x)) for name, v in values.items()]
        expected = metric(model.run_with_hooks(TOKENS, fwd_hooks=hooks))
        found = run(model, Circuit.empty(graph), rest, cache, seed=3)
        assert_close(found.metrics[0], expected, atol=1e-6, rtol=1e-5)


def by_hand(model, circuit, values):
    """Each component's output from a run of its own, in the order of the run."""
    graph = circuit.graph
    made_of = {c.label: s for s, c in enumerate(graph.senders)}
    outputs = {}

    def stream_of(receiver):
        """Hooks that give one receiver the stream that it reads."""
        hooks = {}
        for s, sender in enumerate(graph.senders):
            if not graph.exists[s, receiver]:
                continue
            kept = bool(circuit.kept[s, receiver])

            def write(x, hook, sender=sender, kept=kept):
                x = x.clone()
                value = outputs[sender.label] if kept else values[sender.name]
                if sender.head is None:
                    return value.expand_as(x)
                if kept:
                    x[:, :, sender.head] = value
                else:
                    x[:, :, sender.head] = values[sender.name][:, :, sender.head]
                return x

            hooks[sender.label] = (sender.name, write)
        return list(hooks.values())

    model.run_with_hooks(
        TOKENS, fwd_hooks=[("hook_embed", lambda x, hook: outputs.update(embed=x.clone()))]
    )
    for r, receiver in enumerate(graph.receivers):
        if receiver.kind == "logits":
            return metric(model.run_with_hooks(TOKENS, fwd_hooks=stream_of(r)))

        def keep(x, hook, receiver=receiver):
            part = x if receiver.head is None else x[:, :, receiver.head]
            outputs[receiver.label] = part.clone()

        # The output is kept before anything is written over it.
        model.run_with_hooks(TOKENS, fwd_hooks=[(receiver.name, keep), *stream_of(r)])
        assert receiver.label in made_of
    raise AssertionError("a graph ends with the logits")


@torch.no_grad()
@pytest.mark.parametrize("rest", ["paired", "zero"])
@pytest.mark.parametrize("options", [WHOLE, HEADS], ids=["layers", "heads"])
@pytest.mark.parametrize("architecture", ["ouro", "huginn", "olmo_grouped"])
def test_one_batched_pass_is_one_run_per_component(architecture, options, rest):
    model, cache = made(architecture, n_iterations=2)
    cache = None if rest == "zero" else cache
    graph = EdgeGraph.of(model, **options)
    values = rest_values(model, graph, rest, cache, SHAPE)
    circuits = [drawn(graph, seed) for seed in range(2)]
    found = run(model, circuits, rest, cache)
    expected = torch.stack([by_hand(model, circuit, values) for circuit in circuits])
    assert_close(found.metrics, expected, atol=1e-5, rtol=1e-5)
    assert (found.metrics - found.full).abs().min() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("options", [WHOLE, HEADS, SPLIT], ids=["layers", "heads", "split"])
def test_batch_size_changes_nothing(options):
    model, cache = made("huginn")
    graph = EdgeGraph.of(model, **options)
    circuits = [drawn(graph, seed, share) for seed, share in enumerate((0.1, 0.5, 0.9))]
    expected = run(model, circuits, reference=cache).metrics
    for batch_size in (1, 7, 40):
        found = run(model, circuits, reference=cache, batch_size=batch_size).metrics
        assert_close(found, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [WHOLE, HEADS, SPLIT], ids=["layers", "heads", "split"])
@pytest.mark.parametrize("architecture", ["retrofitted", "nanochat", "hyperloop"])
def test_edges_that_join_nothing_change_nothing(architecture, options):
    model, cache = made(architecture)
    graph = EdgeGraph.of(model, **options)
    sparse = drawn(graph, share=0.15)
    connected = sparse.connected()
    _, live = sparse.live()
    ends = Circuit(graph, sparse.kept & live)
    assert connected.n_edges <= ends.n_edges < sparse.n_edges
    found = run(model, [sparse, ends, connected], reference=cache)
    assert_close(found.metrics[1:], found.metrics[:1].expand(2), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_initial_state_that_is_drawn_is_one_for_all_runs():
    model, cache = made("retrofitted", state_seed=None)
    graph = EdgeGraph.of(model)
    found = run(model, Circuit.whole(graph), reference=cache)
    assert_close(found.metrics[0], torch.tensor(found.full), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_padding_and_exits_go_through_to_every_run():
    model, cache = made("ouro")
    graph = EdgeGraph.of(model)
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    given: list[dict[str, Any]] = [
        {"attention_mask": mask},
        {"exit_at": 1},
        {"weighted_exit": True},
    ]
    for arguments in given:
        found = run(model, Circuit.whole(graph), reference=cache, **arguments)
        expected = metric(model(TOKENS, **arguments))
        assert_close(found.metrics[0], expected, atol=1e-6, rtol=1e-5)
        assert abs(float(expected) - float(metric(model(TOKENS)))) > 1e-4


def test_nothing_keeps_a_graph():
    model, cache = made("ouro")
    found = run(model, drawn(EdgeGraph.of(model)), reference=cache)
    assert not found.metrics.requires_grad


def test_refusals():
    model, cache = made("retrofitted")
    graph = EdgeGraph.of(model)
    whole = Circuit.whole(graph)
    with pytest.raises(ValueError, match=r"rest must be 'zero', .* got 'mode'"):
        run(model, whole, "mode", cache)
    with pytest.raises(ValueError, match="needs reference="):
        run(model, whole, "mean")
    with pytest.raises(ValueError, match="needs none"):
        run(model, whole, "zero", cache)
    with pytest.raises(ValueError, match="nothing for a circuit to explain"):
        run(model, whole, reference=cache, measure=lambda logits: logits.new_zeros(()))
    with pytest.raises(ValueError, match="at least one"):
        run(model, [], reference=cache)
    with model.iterations(2), pytest.raises(ValueError, match=r"model\.iterations"):
        run(model, whole, reference=cache)
    with pytest.raises(ValueError, match="different graphs"):
        run(model, [whole, Circuit.whole(EdgeGraph.of(model, heads=True))], reference=cache)
    with model.hooks([("hook_embed", lambda x, hook: 2 * x)]):
        with pytest.raises(ValueError, match="hooks of its own"):
            run(model, whole, reference=cache)
    gated, _ = made("hrm_text")
    with pytest.raises(LoopedSemanticsError, match="gate"):
        EdgeGraph.of(gated, **SPLIT)
    with pytest.raises(LoopedSemanticsError, match="over all heads"):
        EdgeGraph.of(made("olmo_grouped")[0], **SPLIT)
    with pytest.raises(ValueError, match="heads=True"):
        EdgeGraph.of(model, split_qkv=True)
