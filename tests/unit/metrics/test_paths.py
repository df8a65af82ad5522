"""Paths with known shapes: lines, circles, spirals, and what must not change them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics import (
    directional_persistence,
    path_efficiency,
    recurrence_curve,
    recurrence_lag,
    step_components,
)

laws = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31 - 1)
D = 6


def randn(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def spiral(theta, n, rate=1.0, seed=0):
    """A path that turns by theta per iteration in a random plane, and shrinks or grows."""
    plane = torch.linalg.qr(randn(seed, D, 2)).Q
    t = torch.arange(n, dtype=torch.float64)
    flat = torch.stack([(theta * t).cos(), (theta * t).sin()], -1) * rate ** t[:, None]
    return flat @ plane.T


def line(n, seed=0):
    return randn(seed, 1, D) + torch.arange(n)[:, None] * randn(seed + 1, 1, D)


class TestComponents:
    @laws
    @given(seeds)
    def test_pythagoras_and_rotations(self, seed):
        x = randn(seed, 5, 3, D)
        parts = step_components(x)
        length = x.diff(dim=0).norm(dim=-1)
        both = (parts.radial.square() + parts.tangential.square()).sqrt()
        torch.testing.assert_close(both, length)
        turned = step_components(x @ torch.linalg.qr(randn(seed + 1, D, D)).Q)
        for name in ("radial", "tangential", "norm_ratio"):
            torch.testing.assert_close(getattr(turned, name), getattr(parts, name))

    @laws
    @given(st.floats(0.1, 3.0), st.floats(0.5, 2.0))
    def test_a_spiral(self, theta, rate):
        parts = step_components(spiral(theta, 6, rate))
        length = rate ** torch.arange(5, dtype=torch.float64)
        torch.testing.assert_close(parts.radial, length * (rate * math.cos(theta) - 1))
        torch.testing.assert_close(parts.tangential, length * rate * abs(math.sin(theta)))
        torch.testing.assert_close(parts.norm_ratio, torch.full((5,), rate).double())

    def test_growth_alone_is_radial(self):
        x = torch.arange(1, 5)[:, None] * randn(0, 1, D)
        parts = step_components(x)
        assert (parts.tangential < 1e-12).all() and (parts.radial > 0).all()
        assert step_components(x[:1]).radial.shape == (0,)
        assert step_components(torch.zeros(2, D)).radial.isnan().all()


class TestStraightness:
    def test_a_line(self):
        assert path_efficiency(line(7)).item() == pytest.approx(1.0)
        assert directional_persistence(line(7)).item() == pytest.approx(1.0)

    @laws
    @given(st.integers(3, 12))
    def test_a_closed_polygon(self, n):
        theta = 2 * math.pi / n
        path = spiral(theta, n + 1)
        assert path_efficiency(path).item() < 1e-12
        assert directional_persistence(path).item() == pytest.approx(math.cos(theta))

    @laws
    @given(seeds)
    def test_the_triangle_inequality(self, seed):
        x = randn(seed, 6, 4, D)
        efficiency, persistence = path_efficiency(x), directional_persistence(x)
        assert ((efficiency >= 0) & (efficiency <= 1)).all()
        assert (persistence.abs() <= 1).all()
        torch.testing.assert_close(path_efficiency(3 * x + 1), efficiency)
        torch.testing.assert_close(path_efficiency(x.flip(0)), efficiency)

    def test_what_does_not_move_has_none(self):
        assert path_efficiency(torch.ones(4, D)).isnan()
        assert directional_persistence(torch.ones(4, D)).isnan()
        assert directional_persistence(line(2)).isnan()


class TestRecurrence:
    @laws
    @given(st.integers(2, 9), seeds)
    def test_an_orbit_comes_back_after_its_period(self, period, seed):
        orbit = randn(seed, period, 2, D).repeat(5, 1, 1)
        curve = recurrence_curve(orbit, max_lag=2 * period)
        assert (curve[period - 1] < 1e-12).all()
        assert (recurrence_lag(curve, min_depth=0.999999) == period).all()

    def test_the_curve_of_a_circle(self):
        """The chord of l steps: 2 sin(l theta / 2)."""
        theta = 2 * math.pi / 7
        curve = recurrence_curve(spiral(theta, 40))
        lags = torch.arange(1, 17, dtype=torch.float64)
        torch.testing.assert_close(curve, 2 * (lags * theta / 2).sin().abs(), atol=1e-9, rtol=0)
        assert recurrence_lag(curve).item() == 7

    def test_a_spiral_with_noise_and_a_drift(self):
        path = spiral(2 * math.pi / 5.3, 60, 0.995) + 0.02 * randn(5, 60, D) + 0.01 * line(60)
        assert recurrence_lag(recurrence_curve(path)).item() == 5

    @laws
    @given(st.floats(0.5, 0.95))
    def test_a_contraction_and_a_line_do_not_come_back(self, rate):
        shrinking = 5 + rate ** torch.arange(30)[:, None] * randn(0, 1, D)
        assert recurrence_lag(recurrence_curve(shrinking)).isnan()
        assert recurrence_lag(recurrence_curve(line(30))).isnan()

    def test_short_paths_and_bad_arguments(self):
        assert recurrence_curve(line(1)).shape == (0,)
        assert recurrence_curve(line(7)).shape == (3,)
        assert recurrence_lag(recurrence_curve(line(4))).isnan()
        with pytest.raises(ValueError, match="max_lag=0"):
            recurrence_curve(line(7), max_lag=0)
        for depth in (0, 1.5):
            with pytest.raises(ValueError, match="min_depth"):
                recurrence_lag(torch.rand(5), min_depth=depth)
