"""Jacobians, exponents and sensitivities of models, against dense Jacobians of the same maps."""

import math

import pytest
import torch

from tests.models import tiny_model, tiny_tokens
from tl_loops import LoopedSemanticsError, dynamics

TOKENS = tiny_tokens(pos=4)[0]


def dense(step):
    return torch.autograd.functional.jacobian(step, step.state).reshape(step.n_dimensions, -1)


@pytest.mark.parametrize("name", ["huginn", "injected"])
def test_radius_and_norm_are_those_of_the_dense_jacobian(name):
    model = tiny_model(name).double()
    found = dynamics.iteration_jacobians(
        model, TOKENS, [0, -1], pos=-1, n_probes=None, krylov_dim=64, tolerance=1e-6
    )
    assert found.iterations == (0, model.cfg.n_iterations - 1)
    for t, radius, norm in zip(
        found.iterations, found.spectral_radius, found.frobenius_norm, strict=True
    ):
        J = dense(dynamics.loop_map(model, TOKENS, t, pos=-1))
        assert float(norm) == pytest.approx(float(J.norm()), rel=1e-6)
        assert float(radius) == pytest.approx(float(torch.linalg.eigvals(J).abs().max()), rel=1e-4)
    frame = found.to_frame()
    assert list(frame["iteration"]) == list(found.iterations) and frame["converged"].all()
    assert "spectral_radius" in repr(found)


def test_the_estimate_says_its_error_and_takes_a_generator():
    model = tiny_model("retrofitted")

    def norms(seed):
        generator = torch.Generator().manual_seed(seed)
        return dynamics.iteration_jacobians(
            model, TOKENS, [1], pos=-1, krylov_dim=2, n_probes=32, generator=generator
        )

    one, other = norms(0), norms(1)
    assert not torch.equal(one.frobenius_norm, other.frobenius_norm)
    exact = dynamics.iteration_jacobians(model, TOKENS, [1], pos=-1, krylov_dim=2, n_probes=None)
    for a, b in zip(one.norms, exact.norms, strict=True):
        assert abs(a.square - b.square) < 5 * a.standard_error
    # Two products do not find the leading eigenvalue, and no number pretends that they do.
    assert one.spectral_radius.isnan().all()


@pytest.mark.parametrize("name", ["retrofitted", "hrm_text"])
def test_exponents_of_a_run_are_those_of_the_product_of_its_jacobians(name):
    """Volumes: the sum of the first k exponents is the growth of a k-volume under the product."""
    model = tiny_model(name).double()
    maps = dynamics.loop_maps(model, TOKENS)
    k, n = 3, maps[0].n_dimensions
    found = dynamics.run_exponents(model, TOKENS, k, seed=5)
    start = torch.randn(n, k, generator=torch.Generator().manual_seed(5))
    tangents = torch.linalg.qr(start.double()).Q
    for step in maps:
        tangents = dense(step) @ tangents
    growth = torch.linalg.qr(tangents).R.diagonal().abs().log() / len(maps)
    torch.testing.assert_close(found.exponents, growth, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.final_state, maps[-1](maps[-1].state).detach())
    skipped = dynamics.run_exponents(model, TOKENS, 1, skip=1)
    assert skipped.growth.shape == (len(maps) - 1, 1)


def test_sensitivity_of_a_contracting_loop():
    """The inverse in closed form, from the dense Jacobians at the fixed point."""
    model = tiny_model("parcae").double()
    with torch.no_grad():
        model.injection.A_log.fill_(2.0)  # the state is forgotten quickly
        for block in model.blocks[model.layout.core_start : model.layout.coda_start]:
            block.attn.W_O.mul_(0.2)
            block.mlp.W_out.mul_(0.2)
    v = torch.randn(2, 4, model.cfg.d_model, dtype=torch.float64)
    with model.iterations(60):
        found = dynamics.injection_sensitivity(model, TOKENS, v, tolerance=1e-8, krylov_dim=128)
        step = dynamics.loop_map(model, TOKENS)
        J_x = dense(step)
        J_e = torch.autograd.functional.jacobian(lambda e: step(step.state, e), step.injection)
    assert found.spectral_radius < 1 and found.distance < 1e-6
    J_e = J_e.reshape(J_x.shape[0], -1)
    with pytest.raises(ValueError, match="as it was made"):
        step(step.state)  # the model has its own number of iterations again
    inverse = torch.linalg.solve(torch.eye(len(J_x)).double() - J_x, J_e)
    expected = (v.reshape(2, -1) @ inverse.T).reshape(v.shape)
    torch.testing.assert_close(
        found.response, expected, rtol=0, atol=1e-6 * float(expected.abs().max())
    )


def test_what_has_no_sensitivity():
    v = torch.zeros(1, 4, 32)
    with pytest.raises(LoopedSemanticsError, match="injects nothing"):
        dynamics.injection_sensitivity(tiny_model("ouro"), TOKENS, v)
    with pytest.raises(ValueError, match="no fixed point"):
        dynamics.injection_sensitivity(tiny_model("retrofitted"), TOKENS, v)
    # With two stacks it is about a whole cycle.
    with pytest.raises(ValueError, match="no fixed point"):
        dynamics.injection_sensitivity(tiny_model("injected"), TOKENS, v)


def test_a_radius_of_one_or_more_is_refused():
    """A loop that keeps its state and adds nothing: every state is a fixed point, radius 1."""
    model = tiny_model("retrofitted", n_core=1)
    with torch.no_grad():
        for block in model.blocks[1:-1]:
            block.attn.W_O.zero_()
            block.mlp.W_out.zero_()
        d = model.cfg.d_model
        model.injection.W[:d] = torch.eye(d)
        model.injection.W[d:] = 0
    with pytest.raises(ValueError, match="spectral radius is 1,"):
        dynamics.injection_sensitivity(model, TOKENS, torch.zeros(1, 4, d))
    exponents = dynamics.run_exponents(model, TOKENS, 3).exponents
    assert float(exponents.abs().max()) < 1e-6
    norm = dynamics.iteration_jacobians(model, TOKENS, 0, n_probes=None).norms[0]
    assert norm.rms_stretch == pytest.approx(1.0) and not math.isnan(norm.norm_error)
