"""Massive activations and the length of the first token."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.massive import bos_norm_ratio, massive_activations

torch.set_num_threads(1)


def random_resid(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_planted_activations_are_found():
    resid = 0.1 * random_resid(0, 2, 5, 64)
    resid[0, 0, 7] = -900
    resid[0, 0, 31] = 400
    resid[1, 3, 2] = 150
    found = massive_activations(resid)
    assert found.index.tolist() == [[0, 0, 7], [0, 0, 31], [1, 3, 2]]
    assert found.value.tolist() == [-900, 400, 150]
    assert found.count.tolist() == [2, 1]
    median = resid.abs().flatten(1).sort(-1).values[:, (5 * 64 - 1) // 2]
    torch.testing.assert_close(found.median, median)
    torch.testing.assert_close(found.ratio, found.value.abs() / median[[0, 0, 1]])


def test_both_thresholds_must_hold():
    resid = torch.ones(3, 3)
    resid[0, 0] = 999
    assert massive_activations(resid).count.item() == 0
    resid[0, 0] = 1000
    assert massive_activations(resid).count.item() == 1
    small = resid / 10
    assert massive_activations(small).count.item() == 0  # 100 is not above 100
    assert massive_activations(small, magnitude=99).count.item() == 1
    assert massive_activations(resid, ratio=1001).count.item() == 0
    assert massive_activations(torch.full((3, 3), 1e4)).count.item() == 0


def test_the_median_is_that_of_the_own_sequence():
    resid = torch.stack([torch.full((2, 3), 0.1), torch.full((2, 3), 10.0)])
    resid[:, 0, 0] = 500
    found = massive_activations(resid)
    assert found.index.tolist() == [[0, 0, 0]]
    assert found.count.tolist() == [1, 0]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31 - 1), st.integers(1, 6), st.booleans())
def test_padding_is_neither_reported_nor_in_the_median(seed, n, left):
    total, d = 8, 16
    start = total - n if left else 0
    resid = torch.full((total, d), 1e6)
    single = 0.1 * random_resid(seed, n, d)
    single[0, 3] = 500
    resid[start : start + n] = single
    mask = torch.zeros(total, dtype=torch.bool)
    mask[start : start + n] = True
    found, expected = massive_activations(resid, mask=mask), massive_activations(single)
    assert found.count.item() == expected.count.item() == 1
    assert found.index.tolist() == [[start, 3]]
    torch.testing.assert_close(found.median, expected.median)
    torch.testing.assert_close(found.ratio, expected.ratio)
    ratio = bos_norm_ratio(resid, mask=mask)
    torch.testing.assert_close(ratio, bos_norm_ratio(single), equal_nan=True)


def test_zero_median_and_nan():
    resid = torch.zeros(2, 3, 4)
    resid[0, 1, 1] = 200
    resid[1] = 1
    resid[1, 1, 1] = math.nan
    resid[1, 0, 0] = 1e6
    found = massive_activations(resid)
    assert found.index.tolist() == [[0, 1, 1]]
    assert found.ratio.tolist() == [math.inf]
    assert found.median[0] == 0 and found.median[1].isnan()
    assert massive_activations(torch.zeros(3, 4)).count.item() == 0


def test_bfloat16_values_are_returned_exactly():
    resid = (0.1 * random_resid(1, 4, 8)).bfloat16()
    resid[0, 2] = -300
    found = massive_activations(resid)
    assert found.value.dtype == found.median.dtype == torch.float32
    assert found.value.tolist() == [-300]
    assert found.median.item() == resid.abs().float().median().item()


def test_bos_norm_ratio_closed_forms():
    resid = torch.zeros(2, 4, 3)
    resid[0, 0, 0], resid[0, 1:, 1] = 30, torch.tensor([1.0, 2.0, 3.0])
    resid[1, :, 2] = 5
    assert bos_norm_ratio(resid).tolist() == pytest.approx([15, 1])
    assert bos_norm_ratio(resid[:, :1]).isnan().all()
    assert bos_norm_ratio(torch.zeros(4, 3)).isnan()
    first_only = torch.zeros(4, 3)
    first_only[0] = 1
    assert bos_norm_ratio(first_only).item() == math.inf


def test_bos_norm_ratio_is_scale_invariant_and_differentiable():
    resid = random_resid(2, 2, 5, 4).double().requires_grad_()
    torch.testing.assert_close(bos_norm_ratio(1e3 * resid), bos_norm_ratio(resid))
    assert torch.autograd.gradcheck(bos_norm_ratio, resid)
    assert bos_norm_ratio(resid.detach().bfloat16()).dtype == torch.float32


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="magnitude=-1"):
        massive_activations(torch.ones(2, 2), magnitude=-1)
    with pytest.raises(ValueError, match="ratio=nan"):
        massive_activations(torch.ones(2, 2), ratio=math.nan)
    with pytest.raises(TypeError, match="int64"):
        inspect.unwrap(bos_norm_ratio)(
            torch.ones(2, 2, dtype=torch.long), mask=torch.ones(2, dtype=torch.bool)
        )
