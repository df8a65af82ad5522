"""Closed forms, laws and edge cases of the measurements on the residual stream."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.residual import (
    cosine_similarity,
    effective_rank,
    participation_ratio,
    residual_entropy,
    residual_entropy_bound,
    residual_norm,
    unit_vectors,
)

torch.set_num_threads(1)

seeds = st.integers(0, 2**31 - 1)
lengths = st.integers(1, 9)
widths = st.integers(1, 9)


def random_resid(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal_rows(n, d, seed=0):
    return torch.linalg.qr(random_resid(seed, d, n).double())[0].T.float()


def massive_first_token(c, n=64, d=512, seed=0):
    """Normal tokens of total energy R after a first token of energy M = c R."""
    resid = random_resid(seed, n, d)
    resid[0] *= (c * resid[1:].square().sum()).sqrt() / resid[0].norm()
    return resid


def from_spectrum(p, d, seed=0):
    """A matrix whose squared singular values are p."""
    left = orthonormal_rows(len(p), len(p), seed).double()
    right = orthonormal_rows(len(p), d, seed + 1).double()
    return (left @ (torch.tensor(p).double().sqrt()[:, None] * right)).float()


# Entropy


@pytest.mark.parametrize("n, d", [(2, 2), (5, 16), (64, 512), (16, 16)])
def test_orthonormal_tokens_reach_the_maximum(n, d):
    resid = orthonormal_rows(n, d)
    assert residual_entropy(resid).item() == pytest.approx(math.log(n), abs=1e-4)
    assert residual_entropy(resid, base=2).item() == pytest.approx(math.log2(n), abs=1e-4)
    for normalize in ("log_T", "log_min"):
        assert residual_entropy(resid, normalize=normalize).item() == pytest.approx(1, abs=1e-4)
    assert effective_rank(resid).item() == pytest.approx(n, rel=1e-4)
    assert participation_ratio(resid).item() == pytest.approx(n, rel=1e-4)


def test_more_tokens_than_dimensions():
    resid = orthonormal_rows(4, 4).repeat(3, 1)
    assert residual_entropy(resid).item() == pytest.approx(math.log(4), abs=1e-5)
    expected = math.log(4) / math.log(12)
    assert residual_entropy(resid, normalize="log_T").item() == pytest.approx(expected, abs=1e-5)
    assert residual_entropy(resid, normalize="log_min").item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1, 2, 5])
@pytest.mark.parametrize("n, d", [(6, 20), (20, 6)])
def test_rank_one_has_no_entropy(alpha, n, d):
    resid = random_resid(0, n, 1).double() * random_resid(1, 1, d).double()
    assert residual_entropy(resid, alpha).item() == pytest.approx(0, abs=1e-9)
    if alpha >= 1:
        # float32 rounds each entry; the shares near 1e-15 that this leaves matter to low orders.
        assert residual_entropy(resid.float(), alpha).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1, 1.5, 2, 3])
def test_known_spectrum(alpha):
    p = [0.5, 0.25, 0.15, 0.1]
    if alpha == 1:
        expected = -sum(x * math.log(x) for x in p)
    else:
        expected = math.log(sum(x**alpha for x in p)) / (1 - alpha)
    for resid in (from_spectrum(p, 4), from_spectrum(p, 9), from_spectrum(p, 9).T.contiguous()):
        assert residual_entropy(resid, alpha).item() == pytest.approx(expected, abs=1e-5)
    resid = from_spectrum(p, 9)
    shannon = -sum(x * math.log(x) for x in p)
    assert effective_rank(resid).item() == pytest.approx(math.exp(shannon), rel=1e-5)
    collision = sum(x * x for x in p)
    assert participation_ratio(resid).item() == pytest.approx(1 / collision, rel=1e-5)


@pytest.mark.parametrize("scale", [1e1, 1e2, 1e4, 1e6])
def test_entropy_under_a_massive_activation_is_exact(scale):
    # Reference: the singular values of the float64 matrix, without squaring it.
    resid = random_resid(1, 32, 64)
    resid[0] *= scale
    p = torch.linalg.svdvals(resid.double()).square()
    p = p / p.sum()
    expected = -(p * p.log()).sum().item()
    assert residual_entropy(resid).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "c, entropy, bound", [(1, 0.656, 0.664), (10, 0.162, 0.163), (100, 0.0230, 0.0232)]
)
def test_massive_first_token_of_512_dimensions(c, entropy, bound):
    resid = massive_first_token(c)
    assert residual_entropy(resid, normalize="log_T").item() == pytest.approx(entropy, rel=6e-3)
    assert residual_entropy_bound(resid, "log_T").item() == pytest.approx(bound, rel=6e-3)


@settings(deadline=None, max_examples=50)
@given(seeds, lengths, widths, st.sampled_from([0.0, 1e-3, 0.1, 1, 10, 1e3]), st.floats(0, 1))
def test_entropy_is_below_its_bound(seed, n, d, size_of_first, alignment):
    resid = random_resid(seed, n, d)
    resid[1:] = alignment * resid[:1] + (1 - alignment) * resid[1:]
    resid[0] *= size_of_first
    bound = residual_entropy_bound(resid)
    if size_of_first == 0:
        assert bound.isnan()
    else:
        assert residual_entropy(resid) <= bound + 1e-5
        assert bound <= math.log(min(n, d)) + 1e-5


def test_the_bound_is_reached_when_the_rest_is_isotropic():
    resid = orthonormal_rows(8, 8)
    resid[0] *= 3
    entropy = residual_entropy(resid).item()
    assert residual_entropy_bound(resid).item() == pytest.approx(entropy, abs=1e-5)
    assert residual_entropy_bound(resid, base=2).item() == pytest.approx(
        entropy / math.log(2), abs=1e-5
    )


@settings(deadline=None, max_examples=25)
@given(
    seeds, lengths, widths, st.sampled_from([1e-20, 1e-3, 7.0, 1e15]), st.sampled_from([0.5, 1, 2])
)
def test_entropy_laws(seed, n, d, scale, alpha):
    resid = random_resid(seed, 2, n, d)
    entropy = residual_entropy(resid, alpha)
    assert entropy.shape == (2,)
    assert (entropy >= -1e-6).all() and (entropy <= math.log(min(n, d)) + 1e-5).all()
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(residual_entropy(scale * resid, alpha), entropy, **close)
    # Rotations of the basis and the order of tokens do not matter.
    rotation = orthonormal_rows(d, d, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        residual_entropy((resid @ rotation)[:, order], alpha), entropy, **close
    )
    # Entropies fall with the order; so participation ratio <= effective rank.
    assert (residual_entropy(resid, alpha + 1) <= entropy + 1e-5).all()


@settings(deadline=None, max_examples=25)
@given(seeds, st.integers(2, 9), widths)
def test_center_and_row_norm_do_what_they_say(seed, n, d):
    resid = random_resid(seed, 2, n, d)
    offset = random_resid(seed + 1, d)
    centered = resid - resid.mean(-2, keepdim=True)
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(
        residual_entropy(resid + offset, center=True), residual_entropy(centered), **close
    )
    lengths_of_tokens = torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)) + 0.1
    normed = torch.nn.functional.normalize(resid, dim=-1)
    torch.testing.assert_close(
        residual_entropy(resid * lengths_of_tokens, row_norm=True),
        residual_entropy(normed),
        **close,
    )


def test_row_norm_comes_after_centering():
    resid = random_resid(3, 6, 4) + 5
    centered = resid - resid.mean(0)
    expected = residual_entropy(torch.nn.functional.normalize(centered, dim=-1))
    torch.testing.assert_close(residual_entropy(resid, center=True, row_norm=True), expected)


def test_row_norm_removes_the_compression():
    resid = massive_first_token(1000)
    assert residual_entropy(resid, normalize="log_T").item() < 0.01
    assert residual_entropy(resid, normalize="log_T", row_norm=True).item() > 0.9


def test_centering_equal_tokens_leaves_nothing_to_measure():
    # In float64 the mean of three times 0.7 is not 0.7.
    resid = torch.full((3, 2), 0.7, dtype=torch.float64)
    assert (resid != resid.mean(0)).all()
    assert residual_entropy(resid, center=True).isnan()
    # One token at the mean: its rounding error is not scaled up to a direction of its own.
    resid[:2, 0] = torch.tensor([1.0, -1.0], dtype=torch.float64)
    resid[2, 0] = 0
    assert residual_entropy(resid, center=True, row_norm=True).item() == pytest.approx(0, abs=1e-6)


def test_one_token_and_none():
    one = random_resid(4, 2, 1, 5)
    assert residual_entropy(one).tolist() == [0, 0]
    assert effective_rank(one).tolist() == [1, 1]
    assert participation_ratio(one).tolist() == [1, 1]
    assert residual_entropy_bound(one).tolist() == pytest.approx([0, 0], abs=1e-6)
    for normalize in ("log_T", "log_min"):
        assert residual_entropy(one, normalize=normalize).isnan().all()
        assert residual_entropy_bound(one, normalize).isnan().all()
    assert residual_entropy(one, center=True).isnan().all()
    for metric in (residual_entropy, effective_rank, residual_norm):
        assert metric(one, drop_bos=True).isnan().all()
    for agg in ("token_max", "fro"):
        assert residual_norm(one, agg, drop_bos=True).isnan().all()
    assert cosine_similarity(one, one, drop_bos=True).isnan().all()


def test_zero_tokens():
    resid = random_resid(5, 4, 6)
    with_zero = torch.cat([resid, torch.zeros(1, 6)])
    torch.testing.assert_close(residual_entropy(with_zero), residual_entropy(resid))
    torch.testing.assert_close(
        residual_entropy(with_zero, row_norm=True), residual_entropy(resid, row_norm=True)
    )
    torch.testing.assert_close(
        residual_entropy(with_zero, normalize="log_T"), residual_entropy(resid) / math.log(5)
    )
    for alpha in (0.5, 1, 2):
        assert residual_entropy(torch.zeros(4, 6), alpha).isnan()
    assert residual_entropy_bound(torch.zeros(4, 6)).isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_give_nan_for_their_sequence_alone(value):
    resid = random_resid(6, 2, 4, 6)
    expected = residual_entropy(resid[0])
    resid[1, 2, 3] = value
    for alpha in (0.5, 1, 2):
        entropy = residual_entropy(resid, alpha)
        assert entropy[0].isfinite() and entropy[1].isnan()
    torch.testing.assert_close(residual_entropy(resid)[0], expected)


@pytest.mark.parametrize("alpha", [0.5, 1, 2])
@pytest.mark.parametrize("n, d", [(3, 5), (5, 3)])
def test_gradient_of_the_entropy(alpha, n, d):
    resid = random_resid(7, n, d).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: residual_entropy(x, alpha), resid)
    assert torch.autograd.gradcheck(
        lambda x: residual_entropy(x, alpha, center=True, row_norm=True), resid
    )
    assert torch.autograd.gradcheck(residual_entropy_bound, resid)


def test_gradient_is_finite_for_equal_and_zero_singular_values():
    resid = torch.zeros(4, 6)
    resid[:3, :3] = torch.eye(3)
    resid.requires_grad_()
    residual_entropy(resid).backward()
    # The maximum over rank 3: no first-order change, and none invented for the zero direction.
    torch.testing.assert_close(resid.grad, torch.zeros(4, 6), atol=1e-6, rtol=0)


# Norm and cosine


def test_norm_closed_form():
    resid = torch.tensor([[3.0, 4.0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 12.0]])
    assert residual_norm(resid, "none").tolist() == [5, 0, 12]
    assert residual_norm(resid).item() == pytest.approx(17 / 3)
    assert residual_norm(resid, "token_max").item() == 12
    assert residual_norm(resid, "fro").item() == pytest.approx(13)
    assert residual_norm(resid, rms=True).item() == pytest.approx(17 / 6)
    assert residual_norm(resid, drop_bos=True).item() == 6


def test_cosine_closed_form():
    a = torch.tensor([[1.0, 0], [2.0, 0], [-1, 0]])
    b = torch.tensor([[5.0, 0], [0, 1.0], [1.0, 1.0]])
    expected = [1, 0, -math.sqrt(0.5)]
    assert cosine_similarity(a, b, "none").tolist() == pytest.approx(expected)
    assert cosine_similarity(a, b).item() == pytest.approx(sum(expected) / 3)
    assert cosine_similarity(a, b, drop_bos=True).item() == pytest.approx(sum(expected[1:]) / 2)


@settings(deadline=None, max_examples=25)
@given(seeds, lengths, st.sampled_from([1e-30, 1e-4, 1.0, 1e30]))
def test_cosine_laws(seed, n, scale):
    a, b = random_resid(seed, 2, 3, n, 5)
    cosine = cosine_similarity(a, b, "none")
    assert cosine.shape == (3, n) and (cosine.abs() <= 1).all()
    torch.testing.assert_close(cosine_similarity(scale * a, b, "none"), cosine)
    torch.testing.assert_close(cosine_similarity(b, -a, "none"), -cosine)
    same = cosine_similarity(a, scale * a, "none")
    assert (same <= 1).all()
    torch.testing.assert_close(same, torch.ones(3, n))
    torch.testing.assert_close(cosine_similarity(a, b), cosine.mean(-1))
    torch.testing.assert_close(
        cosine_similarity(a, b[0]), cosine_similarity(a, b[:1].expand(3, n, 5))
    )


def test_a_zero_token_has_no_direction():
    a = random_resid(8, 2, 3, 4)
    b = a.clone()
    b[1, 2] = 0
    assert cosine_similarity(a, b, "none").isnan().tolist() == [[False] * 3, [False, False, True]]
    assert cosine_similarity(a, b).isnan().tolist() == [False, True]
    assert unit_vectors(torch.zeros(2, 3)).isnan().all()


def test_gradients_of_norm_and_cosine():
    a, b = random_resid(9, 2, 3, 4).double().requires_grad_()
    for agg in ("token_mean", "token_max", "fro", "none"):
        assert torch.autograd.gradcheck(lambda x, agg=agg: residual_norm(x, agg), a)
    assert torch.autograd.gradcheck(cosine_similarity, (a, b))


# Everything

METRICS = {
    "entropy": residual_entropy,
    "entropy of order 2": lambda x, **k: residual_entropy(x, 2, **k),
    "entropy log_T": lambda x, **k: residual_entropy(x, normalize="log_T", **k),
    "entropy centred": lambda x, **k: residual_entropy(x, center=True, row_norm=True, **k),
    "effective rank": effective_rank,
    "participation ratio": participation_ratio,
    "token_mean": residual_norm,
    "token_max": lambda x, **k: residual_norm(x, "token_max", **k),
    "fro": lambda x, **k: residual_norm(x, "fro", **k),
    "cosine": lambda x, **k: cosine_similarity(x, x.flip(-1), **k),
}


@settings(deadline=None, max_examples=25)
@given(
    seeds,
    st.lists(st.tuples(st.integers(1, 8), st.booleans()), min_size=1, max_size=4),
    st.booleans(),
)
def test_padding_never_changes_a_number(seed, rows, drop_bos):
    total, d = 9, 4
    mask = torch.zeros(len(rows), total, dtype=torch.bool)
    batch = torch.full((len(rows), total, d), math.nan)
    singles = []
    for i, (n, left) in enumerate(rows):
        start = total - n if left else 0
        mask[i, start : start + n] = True
        singles.append(random_resid(seed + i, n, d))
        batch[i, start : start + n] = singles[-1]
    close = {"equal_nan": True, "rtol": 1e-5, "atol": 1e-6}
    for name, metric in METRICS.items():
        expected = torch.stack([metric(x, drop_bos=drop_bos) for x in singles])
        actual = metric(batch, mask=mask, drop_bos=drop_bos)
        torch.testing.assert_close(actual, expected, **close, msg=name)
    expected = torch.stack([residual_entropy_bound(x) for x in singles])
    torch.testing.assert_close(residual_entropy_bound(batch, mask=mask), expected, **close)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision(name, dtype):
    resid = random_resid(10, 2, 6, 8).to(dtype)
    value = METRICS[name](resid)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = METRICS[name](resid.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)


def test_drop_bos_is_slicing():
    resid = massive_first_token(1000, n=9, d=6)
    for name, metric in METRICS.items():
        torch.testing.assert_close(metric(resid, drop_bos=True), metric(resid[1:]), msg=name)
        assert not torch.allclose(metric(resid, drop_bos=True), metric(resid)), name


@pytest.mark.parametrize(
    "function, kwargs, message",
    [
        (residual_entropy, {"alpha": 0}, "alpha=0"),
        (residual_entropy, {"alpha": math.inf}, "alpha=inf"),
        (residual_entropy, {"alpha": math.nan}, "alpha=nan"),
        (residual_entropy, {"base": 1}, "base=1"),
        (residual_entropy, {"base": -2}, "base=-2"),
        (residual_entropy, {"base": "2"}, "base='2'"),
        (residual_entropy, {"normalize": "log"}, "normalize='log'"),
        (residual_entropy_bound, {"normalize": "log"}, "normalize='log'"),
        (residual_norm, {"agg": "mean"}, "agg='mean'.*'token_max'"),
        (residual_norm, {"agg": "none", "drop_bos": True}, "select from the result"),
        (residual_norm, {"agg": "none", "mask": torch.ones(3).bool()}, "select from the result"),
    ],
)
def test_bad_options_are_refused(function, kwargs, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(function)(random_resid(0, 3, 4), **kwargs)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[3, 4\] and \[3, 5\]"):
        inspect.unwrap(cosine_similarity)(random_resid(0, 3, 4), random_resid(0, 3, 5))
    with pytest.raises(ValueError, match=r"mask has shape \[2\]"):
        inspect.unwrap(residual_entropy)(random_resid(0, 3, 4), mask=torch.ones(2).bool())
    with pytest.raises(TypeError, match="int64"):
        inspect.unwrap(residual_entropy)(torch.ones(3, 4, dtype=torch.long))
