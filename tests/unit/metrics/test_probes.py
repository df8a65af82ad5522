"""Step decodability of states that carry, lose or hide their iteration."""

import math

import pytest
import torch

from tl_loops.metrics.probes import step_decodability

torch.set_num_threads(1)

N, D = 200, 12


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shifted(n_iterations=4, distance=8.0):
    """Each iteration moves every token along its own direction."""
    return randn(0, N, D) + distance * torch.eye(n_iterations, D)[:, None]


def convergent(n_iterations=8, rho=0.2):
    """Tokens that settle: the trace of the iteration vanishes geometrically."""
    t = torch.arange(n_iterations).reshape(-1, 1, 1)
    return randn(0, N, D) + 8 * rho**t * torch.ones(D)


def hidden_by_sign():
    """Iteration 0 is at +-a, iteration 1 at +-b: no linear probe can tell."""
    sign = 2 * torch.randint(0, 2, (2, N, 1), generator=torch.Generator().manual_seed(1)) - 1
    return 3 * sign * torch.eye(2, D)[:, None] + 0.3 * randn(2, 2, N, D)


@pytest.mark.parametrize("probe", ["linear", "gated_mlp"])
def test_a_planted_direction_is_found(probe):
    result = step_decodability(shifted(), probe, n_steps=200)
    assert result.accuracy.shape == (4,) and result.accuracy.min() > 0.9
    assert result.loss < 0.3 < result.chance_loss
    assert result.chance == 0.25 and result.chance_loss == pytest.approx(math.log(4))
    assert (result.n_train, result.n_validation) == (160, 40)


def test_states_without_a_trace_stay_at_chance():
    result = step_decodability(randn(0, 4, 1000, D))
    assert result.accuracy.mean().item() == pytest.approx(0.25, abs=0.06)
    assert result.loss > 0.95 * result.chance_loss


def test_falls_to_chance_at_a_fixed_point():
    """The first iterations are known, the converged ones are guessed among themselves."""
    result = step_decodability(convergent())
    assert result.accuracy[:2].min() > 0.95
    assert result.accuracy[4:].mean() < 0.5
    assert result.confusion[4:, :2].max() < 0.05
    torch.testing.assert_close(result.confusion.sum(-1), torch.ones(8))
    torch.testing.assert_close(result.confusion.diagonal(), result.accuracy)


def test_identical_states_are_exactly_at_chance():
    result = step_decodability(randn(0, 1, N, D).expand(5, N, D))
    assert result.accuracy.sum().item() == pytest.approx(1.0)
    assert result.loss >= result.chance_loss - 1e-4


def test_the_gated_probe_sees_what_a_linear_one_cannot():
    states = hidden_by_sign()
    assert step_decodability(states).accuracy.mean() < 0.7
    assert step_decodability(states, "gated_mlp", n_steps=200).accuracy.mean() > 0.9


def test_validation_tokens_are_not_trained_on():
    """More dimensions than tokens: memorised noise must not show in the validation."""
    result = step_decodability(randn(0, 2, 40, 200), ridge=1e-6)
    assert result.train_accuracy > 0.99
    assert result.accuracy.mean() < 0.85


def test_the_split_counts_tokens():
    result = step_decodability(shifted(), train_fraction=0.5)
    assert result.n_train == result.n_validation == N // 2


@pytest.mark.parametrize("probe", ["linear", "gated_mlp"])
def test_is_a_function_of_the_seed(probe):
    states = convergent()
    first, again = (step_decodability(states, probe, seed=1, n_steps=20) for _ in range(2))
    assert first.loss == again.loss and torch.equal(first.confusion, again.confusion)
    assert step_decodability(states, probe, seed=2, n_steps=20).loss != first.loss


def test_does_not_touch_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    step_decodability(shifted(), "gated_mlp", n_steps=2)
    assert torch.equal(before, torch.get_rng_state())


def test_scale_of_a_dimension_does_not_matter():
    states = convergent()
    scaled = states * torch.logspace(-3, 3, D)
    assert step_decodability(scaled).loss == pytest.approx(step_decodability(states).loss, rel=0.02)


def test_batch_and_position_are_tokens():
    states = shifted()
    a, b = step_decodability(states), step_decodability(states.reshape(4, 10, 20, D))
    assert a.loss == b.loss


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("probe", ["linear", "gated_mlp"])
def test_trains_where_gradients_are_off(context, probe):
    with context():
        result = step_decodability(shifted() * 1, probe, n_steps=100)
    assert result.accuracy.mean() > 0.8


def test_bfloat16_is_measured_in_float32():
    result = step_decodability(shifted().bfloat16(), n_steps=50)
    assert result.accuracy.dtype == torch.float32 and result.accuracy.mean() > 0.9


def test_refuses_what_cannot_be_tested():
    with pytest.raises(ValueError, match="one iteration"):
        step_decodability(randn(0, 1, 5, D))
    with pytest.raises(ValueError, match="train_fraction"):
        step_decodability(randn(0, 3, 1, D))
    with pytest.raises(ValueError, match="NaN"):
        step_decodability(torch.full((2, 5, D), torch.nan))
