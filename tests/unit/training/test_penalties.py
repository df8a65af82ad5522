"""Penalties in closed form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.closeness import assert_close
from tests.unit.training.small import counting_corpus, small_model
from tl_loops.training import growth_penalty, jacobian_penalty, settling_penalty, training_pass


def powers(factor: float, n: int = 4) -> torch.Tensor:
    first = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    return torch.stack([first * factor**t for t in range(n)])


@given(st.floats(0.1, 10.0))
def test_geometric_growth(factor):
    assert float(growth_penalty(powers(factor))) == pytest.approx(
        max(math.log(factor), 0.0) ** 2, abs=1e-12
    )
    assert float(settling_penalty(powers(factor))) == pytest.approx((factor - 1) ** 2, abs=1e-12)


def test_a_rotation_does_not_grow_and_does_not_settle():
    angle = torch.tensor(0.3).double()
    turn = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    first = torch.tensor([[[1.0, 2.0]]]).double()
    states = torch.stack([first, first @ turn.T, first @ turn.T @ turn.T])
    assert float(growth_penalty(states)) == pytest.approx(0.0, abs=1e-20)
    chord = 2 * math.sin(0.15)
    assert float(settling_penalty(states)) == pytest.approx(chord**2)


def test_longer_states_do_not_lower_the_settling_penalty():
    """‖s_t‖ has no gradient: that of the first of two states is only through the step."""
    states = powers(2.0, 2).requires_grad_()
    settling_penalty(states).backward()
    step = states[1] - states[0]
    lengths = states[0].square().sum(-1, keepdim=True)
    assert_close(states.grad[0], (-2 * step / lengths / 6).detach())


def test_a_penalty_needs_a_step():
    for penalty in (growth_penalty, settling_penalty):
        with pytest.raises(ValueError, match="two states, got 1"):
            penalty(powers(2.0, 1))


def test_the_jacobian_of_a_linear_map():
    """Its mean over directions is ‖A‖_F² per dimension; for c times the identity c² |v|²/n."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, generator=generator).double()
    x = torch.randn(1, 1, 6, generator=generator).double().requires_grad_()
    found = [jacobian_penalty(x, x @ matrix.T, generator).item() for _ in range(3000)]
    found = torch.tensor(found)
    expected = float(matrix.square().sum()) / 6
    assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / 3000**0.5


def test_the_jacobian_of_a_loop_is_that_of_its_map_with_e_held():
    """Against all rows of the Jacobian of one iteration, at the state that entered it."""
    model = small_model(d_model=8, d_head=4, n_heads=2, d_mlp=8).double()
    tokens = counting_corpus(4)[None]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        run = training_pass(model, tokens, 3, n_gradient=1)
        _, cache = model.run_with_cache(tokens)

        def step(state):
            end = model.layout.coda_start
            return model(
                state, start_at_iteration=2, stop_at_layer=end, injection=cache["hook_injection"]
            )

        # stop_at_layer gives what enters the coda, which is the state where nothing stands between
        jacobian = torch.autograd.functional.jacobian(step, cache["iter.2.hook_state_in"])
        expected = float(jacobian.square().sum()) / 32
        generator = torch.Generator().manual_seed(0)
        found = torch.tensor(
            [
                jacobian_penalty(run.entering[2], run.states[-1], generator).item()
                for _ in range(300)
            ]
        )
    assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / 300**0.5


def test_the_jacobian_needs_a_graph():
    x = torch.ones(1, 1, 2)
    with pytest.raises(ValueError, match="gradients enabled"):
        jacobian_penalty(x, x)
    with pytest.raises(ValueError, match="does not depend"):
        jacobian_penalty(x.clone().requires_grad_(), x.clone().requires_grad_() * 2)
