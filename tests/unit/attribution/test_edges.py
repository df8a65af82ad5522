"""Edge attribution: derivatives of path patching, sums over edges, refusals."""

import pytest
import torch

from tests.closeness import assert_close as close
from tests.models import ARCHITECTURES, tiny_model
from tests.unit.attribution.test_activation_attribution import (
    CLEAN,
    CORRUPTED,
    clean_cache,
    curved,
    linear,
    metric,
)
from tl_loops.attribution import attribution_patch, edge_attribution

torch.set_num_threads(1)


def edges(model, cache, measure=metric, **options):
    return edge_attribution(model, CORRUPTED, cache, measure, **{"progress": False, **options})


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(name, initializer_range=0.15) for name in ARCHITECTURES}


@pytest.fixture(params=ARCHITECTURES)
def model(request, models):
    return models[request.param]


def path_patch(model, corrupted, sender, receiver, heads, value, measure):
    """The metric when the receiver alone sees ``value`` of the sender, by two runs with hooks.

    In the first every other component keeps its corrupted output, so that the sender reaches the
    receiver along the stream alone. In the second the receiver's output is replaced by the result.
    """
    writes = ("attn.hook_z", "hook_mlp_out") if heads else ("hook_attn_out", "hook_mlp_out")
    seen = {}

    def hold(x, hook):
        if hook.name == receiver.name:
            seen[hook.name] = x
        return value if hook.name == sender.name else corrupted[hook.name]

    names = [n for n in model.hook_dict if n.endswith(writes) or n == "hook_embed"]
    names += [] if not receiver.name or receiver.name in names else [receiver.name]
    logits = model.run_with_hooks(CORRUPTED, fwd_hooks=[(name, hold) for name in names])
    if not receiver.name:
        return measure(logits)
    result = corrupted[receiver.name].clone()
    if receiver.head is None:
        result = seen[receiver.name]
    else:
        result[:, :, receiver.head] = seen[receiver.name][:, :, receiver.head]
    return measure(
        model.run_with_hooks(CORRUPTED, fwd_hooks=[(receiver.name, lambda x, hook: result)])
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("heads", [False, True])
def test_scores_are_derivatives_of_path_patching(architecture, heads):
    model = tiny_model(architecture, n_iterations=2, initializer_range=0.15, dtype=torch.float64)
    clean, corrupted = clean_cache(model), clean_cache(model, CORRUPTED)
    result = edges(model, clean, curved, heads=heads, split_qkv=heads)
    eps = 1e-5
    n_blocks = model.cfg.n_layers
    pairs = [
        (s, r)
        for s, sender in enumerate(result.senders)
        for r, receiver in enumerate(result.receivers)
        if (sender.block, receiver.block) in ((None, 1), (0, 0), (1, n_blocks - 1), (3, None))
        and sender.head in (None, 1)
        and receiver.head in (None, 1)
    ]
    compared = 0
    with torch.no_grad():
        for s, r in pairs:
            sender, receiver = result.senders[s], result.receivers[r]
            value = corrupted[sender.name].clone()
            step = eps * (clean[sender.name] - value)
            if sender.head is not None:
                only = torch.zeros_like(step)
                only[:, :, sender.head] = step[:, :, sender.head]
                step = only
            ends = [
                path_patch(model, corrupted, sender, receiver, heads, value + sign * step, curved)
                for sign in (1, -1)
            ]
            expected = (ends[0] - ends[1]) / (2 * eps)
            close(result.scores[s, r], expected, atol=1e-7, rtol=1e-5)
            compared += bool(expected.abs() > 1e-6)
    assert compared >= 5


def test_edges_into_a_receiver_sum_to_its_attribution_in_a_linear_model(model):
    if model.cfg.value_embeddings:
        pytest.skip("what value embeddings bring has no sender")
    with linear(model):
        cache = clean_cache(model)
        result = edges(model, cache)
        into = result.scores.sum(0)
        attn = attribution_patch(model, CORRUPTED, cache, metric, "attn_out", ("block",))
        mlp = attribution_patch(model, CORRUPTED, cache, metric, "mlp_out", ("block",))
        close(into[:-1], torch.stack([attn, mlp], dim=1).flatten(), atol=1e-5, rtol=1e-3)
        with torch.no_grad():
            change = metric(model(CLEAN)) - metric(model(CORRUPTED))
        close(into[-1], change, atol=1e-5, rtol=1e-3)


def test_heads_sum_to_their_layer_in_a_linear_model(model):
    """Both ends: heads of a sender, and heads (values alone read, with a fixed pattern)."""
    with linear(model):
        cache = clean_cache(model)
        layers, heads = edges(model, cache), edges(model, cache, heads=True)
        split = edges(model, cache, heads=True, split_qkv=True)
        close(heads.by_iteration(), layers.by_iteration(), atol=1e-6, rtol=1e-4)
        close(split.by_iteration(), layers.by_iteration(), atol=1e-6, rtol=1e-4)
        reads = [receiver.kind for receiver in split.receivers]
        queries = [index for index, kind in enumerate(reads) if kind in ("query", "key")]
        assert split.scores[:, queries].abs().max() < 1e-7


def test_nothing_is_sent_backwards(models):
    result = edges(models["huginn"], clean_cache(models["huginn"]))
    order = {"embed": -1.0, "attn": 0.0, "mlp": 0.5}
    for s, sender in enumerate(result.senders):
        for r, receiver in enumerate(result.receivers[:-1]):
            sent = (sender.block or 0) + order[sender.kind]
            read = (receiver.block or 0) + order[receiver.kind]
            if sent >= read:
                assert result.scores[s, r] == 0
    assert result.scores[1:, -1].abs().min() > 0


def test_components_are_labelled_by_iteration_and_layer(models):
    result = edges(models["olmo_grouped"], clean_cache(models["olmo_grouped"]))
    labels = [sender.label for sender in result.senders]
    assert labels[:4] == ["embed", "p0_attn_out", "p0_mlp_out", "r0.0_attn_out"]
    assert [receiver.label for receiver in result.receivers] == [*labels[1:], "logits"]
    model = models["olmo_grouped"]
    split = edges(model, clean_cache(model), heads=True, split_qkv=True)
    labels = [receiver.label for receiver in split.receivers]
    # Four query heads share two key-value heads; prelude first.
    assert labels[:9] == [
        *(f"p.L0H{head}.query" for head in range(4)),
        *(f"p.L0H{head}.key" for head in range(2)),
        *(f"p.L0H{head}.value" for head in range(2)),
        "p0_mlp_out",
    ]
    assert "r2.L1H3.query" in labels and "c.L0H1.value" in labels
    assert split.senders[1].label == "p.L0H0"


def test_the_largest_edges_come_first(models):
    result = edges(models["huginn"], clean_cache(models["huginn"]))
    top = result.top(5)
    assert [abs(score) for *_, score in top] == pytest.approx(
        result.scores.abs().flatten().sort(descending=True).values[:5].tolist()
    )
    sender, receiver, score = top[0]
    s, r = result.senders.index(sender), result.receivers.index(receiver)
    assert result.scores[s, r].item() == score


def test_sums_by_iteration_hold_the_core_alone(models):
    result = edges(models["huginn"], clean_cache(models["huginn"]))
    total = result.by_iteration()
    assert total.shape == (3, 3) and total.tril(-1).abs().max() == 0
    core = slice(1 + 2 * 2, 1 + 2 * 8), slice(2 * 2, 2 * 8)
    close(total.sum(), result.scores[core].sum())


def test_integrated_over_the_inputs_the_edge_from_embedding_to_logits_is_complete():
    """In a model whose blocks add nothing, that edge is the whole model."""
    model = tiny_model("retrofitted", n_iterations=1, initializer_range=0.15)
    with torch.no_grad():
        for name, parameter in model.physical_named_parameters():
            if name.endswith(("W_O", "W_out")):
                parameter.zero_()

    def everywhere(logits):
        return logits.log_softmax(-1)[..., 3].sum()

    cache = clean_cache(model)
    result = edges(model, cache, everywhere, method="integrated_inputs", n_steps=20)
    with torch.no_grad():
        change = everywhere(model(CLEAN)) - everywhere(model(CORRUPTED))
    close(result.scores[0, -1], change, atol=1e-4, rtol=1e-3)
    one = edges(model, cache, everywhere)
    assert (one.scores[0, -1] - change).abs() > 1e-3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes_frozen_weights_and_low_precision(mode):
    model = tiny_model("huginn", initializer_range=0.15)
    cache = clean_cache(model)
    expected = edges(model, cache).scores
    model.requires_grad_(False)
    with mode():
        inside = edges(model, model.run_with_cache(CLEAN)[1])
        close(inside.scores, expected)
    low = tiny_model("huginn", initializer_range=0.15, dtype=torch.bfloat16)
    scores = edges(low, clean_cache(low)).scores
    assert scores.dtype == torch.float32 and scores.isfinite().all()


def test_cache_and_model_are_left_alone(models):
    model = models["ouro"]
    cache = clean_cache(model)
    before = {name: value.clone() for name, value in cache.items()}
    edges(model, cache, heads=True)
    assert all(torch.equal(cache[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(point._forward_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"split_qkv": True}, ValueError, "also pass heads=True"),
        ({"measure": lambda logits: logits.argmax()}, ValueError, "no gradient"),
        ({"n_steps": 0, "method": "integrated_inputs"}, ValueError, "at least 1"),
        ({"axes": ("block",)}, TypeError, "unknown argument 'axes'"),
    ],
)
def test_bad_arguments_are_refused_before_any_pass(models, options, error, message):
    model, passes = models["huginn"], []
    cache = clean_cache(model)
    with model.hooks(fwd_hooks=[("hook_embed", lambda x, hook: passes.append(1))]):
        with pytest.raises(error, match=message):
            edges(model, cache, **options)
    assert not passes


def test_caches_and_models_that_do_not_fit_are_refused(models):
    model = models["huginn"]
    with torch.no_grad():
        _, partial = model.run_with_cache(CLEAN, names_filter=lambda n: n.endswith("attn_out"))
    with pytest.raises(ValueError, match="lacks 'hook_embed'"):
        edges(model, partial)
    with pytest.raises(TypeError, match="no loop layout"):
        edges(torch.nn.Linear(2, 2), partial)
