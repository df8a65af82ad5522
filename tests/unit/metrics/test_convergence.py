"""Convergence depth per token: closed forms and laws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.convergence import convergence_depth
from tl_loops.metrics.readout import divergence_from_last, successive_divergence

torch.set_num_threads(1)
few = settings(deadline=None, max_examples=25)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_contraction_closed_form():
    # x_t = x* (1 + rho^t): distance to the last (rho^t - rho^K) / (1 + rho^K), steps (1-rho) rho^t.
    rho = 0.5
    fixed_point = normal(3, 8, dtype=torch.float64)
    weights = rho ** torch.arange(12, dtype=torch.float64)
    states = (1 + weights)[:, None, None] * fixed_point
    for tolerance in (0.3, 0.01, 0.002):
        distance = (weights - weights[-1]) / (1 + weights[-1])
        expected = int((distance <= tolerance).nonzero()[0])
        depth = convergence_depth(tolerance, states=states)
        assert depth.tolist() == [expected] * 3
        steps = (weights[:-1] - weights[1:]) / (1 + weights[:-1])
        expected = int((steps <= tolerance).nonzero()[0])
        depth = convergence_depth(tolerance, states=states, against="previous")
        assert depth.tolist() == [expected] * 3


def test_coming_back_counts_only_from_the_last_return():
    states = torch.tensor([1.0, 9, 1, 1, 9, 1, 1])[:, None]
    assert convergence_depth(0, states=states).item() == 5
    assert convergence_depth(0, states=states, against="previous").item() == 5
    # An orbit that ends never settles before its last iteration.
    orbit = torch.tensor([1.0, -1] * 4)[:, None]
    for against in ("last", "previous"):
        assert convergence_depth(0.5, states=orbit, against=against).item() == 7


def test_constant_states_and_one_iteration():
    constant = normal(1, 2, 8).expand(5, 2, 8)
    for against in ("last", "previous"):
        assert convergence_depth(0, states=constant, against=against).tolist() == [0, 0]
        assert convergence_depth(0, states=constant[:1], against=against).tolist() == [0, 0]
        assert convergence_depth(0, logits=constant, against=against).tolist() == [0, 0]
        assert convergence_depth(0, logits=constant[:1], against=against).tolist() == [0, 0]


def test_zero_states():
    states = torch.zeros(4, 2, 3)
    states[1, 1, 0] = 1  # leaves zero and comes back
    assert convergence_depth(0.1, states=states).tolist() == [0, 2]
    assert convergence_depth(0.1, states=states, against="previous").tolist() == [0, 2]


@few
@given(
    seed=st.integers(0, 10_000),
    tolerances=st.tuples(st.floats(0, 2), st.floats(0, 2)),
    against=st.sampled_from(["last", "previous"]),
)
def test_a_larger_tolerance_never_converges_later(seed, tolerances, against):
    small, large = sorted(tolerances)
    values = normal(7, 5, 4, seed=seed)
    for kind in ("states", "logits"):
        late = convergence_depth(small, **{kind: values}, against=against)
        early = convergence_depth(large, **{kind: values}, against=against)
        assert (early <= late).all() and (late <= 6).all()


@few
@given(seed=st.integers(0, 10_000))
def test_logits_follow_the_divergence(seed):
    logits = normal(6, 4, 9, seed=seed)
    to_last = convergence_depth(0.5, logits=logits)
    by_step = convergence_depth(0.5, logits=logits, against="previous")
    distance, steps = divergence_from_last(logits), successive_divergence(logits)
    for token in range(4):
        t = int(to_last[token])
        assert (distance[t:, token] <= 0.5).all()
        assert t == 0 or distance[t - 1, token] > 0.5
        t = int(by_step[token])
        assert (steps[t:, token] <= 0.5).all()
        assert t == 0 or steps[t - 1, token] > 0.5


def test_half_precision_states():
    states = normal(6, 4, 8).bfloat16()
    half = convergence_depth(1.2, states=states)
    assert torch.equal(half, convergence_depth(1.2, states=states.float()))


def test_refusals():
    states = normal(4, 3)
    with pytest.raises(ValueError, match="exactly one"):
        convergence_depth(0.1)
    with pytest.raises(ValueError, match="exactly one"):
        convergence_depth(0.1, states=states, logits=states)
    with pytest.raises(ValueError, match="tolerance=-1"):
        convergence_depth(-1, states=states)
    with pytest.raises(ValueError, match="NaN"):
        convergence_depth(0.1, states=states / 0)
    with pytest.raises(ValueError, match="NaN"):
        convergence_depth(0.1, logits=states * float("nan"))
    with pytest.raises(ValueError, match="no iteration"):
        convergence_depth(0.1, states=states[:0])
