"""Numbers of iterations: means and bounds of their distributions."""

import pytest
import torch

from tl_loops.training import (
    ConstantIterations,
    IterationDraw,
    LogNormalPoissonIterations,
    MixedIterations,
    PoissonIterations,
    UniformIterations,
)

N = 4000


def draws(of: IterationDraw) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([of.draw(generator) for _ in range(N)], dtype=torch.float64)


def within_error(values, mean):
    return abs(float(values.mean()) - mean) < 4 * float(values.std()) / N**0.5


def test_constant():
    assert set(draws(ConstantIterations(5)).tolist()) == {5.0}


def test_uniform_takes_every_number_equally_often():
    counts = draws(UniformIterations(2, 5)).int().bincount()
    assert counts[:2].tolist() == [0, 0] and len(counts) == 6
    assert (counts[2:].double() / N - 0.25).abs().max() < 4 * (0.25 * 0.75 / N) ** 0.5


def test_poisson_has_its_mean_and_variance():
    found = draws(PoissonIterations(5.0, most=100))
    assert within_error(found, 5.0)
    assert float(found.var()) == pytest.approx(4.0, rel=0.12)
    assert float(draws(PoissonIterations(1.0, most=9)).max()) == 1.0


def test_log_normal_poisson_is_huginns():
    """E[n] = 1 + r; Var[n] = E[λ] + Var[λ] = r + r² (exp(σ²) - 1)."""
    r, sigma = 8.0, 0.5
    found = draws(LogNormalPoissonIterations(r, most=1000, sigma=sigma))
    assert within_error(found, 1 + r)
    variance = r + r**2 * (torch.tensor(sigma**2).exp() - 1).item()
    assert float(found.var()) == pytest.approx(variance, rel=0.2)


def test_a_mixture_is_of_both_draws():
    found = draws(MixedIterations(ConstantIterations(8), UniformIterations(9, 100), share=0.25))
    long = found > 8
    assert abs(float(long.double().mean()) - 0.25) < 4 * (0.25 * 0.75 / N) ** 0.5
    assert within_error(found[long], 54.5) and found.max() > 95
    assert set(
        draws(MixedIterations(ConstantIterations(2), ConstantIterations(3), 1)).tolist()
    ) == {3.0}


@pytest.mark.parametrize(
    "of",
    [
        UniformIterations(1, 6),
        PoissonIterations(5.0, most=6),
        LogNormalPoissonIterations(5.0, most=6),
        MixedIterations(UniformIterations(1, 6), ConstantIterations(2)),
    ],
    ids=lambda of: type(of).__name__,
)
def test_draws_are_from_1_to_the_most(of):
    found = draws(of)
    assert found.min() >= 1 and found.max() == of.most == 6


def test_bounds_are_checked():
    for make in (
        lambda: ConstantIterations(0),
        lambda: UniformIterations(3, 2),
        lambda: PoissonIterations(0.5, 4),
        lambda: LogNormalPoissonIterations(0.0, 4),
        lambda: LogNormalPoissonIterations(float("nan"), 4),
        lambda: MixedIterations(ConstantIterations(1), ConstantIterations(2), 1.5),
    ):
        with pytest.raises(ValueError, match=r"must be"):
            make()
