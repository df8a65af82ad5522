"""Closed forms of trajectories: contraction, rotation, spiral, slider, period 2."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.dynamics import (
    acceleration,
    degenerate_fixed_point,
    fixed_point_cosine,
    fixed_point_distance,
    fixed_point_slope,
    path_independence,
    step_angles,
    successive_cosine,
    successive_difference,
    two_scale_ratio,
)

torch.set_num_threads(1)

laws = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31 - 1)


def randn(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def contraction(rho, n_iterations=20, shape=(2, 3, 8), seed=0):
    """X* + rho^t V."""
    t = torch.arange(n_iterations, dtype=torch.float64).reshape(-1, *[1] * len(shape))
    return randn(seed, *shape) + rho**t * randn(seed + 1, *shape)


def spiral(theta, rho=1.0, radius=3.0, n_iterations=20, d_model=6, seed=0):
    """A turn by theta and a shrink by rho per iteration, in a plane around a centre."""
    t = torch.arange(n_iterations, dtype=torch.float64)
    u, v = torch.linalg.qr(randn(seed, d_model, 2))[0].T
    circle = torch.cos(theta * t)[:, None] * u + torch.sin(theta * t)[:, None] * v
    return randn(seed + 1, d_model) + radius * rho ** t[:, None] * circle


def slider(n_iterations=10, d_model=6):
    t = torch.arange(n_iterations, dtype=torch.float64)
    return randn(0, d_model) + t[:, None] * randn(1, d_model)


class TestSuccessiveDifference:
    def test_contraction_shrinks_each_step_by_rho(self):
        steps = successive_difference(contraction(0.7))
        assert steps.shape == (19, 2)
        torch.testing.assert_close(steps[1:] / steps[:-1], torch.full((18, 2), 0.7).double())

    def test_token_mean_is_the_mean_of_the_norms(self):
        states = randn(0, 5, 2, 3, 8)
        expected = torch.zeros(4, 2).double()
        for t in range(1, 5):
            for row in range(2):
                norms = [(states[t, row, p] - states[t - 1, row, p]).norm() for p in range(3)]
                expected[t - 1, row] = sum(norms) / 3
        torch.testing.assert_close(successive_difference(states), expected)

    def test_fro_is_the_norm_of_the_matrix(self):
        states = randn(0, 5, 2, 3, 8)
        expected = torch.linalg.matrix_norm(states[1:] - states[:-1])
        torch.testing.assert_close(successive_difference(states, agg="fro"), expected)

    def test_none_keeps_the_tokens(self):
        states = randn(0, 5, 2, 3, 8)
        tokens = successive_difference(states, agg="none")
        assert tokens.shape == (4, 2, 3)
        torch.testing.assert_close(tokens.mean(-1), successive_difference(states))

    def test_relative_divides_by_the_later_state(self):
        states = torch.tensor([[[3.0, 4.0]], [[6.0, 8.0]]])
        assert successive_difference(states, relative=True).item() == pytest.approx(0.5)
        assert successive_difference(states, agg="fro", relative=True).item() == pytest.approx(0.5)

    def test_relative_fro_is_a_ratio_of_matrix_norms(self):
        states = randn(0, 4, 3, 8)
        norm = torch.linalg.matrix_norm
        expected = norm(states[1:] - states[:-1]) / norm(states[1:])
        torch.testing.assert_close(
            successive_difference(states, agg="fro", relative=True), expected
        )

    @pytest.mark.parametrize("agg", ["token_mean", "fro", "none"])
    def test_rms_divides_by_root_of_the_width(self, agg):
        states = randn(0, 4, 3, 16)
        torch.testing.assert_close(
            successive_difference(states, agg=agg, rms=True),
            successive_difference(states, agg=agg) / 4,
        )

    @pytest.mark.parametrize("agg", ["token_mean", "fro"])
    @pytest.mark.parametrize("relative", [False, True])
    def test_padding_does_not_count(self, agg, relative):
        states = randn(0, 4, 2, 5, 8)
        mask = torch.tensor([[False, False, True, True, True], [True, True, True, True, False]])
        padded = torch.where(mask[..., None], states, torch.nan)
        got = successive_difference(padded, agg=agg, relative=relative, mask=mask)
        for row, kept in enumerate((slice(2, 5), slice(0, 4))):
            expected = successive_difference(states[:, row, kept], agg=agg, relative=relative)
            torch.testing.assert_close(got[:, row], expected)

    def test_one_vector_per_iteration_is_one_token(self):
        states = randn(0, 4, 8)
        torch.testing.assert_close(
            successive_difference(states), successive_difference(states[:, None, :])
        )

    def test_one_state_has_no_step(self):
        assert successive_difference(torch.randn(1, 2, 3, 8)).shape == (0, 2)

    def test_a_state_that_stays_zero_has_no_relative_step(self):
        assert successive_difference(torch.zeros(2, 1, 3), relative=True).isnan().all()

    def test_bfloat16_is_measured_in_float32(self):
        states = randn(0, 4, 3, 64).bfloat16()
        steps = successive_difference(states)
        assert steps.dtype == torch.float32
        torch.testing.assert_close(steps, successive_difference(states.float()))

    def test_refuses_two_scales_and_unknown_options(self):
        states = torch.randn(3, 2, 4)
        with pytest.raises(ValueError, match="choose one"):
            successive_difference(states, relative=True, rms=True)
        with pytest.raises(ValueError, match="mask"):
            successive_difference(states, agg="none", mask=torch.ones(2, dtype=torch.bool))
        with pytest.raises(ValueError, match="at least"):
            successive_difference(torch.randn(0, 2, 4))

    @laws
    @given(seeds, st.floats(0.01, 100))
    def test_scales_with_the_states(self, seed, factor):
        states = randn(seed, 4, 3, 5)
        torch.testing.assert_close(
            successive_difference(factor * states), factor * successive_difference(states)
        )
        torch.testing.assert_close(
            successive_difference(factor * states, relative=True),
            successive_difference(states, relative=True),
        )

    @laws
    @given(seeds)
    def test_blind_to_a_translation_and_a_rotation(self, seed):
        states, shift = randn(seed, 4, 3, 5), randn(seed + 1, 5)
        rotation = torch.linalg.qr(randn(seed + 2, 5, 5))[0]
        torch.testing.assert_close(
            successive_difference(states @ rotation + shift), successive_difference(states)
        )


class TestCosines:
    def test_a_convergent_trajectory_ends_with_cosine_one(self):
        cosine = successive_cosine(contraction(0.5, 60))
        assert cosine.shape == (59, 2)
        assert (cosine[-1] > 1 - 1e-12).all()
        assert (cosine[0] < 1 - 1e-3).all()

    def test_radial_growth_is_invisible(self):
        states = torch.arange(1, 6).reshape(-1, 1, 1) * torch.randn(3, 8)
        torch.testing.assert_close(successive_cosine(states), torch.ones(4))

    def test_rotation_about_the_origin_has_cosine_of_the_angle(self):
        states = spiral(0.3) - randn(1, 6)
        torch.testing.assert_close(
            successive_cosine(states, agg="none"), torch.full((19,), math.cos(0.3)).double()
        )

    def test_a_zero_token_makes_the_mean_undefined(self):
        states = torch.ones(2, 3, 4)
        states[1, 2] = 0.0
        assert successive_cosine(states).isnan().all()
        keep = torch.tensor([True, True, False])
        torch.testing.assert_close(successive_cosine(states, mask=keep), torch.ones(1))

    def test_fixed_point_cosine_is_one_at_the_reference(self):
        states = randn(0, 5, 2, 3, 8)
        torch.testing.assert_close(
            fixed_point_cosine(states, reference=2)[2], torch.ones(2).double()
        )
        torch.testing.assert_close(
            fixed_point_cosine(states, reference=states[2]),
            fixed_point_cosine(states, reference=2),
        )


class TestFixedPointDistance:
    def test_contraction_approaches_by_rho(self):
        states = contraction(0.7)
        fixed_point = randn(0, 2, 3, 8)
        distance = fixed_point_distance(states, reference=fixed_point)
        assert distance.shape == (20, 2)
        torch.testing.assert_close(distance[1:] / distance[:-1], torch.full((19, 2), 0.7).double())

    def test_affine_map_reaches_its_fixed_point(self):
        matrix = randn(0, 6, 6)
        matrix = 0.5 * matrix / torch.linalg.matrix_norm(matrix, 2)
        offset = randn(1, 6)
        fixed_point = torch.linalg.solve(torch.eye(6).double() - matrix, offset)
        states = [randn(2, 6)]
        for _ in range(80):
            states.append(matrix @ states[-1] + offset)
        distance = fixed_point_distance(torch.stack(states), reference=fixed_point)
        assert distance[-1] < 1e-14
        assert (distance[1:] <= 0.5 * distance[:-1] + 1e-14).all()

    def test_is_zero_at_the_reference_alone(self):
        distance = fixed_point_distance(contraction(0.7))
        assert (distance[-1] == 0).all()
        assert (distance[:-1] > 0).all()

    def test_relative_uses_the_norm_of_the_fixed_point(self):
        states = randn(0, 5, 3, 8)
        torch.testing.assert_close(
            fixed_point_distance(states, agg="none", relative=True),
            fixed_point_distance(states, agg="none") / states[-1].norm(dim=-1),
        )

    def test_refuses_an_iteration_that_is_not_there(self):
        with pytest.raises(ValueError, match="5 iterations"):
            fixed_point_distance(torch.randn(5, 3, 8), reference=5)

    @laws
    @given(st.floats(0.3, 0.99), seeds)
    def test_slope_of_a_contraction_is_the_log_of_its_rate(self, rho, seed):
        states = contraction(rho, 12, seed=seed)
        distance = fixed_point_distance(states, reference=randn(seed, 2, 3, 8))
        slope = fixed_point_slope(distance, window=(2, 9))
        torch.testing.assert_close(slope, torch.full((2,), math.log(rho)).double())

    def test_slope_exposes_a_slow_drift(self):
        """Near the reference a slider looks convergent; far from it the slope does not."""
        states = slider(130)
        distance = fixed_point_distance(states)
        assert fixed_point_slope(distance, window=(120, 128)) < -0.2
        assert fixed_point_slope(distance) > -0.02

    def test_slope_with_a_zero_distance_is_undefined(self):
        distance = fixed_point_distance(contraction(0.7))
        assert fixed_point_slope(distance, window=(5, 19)).isnan().all()

    @pytest.mark.parametrize("window", [(5, 5), (-1, 3), (3, 20), (9, 2)])
    def test_refuses_a_window_outside_the_iterations(self, window):
        with pytest.raises(ValueError, match="window"):
            fixed_point_slope(torch.ones(20), window=window)


class TestDegenerateFixedPoint:
    def test_equal_fixed_points_are_degenerate(self):
        points = randn(0, 1, 3, 8).expand(4, 3, 8)
        torch.testing.assert_close(degenerate_fixed_point(points), torch.ones(3).double())

    def test_takes_the_lowest_cosine_to_the_first(self):
        angles = torch.tensor([0.0, 0.3, 1.2, 0.5])
        points = torch.stack([angles.cos(), angles.sin()], -1)
        torch.testing.assert_close(degenerate_fixed_point(points), torch.tensor(1.2).cos())

    def test_the_first_layer_is_the_anchor(self):
        """Layers 1 and 2 are opposite, yet each is orthogonal to layer 0."""
        points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        assert degenerate_fixed_point(points).item() == pytest.approx(0.0, abs=1e-7)

    def test_one_layer_or_a_zero_point_is_undefined(self):
        assert degenerate_fixed_point(torch.randn(1, 3, 8)).isnan().all()
        assert degenerate_fixed_point(torch.zeros(2, 8)).isnan()


class TestStepAngles:
    @laws
    @given(st.floats(1e-4, math.pi - 1e-4), st.floats(0.5, 1.5), seeds)
    def test_a_spiral_turns_by_its_angle_at_any_rate(self, theta, rho, seed):
        angles = step_angles(spiral(theta, rho, n_iterations=8, seed=seed))
        torch.testing.assert_close(
            angles, torch.full((6,), theta, dtype=torch.float64), atol=1e-9, rtol=0
        )

    def test_straight_motion_has_no_angle(self):
        torch.testing.assert_close(step_angles(slider()), torch.zeros(8).double())
        straight = step_angles(contraction(0.7, 5))
        torch.testing.assert_close(straight, torch.zeros(3, 2, 3).double())

    def test_alternation_turns_back(self):
        states = torch.tensor([[1.0, 2.0], [3.0, -1.0]])[torch.arange(6) % 2]
        torch.testing.assert_close(step_angles(states), torch.full((4,), math.pi))

    def test_too_few_states_and_zero_steps(self):
        assert step_angles(torch.randn(2, 3, 4)).shape == (0, 3)
        assert step_angles(torch.randn(1, 3, 4)).shape == (0, 3)
        assert step_angles(torch.ones(4, 3)).isnan().all()


class TestAcceleration:
    def test_contraction(self):
        rho, states = 0.6, contraction(0.6)
        norm = randn(1, 2, 3, 8).norm(dim=-1)
        k = torch.arange(1, 19).double().reshape(-1, 1, 1)
        torch.testing.assert_close(acceleration(states), (1 - rho) ** 2 * rho ** (k - 1) * norm)

    @laws
    @given(st.floats(0.01, math.pi), seeds)
    def test_an_orbit_accelerates_forever(self, theta, seed):
        states = spiral(theta, n_iterations=8, seed=seed)
        expected = torch.full((6,), 4 * 3.0 * math.sin(theta / 2) ** 2).double()
        torch.testing.assert_close(acceleration(states), expected)
        torch.testing.assert_close(
            acceleration(states, normalize="step"), torch.full((6,), math.sin(theta / 2)).double()
        )

    def test_a_slider_does_not_accelerate_while_it_drifts(self):
        states = slider()
        assert acceleration(states).abs().max() < 1e-14
        assert successive_difference(states).min() > 0.1

    def test_state_norm_is_that_of_the_newest_state(self):
        states = randn(0, 5, 3, 8)
        torch.testing.assert_close(
            acceleration(states, normalize="state"),
            acceleration(states) / states[2:].norm(dim=-1),
        )

    def test_too_few_states_and_no_motion(self):
        assert acceleration(torch.randn(2, 3, 4)).shape == (0, 3)
        assert (acceleration(torch.ones(4, 3)) == 0).all()
        assert acceleration(torch.ones(4, 3), normalize="step").isnan().all()


class TestTwoScaleRatio:
    def test_drift_over_the_mean_step(self):
        first = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 3.0]])  # steps 1 and 3
        second = torch.tensor([[1.0, 13.0], [1.0, 15.0]])  # 10 away; step 2
        third = torch.tensor([[1.0, 10.0]])  # 5 away
        ratio = two_scale_ratio([first, second, third])
        torch.testing.assert_close(ratio, torch.tensor([5.0, 2.5]))

    def test_is_not_the_distance_covered_inside_the_group(self):
        """The common error divides ||x_K - x_0|| instead, which is 2 here."""
        first = torch.tensor([[0.0], [1.0], [2.0]])
        second = torch.tensor([[9.0], [9.5]])
        assert two_scale_ratio([first, second]).item() == pytest.approx(7.0)

    def test_groups_that_touch_do_not_drift(self):
        first = randn(0, 4, 2, 3, 5)
        ratio = two_scale_ratio([first, torch.cat([first[-1:], randn(1, 2, 2, 3, 5)])])
        assert (ratio == 0).all()
        assert ratio.shape == (1, 2, 3)

    def test_undefined_without_a_step(self):
        assert two_scale_ratio([torch.zeros(1, 2), torch.ones(2, 2)]).isnan().all()
        assert two_scale_ratio([torch.zeros(2, 2), torch.ones(2, 2)]).isinf().all()

    def test_refuses_a_single_group(self):
        with pytest.raises(ValueError, match="at least two"):
            two_scale_ratio([torch.randn(3, 2)])


class TestPathIndependence:
    def test_equal_final_states_are_path_independent(self):
        result = path_independence(randn(0, 1, 2, 3, 8).expand(4, 2, 3, 8))
        torch.testing.assert_close(result.cosine, torch.ones(2, 3).double())
        assert (result.distance == 0).all()
        assert (result.relative_distance == 0).all()

    def test_means_run_over_pairs(self):
        states = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        result = path_independence(states)
        assert result.cosine.item() == pytest.approx(-1 / 3)
        assert result.distance.item() == pytest.approx((2 * math.sqrt(2) + 2) / 3)
        assert result.relative_distance.item() == pytest.approx((2 * math.sqrt(2) + 2) / 3)

    def test_one_seed_says_nothing(self):
        result = path_independence(torch.randn(1, 3, 8))
        assert result.cosine.isnan().all() and result.distance.isnan().all()

    @laws
    @given(seeds)
    def test_the_order_of_seeds_does_not_matter(self, seed):
        states = randn(seed, 4, 3, 5)
        forward, backward = path_independence(states), path_independence(states.flip(0))
        torch.testing.assert_close(forward.cosine, backward.cosine)
        torch.testing.assert_close(forward.relative_distance, backward.relative_distance)
