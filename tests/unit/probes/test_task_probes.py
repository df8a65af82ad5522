"""Task probes: closed forms and laws on made states, and one hop per iteration on the model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.closeness import assert_close
from tl_loops import LoopedTransformer, probes, tasks
from tl_loops.metrics.linear_probes import (
    area_under_roc,
    fit_linear_probes,
    wilson_interval,
)
from tl_loops.probes import PromptStates, TaskProbes, gather_states, task_probes

torch.set_num_threads(1)

N, WIDTH = 120, 10


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels_of(n_classes=3, n=N):
    return [i % n_classes for i in range(n)]


def made(n_classes=3, distance=6.0, T=2, n_layers=2):
    """States whose class moves them along a direction of its own, another one per iteration."""
    noise = randn(0, T, n_layers, N, WIDTH)
    ids = torch.tensor(labels_of(n_classes))
    for t in range(T):
        noise[t] += distance * torch.eye(WIDTH)[ids + t * n_classes]
    return PromptStates.of(noise)


# --- the fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [4, 40])
def test_ridge_is_where_the_gradient_of_its_loss_is_zero(width):
    """Both systems of equations, with fewer and with more samples than dimensions."""
    x = randn(1, 20, width).double()
    y = torch.tensor([labels_of(3, 20), labels_of(2, 20)])
    weight, bias = fit_linear_probes(x, y, 3, "ridge", ridge=0.1)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    for i in range(2):
        w = (weight[i] * x.std(0, correction=0)).requires_grad_()
        b = (bias[i] + weight[i] @ x.mean(0)).requires_grad_()
        target = torch.nn.functional.one_hot(y[i], 3)
        loss = (target - z @ w.T - b).square().sum(-1).mean() + 0.1 * w.square().sum()
        for gradient in torch.autograd.grad(loss, (w, b)):
            assert gradient.abs().max() < 1e-10


def test_logistic_is_where_the_gradient_of_its_loss_is_zero():
    x = randn(2, 60, 5).double()
    y = torch.tensor([labels_of(3, 60)])
    weight, bias = fit_linear_probes(x, y, 3, "logistic", ridge=0.05)
    std = x.std(0, correction=0)
    z, w = (x - x.mean(0)) / std, (weight[0] * std).requires_grad_()
    b = (bias[0] + weight[0] @ x.mean(0)).requires_grad_()
    loss = torch.nn.functional.cross_entropy(z @ w.T + b, y[0]) + 0.025 * w.square().sum()
    for gradient in torch.autograd.grad(loss, (w, b)):
        assert gradient.abs().max() < 1e-4


def test_features_that_do_not_vary_have_no_weight():
    x = randn(3, 30, 4)
    x[:, 1] = 7.0
    x[:, 2] = 1000 + 1e-5 * randn(4, 30)  # rounding
    weight, bias = fit_linear_probes(x, torch.tensor([labels_of(2, 30)]), 2)
    assert not weight[..., 1:3].any() and weight.isfinite().all() and bias.isfinite().all()


def test_the_interval_is_wilsons():
    one, third = torch.tensor([1.0, 0.3], dtype=torch.float64)
    low, high = wilson_interval(one, 100)
    z = 1.959963984540054
    assert_close(low, torch.tensor(100 / (100 + z * z), dtype=torch.float64))
    assert float(high) == 1.0
    # The ends solve (p - x)^2 = z^2 x (1 - x) / n.
    ends = wilson_interval(third, 40)
    assert_close((third - ends).square(), z * z * ends * (1 - ends) / 40)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-3, 3), min_size=1), st.lists(st.integers(-3, 3), min_size=1))
def test_the_area_is_that_of_all_pairs(positive, negative):
    a, b = torch.tensor(positive).double(), torch.tensor(negative).double()
    expected = ((a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()).mean()
    assert_close(area_under_roc(a, b), expected)


# --- probes of made states -----------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["ridge", "logistic"])
def test_separable_classes_are_read_and_shuffled_ones_are_not(fit):
    found = task_probes(made(), labels_of(), fit=fit)
    assert (found.accuracy == 1).all() and (found.train_accuracy == 1).all()
    assert abs(float(found.control.mean()) - 1 / 3) < 0.05
    assert found.controls.shape == (10, 2, 2) and found.n_train == 84
    assert_close(found.selectivity, 1 - found.control)
    assert found.majority == 1 / 3
    assert found.interval()[0, 0, 0] == wilson_interval(torch.tensor(1.0), 36)[0]


def test_noise_is_read_at_chance():
    found = task_probes(PromptStates.of(randn(5, 2, 2, 2000, 4)), labels_of(2, 2000))
    assert (found.accuracy - 0.5).abs().max() < 0.06
    assert (found.selectivity).abs().max() < 0.06
    interval = found.interval(0.999)
    assert (interval[..., 0] < 0.5).all() and (interval[..., 1] > 0.5).all()


def test_transfer_has_the_accuracy_on_its_diagonal():
    """Where each iteration has a direction of its own, a probe is right at its own alone."""
    found = task_probes(made(distance=4.0), labels_of())
    assert torch.equal(found.transfer.diagonal().T, found.accuracy)
    assert found.transfer[0, 1].max() < 0.6
    same = PromptStates.of(made().values[:1].expand(2, -1, -1, -1).clone())
    assert (task_probes(same, labels_of()).transfer == 1).all()


def test_a_permutation_of_the_prompts_changes_nothing():
    states, labels = made(distance=1.0), labels_of()
    train = torch.arange(N) % 4 != 0
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    moved = states.rows(order.tolist())
    a = task_probes(states, labels, train=train)
    b = task_probes(moved, [labels[i] for i in order], train=train[order])
    assert_close(b.weight, a.weight)
    assert torch.equal(a.accuracy, b.accuracy) and torch.equal(a.transfer, b.transfer)
    assert 0.4 < a.accuracy.mean() < 0.95  # so that something could have changed


def test_shifting_and_scaling_the_states_changes_nothing():
    states, labels = made(distance=1.0), labels_of()
    a = task_probes(states, labels)
    moved = PromptStates.of(states.values.double() * 50 - 300)
    b = task_probes(moved, labels)
    assert_close(b.weight * 50, a.weight, rtol=1e-4, atol=1e-6)
    assert torch.equal(a.predictions, b.predictions)


def test_predictions_are_those_of_the_weights():
    states, labels = made(distance=1.0), labels_of()
    found = task_probes(states, labels)
    assert torch.equal(found.predict(states)[..., found.held_out], found.predictions)
    named = task_probes(states, ["abc"[i] for i in labels])
    assert named.classes == ("a", "b", "c") and torch.equal(named.predictions, found.predictions)
    flags = task_probes(states, torch.tensor(labels) == 0)
    assert flags.classes == (False, True)
    with pytest.raises(ValueError, match="layers"):
        found.predict(made(n_layers=1))


def test_a_constant_state_gives_the_majority():
    labels = [0] * 80 + [1] * 40
    states = PromptStates.of(torch.full((1, 1, N, 3), 2.0))
    found = task_probes(states, labels)
    assert float(found.accuracy) == found.majority == pytest.approx(2 / 3)


def test_calls_are_the_same_twice_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    a, b = (task_probes(made(distance=1.0), labels_of(), seed=4) for _ in range(2))
    assert torch.equal(a.controls, b.controls) and torch.equal(a.weight, b.weight)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(a.held_out, task_probes(made(), labels_of(), seed=5).held_out)


def test_tables_files_and_repr(tmp_path):
    found = task_probes(made(), ["abc"[i] for i in labels_of()])
    frame = found.to_frame()
    assert frame["point"].tolist() == ["r0.0", "r0.1", "r1.0", "r1.1"]
    assert (frame["low"] < frame["accuracy"]).all() and (frame["high"] == 1).all()
    pairs = found.transfer_to_frame().set_index(["fitted", "tested", "layer"])["accuracy"]
    assert pairs[0, 1, 1] == float(found.transfer[0, 1, 1])
    path = tmp_path / "probes.safetensors"
    found.save(path)
    loaded = TaskProbes.load(path)
    assert loaded.classes == found.classes and loaded.points == found.points
    assert torch.equal(loaded.predictions, found.predictions)
    pd = pytest.importorskip("pandas")
    pd.testing.assert_frame_equal(loaded.to_frame(), frame)
    assert len(repr(found)) < 900 and "weight: [2, 2, 3, 10]" in repr(found)
    with pytest.raises(ValueError, match="expected 'concept_directions'"):
        probes.ConceptDirections.load(path)


# --- what raises ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        ([1] * N, "at least two classes"),
        (labels_of()[1:], f"got {N} prompts but {N - 1} labels"),
        ([math.nan, *labels_of()[1:]], "label 0 is NaN"),
        ([0.5, *labels_of()[1:]], "label 0 is 0.5"),
        ([None, *labels_of()[1:]], "label 0 is None"),
        (["a", *labels_of()[1:]], "mixes int, str"),
        ([9, *labels_of()[1:]], "class 9 has a single prompt"),
        ("a" * N, "must be a list"),
        (torch.zeros(N, 2), "expected text, an integer"),
    ],
)
def test_labels_that_are_none(labels, match):
    with pytest.raises(ValueError, match=match):
        task_probes(made(), labels)


def test_splits_that_cannot_be_used():
    train = torch.ones(N, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"0 prompt\(s\) held out are fewer than the 3 classes"):
        task_probes(made(), labels_of(), train=train)
    train[:2] = False
    with pytest.raises(ValueError, match="fewer than the 3 classes"):
        task_probes(made(), labels_of(), train=train)
    with pytest.raises(ValueError, match="no prompt of class 1"):
        task_probes(made(), labels_of(), train=torch.tensor(labels_of()) != 1)
    with pytest.raises(ValueError, match="one boolean for each of 120 prompts"):
        task_probes(made(), labels_of(), train=train[1:])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ridge": 0.0}, "ridge must be positive"),
        ({"train_fraction": 1.0}, "train_fraction must be between"),
        ({"n_shuffles": 0}, "n_shuffles must be at least 1"),
        ({"fit": "lasso"}, "fit must be"),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        task_probes(made(), labels_of(), **options)


def test_states_that_are_not_finite_or_do_not_fit():
    values = made().values.clone()
    values[1, 0, 7, 2] = math.inf
    with pytest.raises(ValueError, match=r"prompt 7 at r1\.0 holds NaN or inf"):
        task_probes(PromptStates.of(values), labels_of())
    with pytest.raises(ValueError, match="confidence must be between"):
        task_probes(made(), labels_of()).interval(1.0)
    with pytest.raises(ValueError, match="values must be"):
        PromptStates(values, "x", (0,), (0,), ("a",), (0,))


# --- the embedded model --------------------------------------------------------------------------


def test_each_hop_is_read_from_the_iteration_that_takes_it():
    """One hop per iteration: the person after hop k + 1 is in the state from iteration k on."""
    model = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny", n_iterations=4)
    prompts = [
        *tasks.fact_chain_prompts(320, n_hops=3, seed=1, split="train"),
        *tasks.fact_chain_prompts(100, n_hops=3, seed=1),
    ]
    train = torch.arange(len(prompts)) < 320  # other groups of people are held out
    states = gather_states(
        model, [p.text for p in prompts], "state_out", batch_size=140, progress=False
    )
    for hop in range(3):
        found = task_probes(states, [p.hops[hop] for p in prompts], train=train)
        assert (found.control < 0.12).all() and found.majority < 0.12
        accuracy = found.accuracy[:, 0]
        assert (accuracy[:hop] < 0.35).all() and accuracy[hop] > 0.9
