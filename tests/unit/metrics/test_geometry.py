"""Kernel alignment, curvature, anisotropy and ranks: their invariances, and closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics import (
    anisotropy,
    cosine_similarity,
    effective_rank,
    linear_cka,
    rank_for_share,
    rank_of_spectrum,
    token_curvature,
)

laws = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31 - 1)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed, d):
    return torch.linalg.qr(randn(seed, d, d)).Q


class TestAlignment:
    @laws
    @given(seeds, st.floats(0.1, 10), st.integers(3, 9))
    def test_rotations_scale_and_shifts_do_not_change_it(self, seed, scale, n):
        x, y = randn(seed, n, 4), randn(seed + 1, n, 5)
        found = linear_cka(x, y)
        assert 0 <= found <= 1
        assert linear_cka(y, x) == pytest.approx(found)
        moved = scale * x @ rotation(seed + 2, 4) + randn(seed + 3, 4)
        assert linear_cka(moved, y) == pytest.approx(found)
        assert linear_cka(x, moved) == pytest.approx(1.0)

    @laws
    @given(seeds)
    def test_it_is_the_alignment_of_centred_kernels(self, seed):
        x, y = randn(seed, 7, 4), randn(seed + 1, 7, 3)
        centre = torch.eye(7).double() - 1 / 7
        k, kk = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
        assert linear_cka(x, y) == pytest.approx(float((k * kk).sum() / (k.norm() * kk.norm())))

    def test_an_invertible_map_changes_it_and_unrelated_ones_are_far(self):
        x = randn(0, 400, 6)
        assert linear_cka(x, x * torch.tensor([10.0, 1, 1, 1, 1, 1]).double()) < 0.9
        assert linear_cka(x, randn(1, 400, 6)) < 0.05

    def test_what_has_none(self):
        assert math.isnan(linear_cka(randn(0, 1, 3), randn(1, 1, 3)))
        assert math.isnan(linear_cka(torch.ones(4, 3), randn(1, 4, 3).float()))
        with pytest.raises(ValueError, match="4 and 5 tokens"):
            linear_cka(randn(0, 4, 3), randn(0, 5, 3))


class TestCurvature:
    @laws
    @given(st.floats(0.05, 3.1), seeds)
    def test_a_polygon_turns_by_its_angle(self, theta, seed):
        t = theta * torch.arange(9, dtype=torch.float64)
        steps = torch.stack([t.cos(), t.sin()], -1) @ torch.linalg.qr(randn(seed, 5, 2)).Q.T
        assert token_curvature(steps.cumsum(0)).item() == pytest.approx(theta)

    def test_lines_and_independent_tokens(self):
        line = torch.arange(6)[:, None] * randn(0, 1, 4)
        assert token_curvature(line).item() < 1e-7
        # Independent tokens: neighbouring steps share one token with opposite sign, cosine -1/2.
        assert token_curvature(randn(1, 300, 400)).item() == pytest.approx(
            2 * math.pi / 3, rel=0.01
        )
        assert token_curvature(line[:2]).isnan()

    def test_padding_is_not_seen(self):
        x = randn(0, 2, 7, 4)
        mask = torch.ones(2, 7, dtype=torch.bool)
        mask[1, :2] = False
        padded = torch.where(mask[..., None], x, math.nan)
        for metric in (token_curvature, anisotropy):
            found = metric(padded, mask=mask)
            torch.testing.assert_close(found, torch.stack([metric(x[0]), metric(x[1, 2:])]))


class TestAnisotropy:
    @laws
    @given(seeds, st.integers(2, 7))
    def test_it_is_the_mean_of_all_pairs(self, seed, n):
        x = randn(seed, n, 5)
        pairs = [cosine_similarity(x[i : i + 1], x[j : j + 1]) for i in range(n) for j in range(i)]
        assert anisotropy(x).item() == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-9)
        torch.testing.assert_close(anisotropy(x @ rotation(seed, 5)), anisotropy(x))

    def test_closed_forms(self):
        assert anisotropy(torch.eye(4)).item() == 0.0
        assert anisotropy(torch.ones(4, 3)).item() == pytest.approx(1.0)
        assert anisotropy(torch.tensor([[1.0, 0], [-2, 0]])).item() == pytest.approx(-1.0)
        assert anisotropy(torch.ones(1, 3)).isnan() and anisotropy(torch.zeros(3, 3)).isnan()


class TestSpectra:
    @laws
    @given(seeds)
    def test_it_is_the_effective_rank_of_the_matrix(self, seed):
        x = randn(seed, 6, 4)
        torch.testing.assert_close(rank_of_spectrum(torch.linalg.svdvals(x)), effective_rank(x))

    def test_closed_forms(self):
        assert rank_of_spectrum(torch.tensor([2.0, 2, 2, 0])).item() == pytest.approx(3.0)
        spectrum = torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
        assert rank_for_share(spectrum, 0.9).tolist()[:2] == [1.0, 3.0]
        assert rank_for_share(spectrum, 0.95).tolist()[:2] == [2.0, 3.0]
        assert rank_for_share(spectrum, 1).tolist()[:2] == [2.0, 3.0]
        assert rank_for_share(spectrum)[2].isnan() and rank_of_spectrum(spectrum)[2].isnan()
        with pytest.raises(ValueError, match="share=0"):
            rank_for_share(spectrum, 0)
