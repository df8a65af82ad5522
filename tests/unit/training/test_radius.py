"""The rule for the injection's part for the state: its spectral radius, after every step."""

import pytest
import torch

from tests.unit.training.small import counting_corpus, settings, small_model
from tl_loops import LoopedSemanticsError
from tl_loops.training import limit_state_radius, state_radius, train
from tl_loops.training.radius import RadiusRule

KINDS = ("concat", "concat_injection_first")


def rows(model):
    """The rows of the map that the state meets, and those that e meets."""
    halves = model.injection.W.detach().chunk(2)
    return halves if model.cfg.injection == "concat" else halves[::-1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_radius_of_a_matrix_with_known_eigenvalues(kind):
    """A rotation by any angle, times 1.5, beside smaller numbers, seen from another basis."""
    model = small_model(injection=kind).double()
    d = model.cfg.d_model
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(d, d, generator=generator).double() + 3 * torch.eye(d)
    values = torch.diag(torch.linspace(-1, 1, d).double())
    values[:2, :2] = 1.5 * torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    with torch.no_grad():
        rows(model)[0].copy_(basis @ values @ basis.inverse())
    assert state_radius(model) == pytest.approx(1.5)
    e_rows, before = rows(model)[1].clone(), rows(model)[0].clone()
    limit_state_radius(model, 2.0)
    assert torch.equal(rows(model)[0], before)
    limit_state_radius(model, 0.9)
    assert state_radius(model) == pytest.approx(0.9)
    assert torch.equal(rows(model)[1], e_rows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_radius_holds_after_every_step_and_falls_in_a_line(kind):
    model, found = small_model(injection=kind, initializer_range=0.3), []
    first = state_radius(model)
    assert first > 1
    log = train(
        model,
        counting_corpus(),
        settings(n_steps=10, state_radius=0.5, state_radius_share=0.5, learning_rate=1e-2),
        look=lambda n_done: found.append(state_radius(model)),
        progress=False,
    )
    bounds = [0.5 + (first - 0.5) * (1 - min(1.0, s / 5)) for s in range(1, 11)]
    assert len(found) == len(log.steps) == 10
    assert all(radius <= bound * (1 + 1e-5) for radius, bound in zip(found, bounds, strict=True))
    assert found[4:] == pytest.approx([0.5] * 6, rel=0.05), "the bound is reached"


def test_a_model_below_the_bound_trains_as_without_it():
    plain, bounded = small_model(), small_model()
    most = 2 * state_radius(plain)
    train(plain, counting_corpus(), settings(), progress=False)
    train(bounded, counting_corpus(), settings(state_radius=most), progress=False)
    for p, q in zip(plain.parameters(), bounded.parameters(), strict=True):
        assert torch.equal(p, q)
    rule = RadiusRule(
        bounded, settings(state_radius=most), dict(bounded.physical_named_parameters())
    )
    assert [rule.at(step) for step in range(4)] == [most] * 4


def test_a_share_of_no_steps_bounds_from_the_first():
    of = settings(state_radius=0.1, state_radius_share=0.0)
    model = small_model()
    rule = RadiusRule(model, of, dict(model.physical_named_parameters()))
    assert rule.at(0) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["add", "gated_diagonal", None])
def test_an_injection_without_a_matrix_of_the_state_is_refused(kind):
    model = small_model(injection=kind, **({} if kind else {"initial_state": "embed"}))
    before = [p.detach().clone() for p in model.parameters()]
    for call in (
        lambda: state_radius(model),
        lambda: limit_state_radius(model, 0.9),
        lambda: train(model, counting_corpus(), settings(state_radius=0.9), progress=False),
    ):
        with pytest.raises(LoopedSemanticsError, match=f"this model has {kind!r}"):
            call()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_matrix_that_is_not_trained_is_not_scaled():
    model = small_model()
    model.injection.W.requires_grad_(False)
    with pytest.raises(ValueError, match="that is not trained"):
        train(model, counting_corpus(), settings(state_radius=0.9), progress=False)
    with pytest.raises(ValueError, match="most must be at least 0"):
        limit_state_radius(model, -1.0)
    for field, value in (("state_radius", 0.0), ("state_radius_share", 1.5)):
        with pytest.raises(ValueError, match=field):
            settings(**{field: value})
