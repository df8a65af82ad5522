"""Norms of Jacobians and sensitivities of fixed points: linear maps have closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics import fixed_point_sensitivity, jacobian_norm, lyapunov_exponents

laws = settings(deadline=None, max_examples=15)
seeds = st.integers(0, 2**31 - 1)


def randn(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def contraction(seed, n, radius):
    """A matrix with a spectral radius, far from normal."""
    matrix = randn(seed, n, n)
    return matrix * radius / torch.linalg.eigvals(matrix).abs().max()


class TestNorm:
    @laws
    @given(seeds, st.integers(2, 7))
    def test_all_directions_give_the_exact_norm(self, seed, n):
        matrix = randn(seed, n, n)
        found = jacobian_norm(lambda x: x @ matrix.T, randn(1, n), n_probes=None)
        assert found.norm == pytest.approx(float(matrix.norm()))
        assert found.standard_error == found.norm_error == 0 and found.n_probes == n
        assert found.rms_stretch == pytest.approx(float(matrix.norm()) / n**0.5)

    def test_the_estimate_has_no_bias_and_the_error_it_says(self):
        """Many estimates: their mean is the norm, their spread the standard error they give."""
        matrix = randn(0, 5, 5)
        generator = torch.Generator().manual_seed(2)

        def step(x):
            return x @ matrix.T

        found = [jacobian_norm(step, randn(1, 5), 8, generator) for _ in range(150)]
        squares = torch.tensor([f.square for f in found])
        exact = float(matrix.square().sum())
        said = torch.tensor([f.standard_error for f in found]).square().mean().sqrt()
        assert abs(float(squares.mean()) - exact) < 4 * float(squares.std()) / 150**0.5
        # Var ||Mv||^2 = 2 ||M^T M||_F^2 for normal v.
        closed = float((2 * (matrix.T @ matrix).square().sum() / 8).sqrt())
        assert float(squares.std()) == pytest.approx(closed, rel=0.25)
        assert float(said) == pytest.approx(closed, rel=0.25)

    def test_the_generator_decides_the_draw(self):
        def step(x):
            return torch.tanh(x) * x.mean()

        def one(seed):
            return jacobian_norm(step, randn(1, 6), 3, torch.Generator().manual_seed(seed)).square

        assert one(4) == one(4) != one(5)
        default = jacobian_norm(step, randn(1, 6), 3)
        assert default.square == one(0)
        assert math.isnan(jacobian_norm(step, randn(1, 6), 1).standard_error)
        with pytest.raises(ValueError, match="n_probes must be at least 1, got 0"):
            jacobian_norm(step, randn(1, 6), 0)


class TestSensitivity:
    @laws
    @given(seeds, st.floats(0.1, 0.9))
    def test_it_is_the_closed_inverse(self, seed, radius):
        J_x, J_e = contraction(seed, 5, radius), randn(seed + 1, 5, 3)
        e = randn(seed + 2, 3)
        inverse = torch.linalg.inv(torch.eye(5, dtype=torch.float64) - J_x)
        found = fixed_point_sensitivity(
            lambda x, e: J_x @ x + J_e @ e, inverse @ J_e @ e, e, tolerance=1e-9
        )
        expected = inverse @ J_e
        torch.testing.assert_close(
            found.response.T, expected, rtol=0, atol=1e-6 * float(expected.norm())
        )
        assert found.spectral_radius == pytest.approx(radius, rel=1e-6)
        assert float(found.residual.max()) <= 1e-9 and found.distance < 1e-9

    def test_it_is_the_motion_of_a_nonlinear_fixed_point(self):
        matrix, e = contraction(3, 4, 0.8), randn(1, 4)

        def fixed_point(e):
            x = torch.zeros(4, dtype=torch.float64)
            for _ in range(400):
                x = torch.tanh(matrix @ x) + e
            return x

        v = randn(2, 1, 4)
        found = fixed_point_sensitivity(
            lambda x, e: torch.tanh(matrix @ x) + e, fixed_point(e), e, v, tolerance=1e-8
        )
        h = 1e-5
        moved = (fixed_point(e + h * v[0]) - fixed_point(e - h * v[0])) / (2 * h)
        torch.testing.assert_close(found.response[0], moved, rtol=1e-5, atol=1e-7)

    def test_no_contraction_no_fixed_point_no_answer(self):
        expanding = contraction(0, 4, 1.3)
        zero, e = torch.zeros(4).double(), torch.zeros(4).double()
        e_map = torch.eye(4).double()
        x = torch.linalg.solve(e_map - expanding, randn(1, 4))
        with pytest.raises(ValueError, match=r"spectral radius is 1\.3"):
            fixed_point_sensitivity(lambda s, e: expanding @ s + e, x, randn(1, 4))
        with pytest.raises(ValueError, match="no fixed point: one iteration moves it"):
            fixed_point_sensitivity(lambda s, e: 0.5 * s + e, randn(1, 4), e)
        with pytest.raises(ValueError, match="directions has shape"):
            fixed_point_sensitivity(lambda s, e: 0.5 * s + e, zero, e, torch.zeros(1, 3).double())
        slow = contraction(0, 4, 0.99)
        x = torch.linalg.solve(e_map - slow, randn(1, 4))
        with pytest.raises(RuntimeError, match="after 5 terms"):
            fixed_point_sensitivity(lambda s, e: slow @ s + e, x, randn(1, 4), max_terms=5)


class TestMapPerIteration:
    def test_exponents_of_maps_that_take_turns(self):
        """Diagonal maps: the exponents are the means of the logs of the entries."""
        maps = [torch.tensor(d).double() for d in ([2.0, 0.5], [0.25, 3.0], [1.5, 0.1])]
        steps = [lambda x, d=d: d * x for d in maps] * 30
        found = lyapunov_exponents(steps, randn(0, 2), n_exponents=2, skip=30)
        expected = torch.stack(maps).log().mean(0).sort(descending=True).values
        torch.testing.assert_close(found.exponents, expected, rtol=1e-6, atol=1e-6)

    @laws
    @given(seeds)
    def test_exponents_of_a_linear_map_are_logs_of_its_eigenvalues(self, seed):
        basis = randn(seed, 3, 3) + 3 * torch.eye(3).double()
        values = torch.tensor([1.4, 0.7, -0.3]).double()
        matrix = basis @ values.diag() @ torch.linalg.inv(basis)
        steps = [lambda x: x @ matrix.T] * 80
        found = lyapunov_exponents(steps, randn(1, 3), n_exponents=3, skip=40)
        torch.testing.assert_close(found.exponents, values.abs().log(), rtol=1e-5, atol=1e-5)

    def test_numbers_of_maps(self):
        step, state = (lambda x: x), randn(0, 2)
        with pytest.raises(ValueError, match="n_iterations is missing"):
            lyapunov_exponents(step, state)
        with pytest.raises(ValueError, match="n_iterations=3, but there are 2"):
            lyapunov_exponents([step, step], state, 3)
