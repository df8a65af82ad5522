"""Synthetic trajectories whose label is known by construction."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.trajectories import (
    TRAJECTORY_LABELS,
    classify_trajectory,
    label_co_occurrence,
)

torch.set_num_threads(1)

T, D = 128, 64


def plane(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(D, 3, generator=generator))[0].T


def contraction(rho, transient=3.0, seed=0):
    u, _, w = plane(seed)
    return 3 * w + transient * rho ** torch.arange(T)[:, None] * u


def orbit(period, radius=3.0, seed=0, n_iterations=T):
    """A circle of the given radius around a centre of norm 3."""
    u, v, w = plane(seed)
    angle = 2 * math.pi * torch.arange(n_iterations) / period
    return 3 * w + radius * (angle.cos()[:, None] * u + angle.sin()[:, None] * v)


def slider(speed=3 / 42, seed=0):
    _, v, w = plane(seed)
    return 3 * w + speed * torch.arange(T)[:, None] * v


def noise(seed=0, walk=False):
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(seed))
    return x.cumsum(0) if walk else x


def label_of(states, **options):
    return str(classify_trajectory(states, **options).labels)


class TestLabels:
    def test_contraction_is_a_fixed_point(self):
        assert label_of(contraction(0.7)) == "fixed_point"

    @pytest.mark.parametrize("period", [2, 3, 10, 30])
    def test_wide_orbit(self, period):
        assert label_of(orbit(period)) == "orbit"

    def test_slow_drift_is_a_slider(self):
        assert label_of(slider()) == "slider"

    @pytest.mark.parametrize("walk", [False, True])
    def test_noise_is_unknown(self, walk):
        assert label_of(noise(walk=walk)) == "unknown"

    def test_an_orbit_needs_three_returns(self):
        assert label_of(orbit(50)) == "unknown"
        assert label_of(orbit(50), min_returns=2) == "orbit"

    def test_a_narrow_orbit_counts_as_a_fixed_point(self):
        """Below arccos(1 - tau) the label cannot see it; the period still does."""
        result = classify_trajectory(orbit(10, radius=0.45))
        assert result.labels == "fixed_point"
        assert result.dominant_period.item() == pytest.approx(10, rel=0.02)
        assert label_of(orbit(10, radius=0.45), tau=0.01) == "orbit"

    def test_a_slow_contraction_is_a_slider_that_stops(self):
        slow, drift = classify_trajectory(contraction(0.9, 9.0)), classify_trajectory(slider())
        assert slow.labels == drift.labels == "slider"
        assert slow.late_speed < 1e-3 < drift.late_speed

    def test_irregular_returns_are_no_orbit(self):
        u, v, _ = plane()
        away = torch.zeros(T, dtype=torch.bool)
        away[[5, 7, 9, 100]] = True  # gaps of 2, 2 and 91
        states = torch.where(away[:, None], u, v)
        assert label_of(states, rho=0.99) == "unknown"
        assert label_of(states, rho=0.99, max_gap_variation=2.0) == "orbit"
        assert label_of(states) == "fixed_point"

    def test_the_fixed_point_share_is_compared_with_all_iterations(self):
        u, v, _ = plane()
        for n_away, label in ((12, "fixed_point"), (13, "slider")):  # 116 or 115 of 128 near
            states = torch.where(torch.arange(T)[:, None] < n_away, u, v)
            assert label_of(states) == label

    def test_a_share_of_exactly_rho_is_enough(self):
        u, v, _ = plane()
        states = torch.where(torch.arange(10)[:, None] < 1, u, v)
        assert label_of(states, rho=0.9) == "fixed_point"

    def test_a_dip_beyond_the_tolerance_is_no_slider(self):
        u, v, _ = plane()
        turn = 0.02 * torch.arange(T)
        turn[40] = turn[0]
        states = turn.cos()[:, None] * u + turn.sin()[:, None] * v
        assert label_of(states) == "unknown"
        assert label_of(states, max_drop=1.5) == "slider"


class TestScores:
    def test_orbit_scores(self):
        result = classify_trajectory(orbit(8))
        assert result.returns.item() == 15  # s_t = 1 at t = 127, 119, ..., 7
        assert result.amplitude.item() == pytest.approx(1.0, abs=1e-5)
        assert result.near_fraction.item() == pytest.approx(16 / 128)
        assert result.gap_variation.item() == 0.0
        assert result.dominant_period.item() == pytest.approx(8, rel=0.02)
        assert result.periodicity.item() > 0.95
        assert result.similarity.shape == (T,)

    def test_amplitude_of_a_circle(self):
        """On a circle of radius r around a centre of norm c the lowest cosine is across it."""
        result = classify_trajectory(orbit(8, radius=2.0))
        assert result.amplitude.item() == pytest.approx(1 - (9 - 4) / (9 + 4), abs=1e-5)

    @settings(deadline=None, max_examples=25)
    @given(st.floats(4.0, 25.0), st.integers(0, 1000))
    def test_period_of_any_length(self, period, seed):
        result = classify_trajectory(orbit(period, seed=seed))
        assert result.dominant_period.item() == pytest.approx(period, rel=0.06)

    def test_amplitude_ignores_the_approach(self):
        result = classify_trajectory(slider())
        assert result.similarity.min() < 0.75
        assert result.amplitude <= 0.05

    def test_a_trend_does_not_hide_the_period(self):
        t = torch.arange(T)
        angle = 0.01 * t + 0.05 * torch.sin(2 * math.pi * t / 8)
        states = torch.stack([angle.cos(), angle.sin()], -1)
        assert classify_trajectory(states).dominant_period.item() == pytest.approx(8, rel=0.1)

    @pytest.mark.parametrize(("angle", "found"), [(1e-3, False), (1e-1, True)])
    def test_rounding_has_no_period(self, angle, found):
        u, v, _ = plane().double()
        away = angle * (torch.arange(T) % 2)
        states = away.cos()[:, None] * u + away.sin()[:, None] * v
        assert classify_trajectory(states).dominant_period.isfinite().item() == found

    def test_no_period_without_a_swing(self):
        for states in (contraction(0.7), slider(), noise(), torch.ones(T, D)):
            assert classify_trajectory(states).dominant_period.isnan()

    def test_late_speed_of_a_circle(self):
        speed = 2 * 3 * math.sin(math.pi / 8) / math.sqrt(18)
        assert classify_trajectory(orbit(8)).late_speed.item() == pytest.approx(speed, rel=1e-4)


class TestShapes:
    def test_each_token_is_labelled_alone(self):
        cases = [contraction(0.7), orbit(10), slider(), noise(), orbit(2), contraction(0.8)]
        states = torch.stack(cases, 1).reshape(T, 2, 3, D)
        result = classify_trajectory(states)
        expected = [[label_of(case) for case in cases[:3]], [label_of(case) for case in cases[3:]]]
        assert result.labels.tolist() == expected
        assert result.dominant_period.shape == (2, 3)
        alone = classify_trajectory(cases[1])
        torch.testing.assert_close(result.dominant_period[0, 1], alone.dominant_period)
        torch.testing.assert_close(result.amplitude[0, 1], alone.amplitude)

    def test_fractions_sum_to_one(self):
        states = torch.stack([contraction(0.7), orbit(10), slider(), orbit(9)], 1)
        result = classify_trajectory(states)
        assert result.fraction("orbit") == 0.5
        assert sum(result.fraction(label) for label in TRAJECTORY_LABELS) == 1.0
        with pytest.raises(ValueError, match="unknown"):
            result.fraction("limit cycle")

    def test_one_iteration_says_nothing(self):
        result = classify_trajectory(torch.randn(1, 3, D))
        assert (result.labels == "unknown").all()
        assert result.late_speed.isnan().all() and result.near_fraction.isnan().all()

    def test_padding_is_unknown(self):
        states = torch.stack([contraction(0.7), torch.zeros(T, D)], 1)
        result = classify_trajectory(states)
        assert result.labels.tolist() == ["fixed_point", "unknown"]
        assert result.amplitude[1].isnan() and not result.amplitude[0].isnan()

    def test_bfloat16_is_measured_in_float32(self):
        result = classify_trajectory(orbit(10).bfloat16())
        assert result.similarity.dtype == torch.float32
        assert result.labels == "orbit"

    @pytest.mark.parametrize("n_iterations", [2, 3, 4, 5, 8])
    def test_short_trajectories_are_labelled(self, n_iterations):
        result = classify_trajectory(orbit(2, n_iterations=n_iterations))
        assert str(result.labels) in TRAJECTORY_LABELS

    @settings(deadline=None, max_examples=25)
    @given(st.integers(0, 10_000), st.floats(0.1, 10))
    def test_scale_and_rotation_do_not_change_the_labels(self, seed, factor):
        generator = torch.Generator().manual_seed(seed)
        states = torch.randn(20, 5, 8, generator=generator).cumsum(0).double()
        rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator).double())[0]
        before, after = classify_trajectory(states), classify_trajectory(factor * states @ rotation)
        assert (before.labels == after.labels).all()
        torch.testing.assert_close(before.drop, after.drop)

    @pytest.mark.parametrize(
        "option", [{"tau": 0.0}, {"rho": 1.5}, {"late_fraction": 0.0}, {"min_returns": 0}]
    )
    def test_refuses_options_out_of_range(self, option):
        with pytest.raises(ValueError, match=next(iter(option))):
            classify_trajectory(torch.randn(4, D), **option)


def test_co_occurrence_over_layers():
    labels = np.array([["orbit", "fixed_point", "slider"], ["unknown", "fixed_point", "orbit"]])
    table = label_co_occurrence(labels)
    row = {label: i for i, label in enumerate(TRAJECTORY_LABELS)}
    assert table[row["orbit"], row["unknown"]] == 0.5
    assert table[row["slider"], row["orbit"]] == 1.0
    assert table[row["orbit"], row["fixed_point"]] == 0.0
    assert (table.diagonal() == 1).all()


def test_co_occurrence_of_an_absent_label_is_undefined():
    table = label_co_occurrence(np.array([["orbit", "orbit"]]))
    assert table[0].isnan().all() and table[1, 1] == 1
    with pytest.raises(ValueError, match="spiral"):
        label_co_occurrence(np.array([["spiral"]]))
