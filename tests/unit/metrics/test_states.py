"""Directions, dtypes and pooling that the trajectory measurements share."""

import pytest
import torch

from tl_loops.metrics.states import direction_cosine, measured_states, pool_tokens

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_to_float32(dtype):
    assert measured_states(torch.ones(2, 3, dtype=dtype)).dtype == torch.float32


def test_float64_stays():
    assert measured_states(torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float64


def test_refuses_a_tensor_without_iterations():
    with pytest.raises(ValueError, match="iteration"):
        measured_states(torch.randn(3))
    with pytest.raises(ValueError, match="iteration"):
        measured_states(torch.randn(0, 3))


def test_cosine_of_tiny_and_huge_vectors():
    tiny, huge = torch.tensor([1e-30, 1e-30]), torch.tensor([1e30, 0.0])
    assert direction_cosine(tiny, huge).item() == pytest.approx(2**-0.5)


def test_cosine_broadcasts_and_is_nan_at_zero():
    a = torch.stack([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])])
    cosine = direction_cosine(a, torch.tensor([0.0, 2.0]))
    assert cosine[0] == 0 and cosine[1].isnan()


def test_pooling_sees_the_real_tokens_of_each_row():
    values = torch.arange(12.0).reshape(2, 2, 3)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    pooled = pool_tokens(lambda v: v.mean(-2), [values], "token_mean", mask)
    torch.testing.assert_close(pooled, torch.tensor([[0.5, 4.5], [6.5, 10.5]]))


def test_a_mask_needs_tokens():
    with pytest.raises(ValueError, match="token axis"):
        pool_tokens(lambda v: v.mean(-2), [torch.ones(3)], "token_mean", torch.ones(3) > 0)
