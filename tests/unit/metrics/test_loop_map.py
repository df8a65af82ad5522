"""Loop maps with known Jacobians: linear maps, rotations, and dense Jacobians as the reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.jacobian import orthogonalise
from tl_loops.metrics.loop_map import (
    loop_spectrum,
    lyapunov_exponents,
    operator_norm,
)

torch.set_num_threads(1)

laws = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31 - 1)
modes = pytest.mark.parametrize("mode", ["forward", "double_backward"])


def randn(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def linear(matrix):
    return lambda state: state @ matrix.T


def tanh_loop(n=30, gain=0.9, seed=0):
    matrix = gain * randn(seed, n, n) / n**0.5
    return lambda state: torch.tanh(state @ matrix.T + 0.1)


def dense_jacobian(step, state):
    jacobian = torch.autograd.functional.jacobian(step, state)
    return jacobian.reshape(state.numel(), state.numel())


def rotation(r, theta):
    c, s = r * math.cos(theta), r * math.sin(theta)
    return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


class TestSpectrum:
    @modes
    def test_matches_the_dense_jacobian(self, mode):
        step, state = tanh_loop(), randn(1, 30)
        result = loop_spectrum(step, state, 5, tolerance=1e-12, differentiation=mode)
        expected = torch.linalg.eigvals(dense_jacobian(step, state))
        expected = expected[expected.abs().argsort(descending=True)][:5]
        torch.testing.assert_close(result.eigenvalues.abs(), expected.abs())
        torch.testing.assert_close(result.eigenvalues.real, expected.real, atol=1e-6, rtol=0)
        assert result.converged and result.krylov_dim == 30

    @modes
    @laws
    @given(st.floats(0.1, 1.5), st.floats(0.05, math.pi - 0.05))
    def test_a_spiral_has_a_conjugate_pair(self, mode, r, theta):
        result = loop_spectrum(linear(rotation(r, theta)), randn(0, 2), 2, differentiation=mode)
        torch.testing.assert_close(result.eigenvalues.abs(), torch.full((2,), r).double())
        assert result.eigenvalues[0].imag > 0 > result.eigenvalues[1].imag
        assert result.spectral_radius == pytest.approx(r)
        period = torch.full((2,), 2 * math.pi / theta).double()
        torch.testing.assert_close(result.rotation_period, period)

    def test_periods_of_real_eigenvalues(self):
        step = linear(torch.diag(torch.tensor([0.9, -0.5]).double()))
        result = loop_spectrum(step, randn(0, 2), n_eigenvalues=2)
        assert result.rotation_period[0].isinf()
        assert result.rotation_period[1].item() == pytest.approx(2.0)

    def test_large_map_needs_few_products(self):
        """One eigenvalue stands out of 2000: a small subspace is enough."""
        u = torch.nn.functional.normalize(randn(0, 2000), dim=0)
        result = loop_spectrum(lambda x: 0.3 * x + 0.6 * u * (u @ x), randn(1, 2000))
        assert result.spectral_radius == pytest.approx(0.9, rel=1e-6)
        assert result.converged and result.krylov_dim <= 20

    def test_residual_says_when_the_subspace_is_too_small(self):
        step, state = tanh_loop(200), randn(1, 200)
        result = loop_spectrum(step, state, krylov_dim=6)
        assert not result.converged and result.residual[0] > 1e-3
        larger = loop_spectrum(step, state, krylov_dim=200)
        exact = torch.linalg.eigvals(dense_jacobian(step, state)).abs().max().item()
        assert larger.converged and larger.spectral_radius == pytest.approx(exact, rel=1e-2)

    @pytest.mark.parametrize("factor", [0.0, 1.0, -0.5])
    def test_multiples_of_the_identity(self, factor):
        result = loop_spectrum(lambda x: factor * x, randn(0, 3, 4), n_eigenvalues=3)
        torch.testing.assert_close(result.eigenvalues.real, torch.full((3,), factor).double())
        torch.testing.assert_close(result.eigenvalues.imag, torch.zeros(3).double())

    def test_a_nilpotent_map_has_radius_zero(self):
        result = loop_spectrum(linear(torch.diag(torch.ones(3).double(), 1)), randn(0, 4))
        assert result.spectral_radius < 1e-3

    def test_shape_of_the_state_does_not_matter(self):
        step = tanh_loop(24)
        flat = loop_spectrum(step, randn(0, 24), n_eigenvalues=3)
        shaped = loop_spectrum(
            lambda s: step(s.reshape(24)).reshape(2, 3, 4), randn(0, 24).reshape(2, 3, 4), 3
        )
        torch.testing.assert_close(flat.eigenvalues, shaped.eigenvalues)

    def test_more_eigenvalues_than_dimensions(self):
        assert len(loop_spectrum(linear(rotation(0.5, 1.0)), randn(0, 2), 7).eigenvalues) == 2

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    @modes
    def test_works_where_gradients_are_off(self, context, mode):
        step = linear(rotation(0.5, 1.0))
        with context():
            result = loop_spectrum(step, randn(0, 2), differentiation=mode)
        assert result.spectral_radius == pytest.approx(0.5)

    def test_bfloat16_map(self):
        matrix = torch.diag(torch.tensor([0.875, 0.5, 0.25])).bfloat16()
        result = loop_spectrum(lambda x: x @ matrix, torch.zeros(3).bfloat16())
        assert result.spectral_radius == pytest.approx(0.875, rel=0.02)

    @modes
    def test_refuses_cut_gradients(self, mode):
        with pytest.raises(ValueError, match="cuts gradients"):
            loop_spectrum(lambda x: (2 * x).detach(), randn(0, 3), differentiation=mode)

    @modes
    def test_a_constant_map_is_no_cut_gradient(self, mode):
        step = torch.ones_like
        assert loop_spectrum(step, randn(0, 3), differentiation=mode).spectral_radius == 0.0

    def test_refuses_a_change_of_shape_and_nan(self):
        with pytest.raises(ValueError, match="same shape"):
            loop_spectrum(lambda x: x[:2], randn(0, 3))
        with pytest.raises(FloatingPointError, match="NaN"):
            loop_spectrum(torch.sqrt, torch.zeros(3))
        with pytest.raises(ValueError, match="krylov_dim"):
            loop_spectrum(torch.tanh, randn(0, 3), krylov_dim=0)

    @modes
    def test_fused_attention_is_differentiated(self, mode):
        def step(state):
            x = state.unflatten(-1, (2, 4)).transpose(0, 1)[None]
            out = F.scaled_dot_product_attention(x, x, x, is_causal=True)
            return 0.5 * out[0].transpose(0, 1).flatten(-2)

        state = randn(0, 5, 8)
        expected = torch.linalg.eigvals(dense_jacobian(step, state)).abs().max().item()
        result = loop_spectrum(step, state, krylov_dim=40, differentiation=mode)
        assert result.spectral_radius == pytest.approx(expected, rel=1e-6)
        exponents = lyapunov_exponents(step, state, 2, differentiation=mode).exponents
        assert torch.isfinite(exponents).all()


class TestOperatorNorm:
    @laws
    @given(seeds, st.integers(1, 12))
    def test_matches_the_largest_singular_value(self, seed, n):
        matrix = randn(seed, n, n)
        expected = torch.linalg.matrix_norm(matrix, 2).item()
        assert operator_norm(linear(matrix), randn(seed, n)) == pytest.approx(expected, rel=1e-3)

    def test_at_a_point_of_a_nonlinear_map(self):
        step, state = tanh_loop(100), randn(1, 100)
        expected = torch.linalg.matrix_norm(dense_jacobian(step, state), 2).item()
        assert operator_norm(step, state) == pytest.approx(expected, rel=1e-3)

    def test_exceeds_the_spectral_radius_of_a_shear(self):
        step = linear(torch.tensor([[0.5, 10.0], [0.0, 0.5]]).double())
        assert loop_spectrum(step, randn(0, 2)).spectral_radius == pytest.approx(0.5, rel=1e-3)
        assert operator_norm(step, randn(0, 2)) > 10

    def test_zero_and_orthogonal_maps(self):
        assert operator_norm(torch.zeros_like, randn(0, 3)) == 0.0
        q = torch.linalg.qr(randn(0, 50, 50))[0]
        assert operator_norm(linear(q), randn(1, 50)) == pytest.approx(1.0)

    def test_works_in_inference_mode(self):
        with torch.inference_mode():
            assert operator_norm(lambda x: 3 * x, randn(0, 4)) == pytest.approx(3.0)

    def test_refuses_an_unsettled_answer_and_cut_gradients(self):
        with pytest.raises(RuntimeError, match="krylov_dim"):
            operator_norm(tanh_loop(200), randn(1, 200), krylov_dim=2, tolerance=1e-8)
        with pytest.raises(ValueError, match="cuts gradients"):
            operator_norm(lambda x: (2 * x).detach(), randn(0, 3))


class TestLyapunov:
    @modes
    def test_linear_map_has_the_logs_of_its_eigenvalues(self, mode):
        basis = randn(0, 3, 3)
        matrix = basis @ torch.diag(torch.tensor([1.1, 0.7, 0.2]).double()) @ basis.inverse()
        result = lyapunov_exponents(
            linear(matrix), randn(1, 3), 60, n_exponents=3, skip=30, differentiation=mode
        )
        expected = torch.tensor([1.1, 0.7, 0.2]).double().log()
        torch.testing.assert_close(result.exponents, expected, atol=1e-4, rtol=0)
        assert result.growth.shape == (30, 3)

    @laws
    @given(seeds)
    def test_the_sum_over_all_dimensions_is_the_mean_log_determinant(self, seed):
        step, state = tanh_loop(5, seed=seed), randn(seed, 5)
        result = lyapunov_exponents(step, state, 6, n_exponents=5, seed=seed)
        logs = []
        for _ in range(6):
            logs.append(dense_jacobian(step, state).det().abs().log())
            state = step(state)
        torch.testing.assert_close(result.exponents.sum(), torch.stack(logs).mean())
        torch.testing.assert_close(result.final_state, state)

    @pytest.mark.parametrize("n_exponents", [1, 3, 4])
    def test_an_isometry_neither_grows_nor_shrinks(self, n_exponents):
        q = torch.linalg.qr(randn(0, 4, 4))[0]
        result = lyapunov_exponents(linear(q), randn(1, 4), 7, n_exponents)
        torch.testing.assert_close(result.growth, torch.zeros(7, n_exponents).double())

    def test_logistic_map_is_chaotic(self):
        """The exponent of x -> 4 x (1 - x) is ln 2."""
        start = torch.tensor([0.3141592653], dtype=torch.float64)
        result = lyapunov_exponents(lambda x: 4 * x * (1 - x), start, 1000)
        assert result.exponents.item() == pytest.approx(math.log(2), abs=0.03)

    def test_a_collapsing_map(self):
        result = lyapunov_exponents(torch.zeros_like, randn(0, 3), 2)
        assert result.exponents.item() == -math.inf

    def test_refuses_impossible_counts(self):
        with pytest.raises(ValueError, match="n_exponents"):
            lyapunov_exponents(torch.tanh, randn(0, 3), 5, n_exponents=4)
        with pytest.raises(ValueError, match="skip"):
            lyapunov_exponents(torch.tanh, randn(0, 3), 5, skip=5)
        with pytest.raises(ValueError, match="n_iterations"):
            lyapunov_exponents(torch.tanh, randn(0, 3), 0)


def test_orthogonal_to_the_basis_down_to_rounding():
    """A vector that nearly lies in the span: one pass of Gram-Schmidt is not enough."""
    basis = torch.linalg.qr(randn(0, 100, 20).float())[0].T
    vector = basis.sum(0) + 1e-4 * randn(1, 100).float()
    following, coefficients, beta = orthogonalise(vector, basis)
    assert (basis @ following).abs().max() < 1e-6
    torch.testing.assert_close(coefficients @ basis + beta * following, vector)
    assert orthogonalise(basis[3], basis)[2] == 0.0


def test_attention_is_differentiable_both_ways():
    """The two ways of differentiation agree on a block with attention, a norm and an MLP."""
    w = [0.3 * randn(i, 8, 8) for i in range(5)]

    def step(state):
        x = state / state.square().mean(-1, keepdim=True).sqrt()
        scores = (x @ w[0]) @ (x @ w[1]).mT
        mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
        pattern = scores.masked_fill(mask, -torch.inf).softmax(-1)
        x = state + pattern @ x @ w[2]
        return x + torch.nn.functional.silu(x @ w[3]) @ w[4]

    state = randn(9, 5, 8)
    forward, backward = (
        loop_spectrum(step, state, 4, differentiation=m) for m in ("forward", "double_backward")
    )
    torch.testing.assert_close(forward.eigenvalues, backward.eigenvalues)
    exact = torch.linalg.eigvals(dense_jacobian(step, state)).abs().max().item()
    assert forward.spectral_radius == pytest.approx(exact)
