"""Planes, lines and random walks: trajectories whose principal components are known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.pca import pca_trajectory, random_walk_null

torch.set_num_threads(1)

laws = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31 - 1)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frame(n, d=32, seed=0):
    """Orthonormal rows."""
    return torch.linalg.qr(randn(seed, d, n))[0].T


def circle(radius=5.0, n_iterations=40, offset=100.0):
    u, v = frame(2)
    angle = 2 * math.pi * torch.arange(n_iterations) / n_iterations
    return offset * randn(7, 32) + radius * (angle.cos()[:, None] * u + angle.sin()[:, None] * v)


class TestClosedForms:
    def test_a_circle_lies_in_two_components(self):
        result = pca_trajectory(circle(), n_components=3)
        torch.testing.assert_close(
            result.explained_variance_ratio, torch.tensor([0.5, 0.5, 0.0]), atol=1e-5, rtol=0
        )
        radius = result.coordinates[:, :2].norm(dim=-1)
        torch.testing.assert_close(radius, torch.full((40,), 5.0), atol=1e-3, rtol=0)
        assert (result.coordinates[:, 2] == 0).all()

    def test_a_line_lies_in_one_component(self):
        (u,) = frame(1)
        result = pca_trajectory(10 * randn(1, 32) + torch.arange(9.0)[:, None] * u, n_components=3)
        torch.testing.assert_close(result.explained_variance_ratio, torch.tensor([1.0, 0.0, 0.0]))
        torch.testing.assert_close(
            result.coordinates[:, 0].abs(), (torch.arange(9.0) - 4).abs(), atol=1e-4, rtol=0
        )
        assert result.explained_variance[0].item() == pytest.approx(60 / 8, rel=1e-4)
        assert (result.components[1:] == 0).all()

    def test_matches_the_singular_value_decomposition(self):
        x = randn(0, 30, 8).double()
        centered = x - x.mean(0)
        _, s, v = torch.linalg.svd(centered, full_matrices=False)
        result = pca_trajectory(x, n_components=4)
        torch.testing.assert_close(result.explained_variance, s[:4].square() / 29)
        torch.testing.assert_close(
            (result.components * v[:4]).sum(-1).abs(), torch.ones(4).double()
        )
        torch.testing.assert_close(
            result.explained_variance_ratio, s[:4].square() / s.square().sum()
        )

    def test_wide_and_tall_rows_agree(self):
        """The two Gram matrices: 5 rows in 8 dimensions, and the same rows many times."""
        x = randn(0, 5, 8)
        wide, tall = pca_trajectory(x, 3), pca_trajectory(x.repeat(4, 1), 3)
        torch.testing.assert_close(wide.components, tall.components, atol=1e-5, rtol=0)

    def test_random_walk_in_many_dimensions(self):
        """Component k explains 6 / (pi k)^2 of a long walk, arXiv 1806.08805."""
        walk = random_walk_null(randn(0, 300, 4000), seed=1)[0]
        ratio = pca_trajectory(walk, n_components=3).explained_variance_ratio
        expected = 6 / (math.pi * torch.arange(1, 4)) ** 2
        torch.testing.assert_close(ratio, expected, atol=0.02, rtol=0)


class TestFit:
    def test_all_pools_the_tokens(self):
        states = randn(0, 6, 2, 3, 8)
        pooled = pca_trajectory(states)
        assert pooled.coordinates.shape == (6, 2, 3, 2) and pooled.components.shape == (2, 8)
        torch.testing.assert_close(
            pooled.coordinates.reshape(-1, 2), pca_trajectory(states.reshape(-1, 8)).coordinates
        )

    def test_token_fits_each_alone(self):
        states = randn(0, 6, 2, 3, 8)
        result = pca_trajectory(states, fit_on="token")
        assert result.components.shape == (2, 3, 2, 8) and result.mean.shape == (2, 3, 8)
        alone = pca_trajectory(states[:, 1, 2])
        torch.testing.assert_close(result.coordinates[:, 1, 2], alone.coordinates)
        torch.testing.assert_close(result.explained_variance[1, 2], alone.explained_variance)

    def test_other_rows_can_fix_the_basis(self):
        states, rows = randn(0, 6, 3, 8), randn(1, 20, 8)
        result = pca_trajectory(states, fit_on=rows)
        torch.testing.assert_close(result.components, pca_trajectory(rows).components)
        torch.testing.assert_close(
            result.coordinates, (states - rows.mean(0)) @ result.components.T
        )

    def test_a_skipped_initial_state_is_projected_but_not_fitted(self):
        states = circle()
        states[0] += 1000 * randn(3, 32)
        skipped = pca_trajectory(states, skip_init=1)
        torch.testing.assert_close(skipped.components, pca_trajectory(states[1:]).components)
        assert skipped.coordinates.shape == (40, 2)
        assert pca_trajectory(states).explained_variance_ratio[0] > 0.99
        assert skipped.explained_variance_ratio[0] < 0.6

    def test_centering_on_the_token(self):
        states = randn(0, 6, 3, 8)
        coordinates = pca_trajectory(states, center="token").coordinates
        torch.testing.assert_close(coordinates.mean(0), torch.zeros(3, 2), atol=1e-6, rtol=0)
        assert pca_trajectory(states).coordinates.mean(0).abs().max() > 0.1

    def test_centering_on_the_token_leaves_out_skipped_states(self):
        states = randn(0, 6, 3, 8)
        states[0] += 50
        coordinates = pca_trajectory(states, center="token", skip_init=1).coordinates
        torch.testing.assert_close(coordinates[1:].mean(0), torch.zeros(3, 2), atol=1e-5, rtol=0)


class TestEdges:
    def test_short_trajectories_are_padded_with_zeros(self):
        result = pca_trajectory(randn(0, 2, 8), n_components=3)
        assert (result.coordinates[:, 1:] == 0).all() and (result.components[1:] == 0).all()
        torch.testing.assert_close(result.explained_variance_ratio, torch.tensor([1.0, 0.0, 0.0]))

    @pytest.mark.parametrize("states", [torch.randn(1, 8), torch.ones(5, 8) * 0.1])
    def test_no_variance(self, states):
        result = pca_trajectory(states)
        assert (result.coordinates == 0).all() and (result.explained_variance == 0).all()
        assert result.explained_variance_ratio.isnan().all()

    def test_more_components_than_dimensions(self):
        assert pca_trajectory(randn(0, 9, 2), n_components=4).coordinates.shape == (9, 4)

    def test_bfloat16_is_measured_in_float32(self):
        states = circle(offset=0.0).bfloat16()
        result = pca_trajectory(states)
        assert result.coordinates.dtype == torch.float32
        torch.testing.assert_close(result.coordinates, pca_trajectory(states.float()).coordinates)

    def test_refuses_bad_options(self):
        states = randn(0, 4, 8)
        with pytest.raises(ValueError, match="n_components"):
            pca_trajectory(states, n_components=0)
        with pytest.raises(ValueError, match="skip_init"):
            pca_trajectory(states, skip_init=4)


class TestLaws:
    @laws
    @given(seeds)
    def test_signs_do_not_depend_on_the_data_sign(self, seed):
        states = randn(seed, 7, 5).double()
        components = pca_trajectory(states).components
        torch.testing.assert_close(components, pca_trajectory(-states).components)
        largest = components.abs().argmax(-1, keepdim=True)
        assert (components.gather(-1, largest) > 0).all()

    @laws
    @given(seeds, st.integers(1, 6))
    def test_components_are_orthonormal_and_variances_descend(self, seed, n_components):
        result = pca_trajectory(randn(seed, 12, 6).double(), n_components=n_components)
        gram = result.components @ result.components.T
        torch.testing.assert_close(gram, torch.eye(n_components).double())
        assert (result.explained_variance.diff() <= 0).all()
        variance = result.coordinates.var(0)
        torch.testing.assert_close(variance, result.explained_variance)

    @laws
    @given(seeds)
    def test_all_components_keep_all_distances(self, seed):
        states = randn(seed, 7, 4).double()
        coordinates = pca_trajectory(states, n_components=4).coordinates
        torch.testing.assert_close(
            torch.cdist(coordinates, coordinates), torch.cdist(states, states)
        )


class TestRandomWalk:
    def test_keeps_start_and_step_lengths(self):
        states = randn(0, 10, 2, 3, 8)
        walks = random_walk_null(states, seed=0, n_walks=4)
        assert walks.shape == (4, 10, 2, 3, 8)
        torch.testing.assert_close(walks[:, 0], states[:1].expand(4, 2, 3, 8))
        torch.testing.assert_close(
            walks.diff(dim=1).norm(dim=-1), states.diff(dim=0).norm(dim=-1).expand(4, 9, 2, 3)
        )

    def test_is_a_function_of_the_seed(self):
        states = randn(0, 10, 8)
        assert torch.equal(random_walk_null(states, 3), random_walk_null(states, 3))
        assert not torch.equal(random_walk_null(states, 3), random_walk_null(states, 4))

    def test_directions_are_isotropic(self):
        walks = random_walk_null(torch.arange(2.0)[:, None].expand(2, 4), seed=0, n_walks=4000)
        steps = walks[:, 1] - walks[:, 0]
        torch.testing.assert_close(steps.mean(0), torch.zeros(4), atol=0.08, rtol=0)
        torch.testing.assert_close(steps.square().mean(0), torch.ones(4), atol=0.08, rtol=0)

    def test_does_not_touch_the_global_generator(self):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        random_walk_null(randn(0, 4, 8), seed=1)
        assert torch.equal(before, torch.get_rng_state())
