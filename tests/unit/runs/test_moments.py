import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.closeness import assert_close
from tl_loops.runs.moments import Moments

FAST = settings(deadline=None, max_examples=25)
VALUES = st.floats(-1e3, 1e3, width=32) | st.sampled_from([float("nan"), float("inf")])
SAMPLES = st.lists(VALUES, max_size=20)


def moments(samples: list[float]) -> Moments:
    return Moments.of(torch.tensor(samples, dtype=torch.float64).reshape(1, -1))


def assert_same(a: Moments, b: Moments, rtol: float = 1e-12) -> None:
    assert torch.equal(a.count, b.count) and torch.equal(a.undefined, b.undefined)
    assert_close(a.mean, b.mean, rtol=rtol, atol=1e-10, equal_nan=True)
    assert_close(a.m2, b.m2, rtol=1e-9, atol=1e-6)


def assert_identical(a: Moments, b: Moments) -> None:
    for name, tensor in a.tensors().items():
        assert torch.equal(tensor.nan_to_num(nan=-7.0), getattr(b, name).nan_to_num(nan=-7.0)), name


def test_mean_and_deviation_are_those_of_torch():
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
    m = Moments.of(x)
    assert m.mean.dtype == m.m2.dtype == torch.float64
    assert_close(m.mean, x.double().mean(-1))
    assert_close(m.std(), x.double().std(-1))
    assert_close(m.std(ddof=0), x.double().std(-1, correction=0))
    assert (m.count == 40).all() and (m.undefined == 0).all()


def test_undefined_samples_are_counted_and_left_out():
    m = Moments.of(torch.tensor([[1.0, torch.nan, 3.0, torch.inf], [torch.nan] * 4]))
    assert m.count.tolist() == [2, 0] and m.undefined.tolist() == [2, 4]
    assert m.mean[0] == 2.0 and m.std()[0] == pytest.approx(2**0.5)
    assert m.mean[1].isnan() and m.std()[1].isnan() and m.m2[1] == 0


def test_deviation_needs_more_samples_than_ddof():
    one = Moments.of(torch.tensor([[4.0]]))
    assert one.std().isnan().all() and one.std(ddof=0).item() == 0


@FAST
@given(SAMPLES, st.integers(0, 20), st.integers(0, 20))
def test_any_split_gives_the_moments_of_the_whole(samples, i, j):
    i, j = sorted((i, j))
    parts = [moments(samples[:i]), moments(samples[i:j]), moments(samples[j:])]
    whole = moments(samples)
    assert_same(parts[0].merge(parts[1]).merge(parts[2]), whole)
    assert_same(parts[0].merge(parts[1].merge(parts[2])), whole)


@FAST
@given(SAMPLES, SAMPLES)
def test_the_order_of_a_merge_does_not_matter(a, b):
    assert_same(moments(a).merge(moments(b)), moments(b).merge(moments(a)))


@FAST
@given(SAMPLES)
def test_the_empty_moments_are_neutral_to_the_bit(samples):
    m = moments(samples)
    assert_identical(m.merge(Moments.empty(1)), m)
    assert_identical(Moments.empty(1).merge(m), m)


def test_merging_keeps_its_digits_far_from_zero():
    x = 1e9 + torch.randn(1, 1000, generator=torch.Generator().manual_seed(1)).double()
    m = Moments.empty(1)
    for sample in x.split(1, dim=1):
        m = m.merge(Moments.of(sample))
    assert_close(m.std(), x.std(-1), rtol=1e-6, atol=0)


def test_moments_of_other_shapes_do_not_merge():
    with pytest.raises(ValueError, match=r"\[2\] and \[3\]"):
        Moments.empty(2).merge(Moments.empty(3))


def test_scattered_entries_stand_at_their_places():
    whole = Moments.of(torch.tensor([[1.0, 3.0], [5.0, 5.0]])).scattered([4, 1], 5)
    assert whole.count.tolist() == [0, 2, 0, 0, 2]
    assert whole.mean.nan_to_num(nan=-1.0).tolist() == [-1, 5, -1, -1, 2]
    assert whole.m2.tolist() == [0, 0, 0, 0, 2]


def test_the_tensors_make_the_same_moments_again():
    m = Moments.of(torch.rand(4, 6, generator=torch.Generator().manual_seed(2)))
    assert_identical(Moments(**m.tensors()), m)
