"""Stage alignment: identities, ground truth windows, the permutation null, and layer distances."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.stages import align_stages, angular_distance, block_influence

torch.set_num_threads(1)
few = settings(deadline=None, max_examples=25)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- alignment on the grid ---


@few
@given(seed=st.integers(0, 10_000), depth=st.integers(3, 40))
def test_identical_curves(seed, depth):
    curve = normal(depth, seed=seed)
    result = align_stages(curve, curve)
    assert result.pearson.item() == pytest.approx(1, abs=1e-5)
    assert result.window_pearson.item() == pytest.approx(1, abs=1e-5)
    for value in (result.rmse, result.max_abs, result.dtw_cost, result.window_rmse):
        assert value.item() == 0
    assert result.window_start.item() == 0 and result.window_length == depth


def test_up_cycled_stack():
    curve = torch.tensor([0.1, 0.5, 0.9, 0.7, 0.2, 0.3])
    stack = torch.cat([curve, curve])
    halves = align_stages(stack.reshape(2, 6), curve)
    assert torch.allclose(halves.pearson, torch.ones(2))
    assert torch.equal(halves.rmse, torch.zeros(2))
    assert halves.stability[0].isnan() and halves.stability[1].item() == pytest.approx(1)
    assert align_stages(stack, curve).rmse > 0.1


def test_a_reversed_asymmetric_curve_correlates_less():
    curve = torch.tensor([0.0, 0.9, 0.7, 0.4, 0.2, 0.1])
    assert align_stages(curve.flip(0), curve).pearson < 0.5


def test_affine_changes_of_the_metric():
    curve, reference = normal(9), normal(17, seed=1)
    plain = align_stages(curve, reference)
    scaled = align_stages(3 * curve + 2, reference)
    assert torch.allclose(scaled.pearson, plain.pearson, atol=1e-5)
    assert align_stages(-curve, reference).pearson.item() == pytest.approx(-plain.pearson.item())
    both = align_stages(3 * curve + 2, 3 * reference + 2)
    for name in ("rmse", "max_abs", "dtw_cost", "window_rmse"):
        assert torch.allclose(getattr(both, name), 3 * getattr(plain, name), rtol=1e-4)
    shifted = align_stages(reference + 0.25, reference)
    assert shifted.rmse.item() == pytest.approx(0.25)
    assert shifted.max_abs.item() == pytest.approx(0.25)


@pytest.mark.parametrize("grid", [2, 7, 101])
def test_linear_curves_agree_at_any_depth(grid):
    # Layer i of k lies at i / (k - 1): a line is the same line at every depth.
    result = align_stages(torch.linspace(1, 3, 5), torch.linspace(1, 3, 24), grid=grid)
    assert result.max_abs.item() == pytest.approx(0, abs=1e-5)
    if grid > 2:
        assert result.pearson.item() == pytest.approx(1, abs=1e-5)


def test_interpolation_written_out():
    # Depths 3 and 2 on 5 points: (0, .5, 1, .5, 0) against (0, .25, .5, .75, 1).
    result = align_stages(torch.tensor([0.0, 1, 0]), torch.tensor([0.0, 1]), grid=5)
    difference = torch.tensor([0, 0.25, 0.5, -0.25, -1])
    assert result.rmse.item() == pytest.approx(difference.square().mean().sqrt().item())
    assert result.max_abs.item() == 1
    assert result.pearson.isnan()  # two reference layers have no shape


def dtw_by_enumeration(a, b):
    """Cheapest monotone path over all of them."""
    best = math.inf

    def walk(i, j, total):
        nonlocal best
        total += abs(a[i] - b[j])
        if (i, j) == (len(a) - 1, len(b) - 1):
            best = min(best, total)
        for di, dj in ((1, 0), (0, 1), (1, 1)):
            if i + di < len(a) and j + dj < len(b):
                walk(i + di, j + dj, total)

    walk(0, 0, 0.0)
    return best / len(a)


def test_dtw_is_the_cheapest_monotone_path():
    profiles, reference = normal(3, 5), normal(5, seed=1)
    result = align_stages(profiles, reference, grid=5)
    for t in range(3):
        expected = dtw_by_enumeration(profiles[t].tolist(), reference.tolist())
        assert result.dtw_cost[t].item() == pytest.approx(expected, rel=1e-5)


@few
@given(seed=st.integers(0, 10_000), depth=st.integers(2, 12), depth_ref=st.integers(2, 30))
def test_order_of_the_distances(seed, depth, depth_ref):
    result = align_stages(normal(2, depth, seed=seed), normal(depth_ref, seed=seed + 1))
    assert (result.dtw_cost >= 0).all()
    assert (result.dtw_cost <= result.rmse * (1 + 1e-5)).all()
    assert (result.rmse <= result.max_abs * (1 + 1e-5)).all()


def test_warping_forgives_a_shift_that_rmse_does_not():
    position = torch.linspace(0, 1, 60)
    bump = torch.exp(-(((position - 0.4) / 0.05) ** 2))
    shifted = torch.exp(-(((position - 0.5) / 0.05) ** 2))
    result = align_stages(shifted, bump)
    assert result.dtw_cost < 0.1 * result.rmse


# --- windows ---


@pytest.mark.parametrize(("start", "depth"), [(0, 4), (7, 4), (12, 4), (3, 1), (0, 16)])
def test_best_window_finds_the_source_layers(start, depth):
    reference = normal(16)
    result = align_stages(reference[start : start + depth], reference)
    assert result.window_start.item() == start
    assert result.window_length == depth
    assert result.window_rmse.item() == 0


@few
@given(seed=st.integers(0, 10_000), depth=st.integers(1, 6))
def test_best_window_is_the_best_of_all(seed, depth):
    profiles, reference = normal(3, depth, seed=seed), normal(9, seed=seed + 1)
    result = align_stages(profiles, reference)
    for t, profile in enumerate(profiles):
        rmse = [
            (profile - reference[a : a + depth]).square().mean().sqrt().item()
            for a in range(9 - depth + 1)
        ]
        assert result.window_rmse[t].item() == pytest.approx(min(rmse), rel=1e-4)
        assert rmse[result.window_start[t]] == pytest.approx(min(rmse), rel=1e-4)


def test_window_of_another_length_is_stretched():
    reference = torch.tensor([9.0, 9, 0, 1, 2, 3, 4, 9, 9])
    result = align_stages(torch.tensor([0.0, 2, 4]), reference, window_length=5)
    assert result.window_start.item() == 2
    assert result.window_rmse.item() == pytest.approx(0, abs=1e-6)
    assert result.window_pearson.item() == pytest.approx(1)
    # A block deeper than the reference is laid over all of it.
    deeper = align_stages(torch.linspace(0, 4, 9), torch.tensor([0.0, 2, 4]))
    assert deeper.window_length == 3 and deeper.window_start.item() == 0
    assert deeper.window_rmse.item() == pytest.approx(0, abs=1e-6)


# --- undefined values ---


def test_few_layers_and_constant_curves():
    reference = normal(12)
    two = align_stages(torch.tensor([0.0, 1.0]), reference)
    assert two.pearson.isnan() and two.window_pearson.isnan() and two.rmse.isfinite()
    one = align_stages(torch.tensor([0.5]), reference)
    for value in (one.pearson, one.rmse, one.max_abs, one.dtw_cost):
        assert value.isnan()
    assert one.window_rmse.isfinite()
    for constant in (torch.full((7,), 0.1), 0.1 * torch.tensor([1 + 1e-7, 1, 1, 1, 1, 1, 1])):
        result = align_stages(constant, reference)
        assert result.pearson.isnan() and result.rmse.isfinite()
    assert align_stages(reference, torch.full((7,), 0.1)).pearson.isnan()
    assert align_stages(torch.full((2, 7), 0.1), reference).stability.isnan().all()


def test_small_metrics_have_a_correlation():
    curve, reference = normal(9), normal(9, seed=1)
    expected = align_stages(curve, reference).pearson
    tiny = align_stages(1e-25 * curve, 1e-25 * reference)
    assert torch.allclose(tiny.pearson, expected, atol=1e-4)


def test_single_profile_gives_scalars():
    profile, reference = normal(2, 5), normal(9, seed=1)
    both = align_stages(profile, reference, n_permutations=20, seed=0)
    for t in range(2):
        single = align_stages(profile[t], reference, n_permutations=20, seed=0)
        for name in ("pearson", "rmse", "max_abs", "dtw_cost", "window_start", "window_rmse"):
            assert getattr(single, name).shape == ()
            assert torch.allclose(getattr(single, name), getattr(both, name)[t])
        assert single.stability.isnan()
        assert torch.equal(single.null.window_p, both.null.window_p[t])
    expected = torch.corrcoef(profile)[0, 1]
    assert torch.allclose(both.stability[1], expected, atol=1e-6)


def test_half_precision_profiles():
    profile, reference = normal(5).bfloat16(), normal(9, seed=1).bfloat16()
    result = align_stages(profile, reference)
    assert result.rmse.dtype == torch.float32
    assert torch.equal(result.rmse, align_stages(profile.float(), reference.float()).rmse)


# --- permutation null ---


def test_null_is_reproducible_and_leaves_the_global_generator_alone():
    profile, reference = normal(8), normal(20, seed=1)
    state = torch.get_rng_state()
    first = align_stages(profile, reference, n_permutations=50, seed=3).null
    assert torch.equal(torch.get_rng_state(), state)
    again = align_stages(profile, reference, n_permutations=50, seed=3).null
    assert first.pearson_p == again.pearson_p and first.n_permutations == 50
    assert align_stages(profile, reference).null is None


def test_null_tells_a_matching_order_from_a_random_one():
    reference = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.3, 1.0, 0.6, 0.4, 0.2])
    good = align_stages(reference, reference, n_permutations=200, seed=0).null
    for p in (good.pearson_p, good.rmse_p, good.window_p):
        assert p.item() == pytest.approx(1 / 201)
    bad = align_stages(-reference, reference, n_permutations=200, seed=0).null
    assert bad.pearson_p.item() > 0.99


def test_null_approaches_the_exact_permutation_test():
    profile, reference = torch.tensor([0.3, 1.0, 0.1, 0.6]), torch.tensor([0.2, 0.8, 0.5, 0.4])
    observed = align_stages(profile, reference)
    exact = {"rmse": 0, "window_rmse": 0, "pearson": 0}
    orders = list(itertools.permutations(range(4)))
    for order in orders:
        permuted = align_stages(profile[list(order)], reference)
        exact["rmse"] += bool(permuted.rmse <= observed.rmse + 1e-6)
        exact["window_rmse"] += bool(permuted.window_rmse <= observed.window_rmse + 1e-6)
        exact["pearson"] += bool(permuted.pearson >= observed.pearson - 1e-6)
    null = align_stages(profile, reference, n_permutations=4000, seed=1).null
    assert null.rmse_p.item() == pytest.approx(exact["rmse"] / len(orders), abs=0.03)
    assert null.window_p.item() == pytest.approx(exact["window_rmse"] / len(orders), abs=0.03)
    assert null.pearson_p.item() == pytest.approx(exact["pearson"] / len(orders), abs=0.03)


def test_null_of_an_undefined_statistic():
    null = align_stages(torch.full((5,), 0.1), normal(9), n_permutations=10, seed=0).null
    assert null.pearson_p.isnan()
    assert null.rmse_p.item() == 1  # every order of a constant is as good


# --- refusals ---


def test_refusals():
    profile, reference = normal(5), normal(9, seed=1)
    with pytest.raises(ValueError, match=r"profile is not finite in layer\(s\) \[2\]"):
        align_stages(torch.tensor([0.0, 1, float("nan"), 2]), reference)
    with pytest.raises(ValueError, match="reference_profile is not finite"):
        align_stages(profile, reference / 0)
    with pytest.raises(ValueError, match="reference_profile has shape"):
        align_stages(profile, reference[:0])
    with pytest.raises(ValueError, match="grid=1"):
        align_stages(profile, reference, grid=1)
    with pytest.raises(ValueError, match="n_permutations=5 with seed=None"):
        align_stages(profile, reference, n_permutations=5)
    for bad in (0, 1, 10):
        with pytest.raises(ValueError, match=f"window_length={bad}"):
            align_stages(profile, reference, window_length=bad)
    for bad in (0, 5):
        with pytest.raises(ValueError, match=f"gap={bad} for 5 residual streams"):
            angular_distance(normal(5, 3), gap=bad)
    with pytest.raises(ValueError, match="gap=1 for 1 residual streams"):
        block_influence(normal(1, 3))


# --- distances between layers ---


def test_rotation_by_a_fixed_angle():
    theta = 0.2
    angle = theta * torch.arange(6, dtype=torch.float64)
    resid = torch.stack([angle.cos(), angle.sin()], -1)[:, None] * torch.tensor([[1.0], [7.0]])
    assert resid.shape == (6, 2, 2)
    for gap in (1, 3):
        expected = torch.full((6 - gap,), gap * theta / math.pi, dtype=torch.float64)
        assert torch.allclose(angular_distance(resid, gap), expected)
    expected = torch.full((5,), 1 - math.cos(theta), dtype=torch.float64)
    assert torch.allclose(block_influence(resid), expected)


def test_special_angles():
    x = torch.tensor([1.0, 2.0, -1.0])
    orthogonal = torch.tensor([2.0, -1.0, 0.0])
    resid = torch.stack([x, 5 * x, orthogonal, -orthogonal])
    assert torch.allclose(angular_distance(resid), torch.tensor([0, 0.5, 1.0]), atol=1e-6)
    assert torch.allclose(block_influence(resid), torch.tensor([0, 1.0, 2.0]), atol=1e-6)


def test_identical_streams_are_at_distance_zero_in_float32():
    resid = normal(1, 50, 300).expand(4, 50, 300)
    assert (angular_distance(resid) == 0).all()
    assert (block_influence(resid) == 0).all()


@few
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_distances_are_scale_free_means_over_tokens(seed, scale):
    resid = normal(4, 3, 5, 8, seed=seed)
    cosine = torch.cosine_similarity(resid[:-1], resid[1:], dim=-1)
    influence, angle = block_influence(resid), angular_distance(resid)
    assert torch.allclose(influence, 1 - cosine.mean((1, 2)), atol=1e-5)
    assert torch.allclose(angle, (cosine.arccos() / math.pi).mean((1, 2)), atol=1e-5)
    scales = torch.tensor([1.0, scale, 1.0, scale])[:, None, None, None]
    assert torch.allclose(block_influence(resid * scales), influence, atol=1e-5)
    assert torch.allclose(angular_distance(resid * scales), angle, atol=1e-5)


def test_zero_rows_and_no_batch():
    resid = normal(3, 4, 8)
    resid[1, 2] = 0
    assert block_influence(resid).isnan().all() and angular_distance(resid).isnan().all()
    assert angular_distance(resid, gap=2).isfinite().all()
    assert block_influence(normal(3, 8)).shape == (2,)
