"""The bounds hold for real attention: masked, rotary, biased, grouped, normed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.lipschitz import (
    attention_lipschitz_bound,
    attention_lipschitz_bound_from_qk,
    attention_lipschitz_ratio,
)

torch.set_num_threads(1)

laws = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**31 - 1)


def randn(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rotate(x):
    """Rotary embedding of `[..., pos, head, d_head]` with one frequency per pair of dimensions."""
    pos, d_head = x.shape[-3], x.shape[-1]
    frequency = 1.0 / 10 ** (torch.arange(d_head // 2).double() / d_head)
    angle = torch.arange(pos).double()[:, None, None] * frequency
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def queries_and_keys(x, W_Q, W_K, b_Q, b_K, rotary):
    q = torch.einsum("...pm,hmd->...phd", x, W_Q) + b_Q
    k = torch.einsum("...pm,hmd->...phd", x, W_K) + b_K
    return (rotate(q), rotate(k)) if rotary else (q, k)


def causal_pattern(q, k, scale):
    k = k.repeat_interleave(q.shape[-2] // k.shape[-2], -2)
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) / scale
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(mask, -torch.inf).softmax(-1)


@laws
@given(seeds, st.booleans(), st.sampled_from([1, 2, 4]), st.floats(0.01, 30), st.floats(0, 3))
def test_both_bounds_hold(seed, rotary, n_key_heads, size, bias):
    x = size * randn(seed, 5, 6)
    x_other = x + 10 ** (-2 * torch.rand(1, generator=torch.Generator().manual_seed(seed))) * randn(
        seed + 1, 5, 6
    )
    W_Q, W_K = randn(seed + 2, 4, 6, 8), randn(seed + 3, n_key_heads, 6, 8)
    b_Q, b_K = bias * randn(seed + 4, 4, 8), bias * randn(seed + 5, n_key_heads, 8)
    q, k = queries_and_keys(x, W_Q, W_K, b_Q, b_K, rotary)
    q_other, k_other = queries_and_keys(x_other, W_Q, W_K, b_Q, b_K, rotary)
    scale = 8**0.5
    patterns = causal_pattern(q, k, scale), causal_pattern(q_other, k_other, scale)

    loose = attention_lipschitz_bound(x, x_other, W_Q, W_K, b_Q, b_K, rotary=rotary)
    tight = attention_lipschitz_bound_from_qk(q, k, q_other, k_other)
    for bound in (loose, tight):
        ratio = attention_lipschitz_ratio(*patterns, bound)
        assert ratio.shape == (4,)
        assert (ratio <= 1 + 1e-9).all()
    if rotary:
        assert (tight <= loose * (1 + 1e-9)).all()


def test_query_key_norm_needs_the_bound_from_queries_and_keys():
    """Normed queries do not shrink with the weights; the bound from the weights would fail."""
    x, x_other = randn(0, 5, 6), randn(1, 5, 6)
    W = 1e-3 * randn(2, 1, 6, 8)

    def normed(x):
        q, _ = queries_and_keys(x, W, W, torch.zeros(8), torch.zeros(8), True)
        return q / q.square().mean(-1, keepdim=True).sqrt()

    q, q_other = normed(x), normed(x_other)
    patterns = causal_pattern(q, q, 8**0.5), causal_pattern(q_other, q_other, 8**0.5)
    bound = attention_lipschitz_bound_from_qk(q, q, q_other, q_other)
    assert attention_lipschitz_ratio(*patterns, bound).item() <= 1
    wrong = attention_lipschitz_bound(x, x_other, W, W)
    assert attention_lipschitz_ratio(*patterns, wrong).item() > 1


def test_rotation_does_not_keep_the_spectral_norm():
    """Why the rotary bound uses the Frobenius norm: rotated rows may lose or gain alignment."""
    rows = rotate(torch.ones(4, 1, 2, dtype=torch.float64)).squeeze(1)
    spread, aligned = torch.linalg.matrix_norm(rows, 2), torch.linalg.matrix_norm(rows)
    assert aligned > 1.05 * spread
    torch.testing.assert_close(rows.norm(dim=-1), torch.full((4,), math.sqrt(2)).double())


def test_two_tokens_and_one_dimension_by_hand():
    """The second row is [sigma(-z), sigma(z)] with z = q (k_1 - k_0); the first row is constant."""
    q, q_other = torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.5])
    k = torch.tensor([0.3, 0.9])
    shape = (2, 1, 1)
    pattern, other = (causal_pattern(v.reshape(shape), k.reshape(shape), 1.0) for v in (q, q_other))
    difference = torch.sigmoid(torch.tensor(0.9)) - torch.sigmoid(torch.tensor(0.6))
    torch.testing.assert_close((other - pattern).norm(), math.sqrt(2) * difference)
    bound = attention_lipschitz_bound_from_qk(
        q.reshape(shape), k.reshape(shape), q_other.reshape(shape), k.reshape(shape)
    )
    assert bound.item() == pytest.approx(0.5 * k.norm().item() * 0.5)
    ratio = attention_lipschitz_ratio(pattern, other, bound)
    expected = math.sqrt(2) * difference.item() / bound.item()
    assert ratio.item() == pytest.approx(expected, rel=1e-5)


def test_formula_from_the_weights_by_hand():
    """Diagonal weights and inputs, where every norm is visible."""
    x, x_other = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([4.0, 1.0]))
    W_Q, W_K = (
        torch.diag(torch.tensor([2.0, 5.0]))[None],
        torch.diag(torch.tensor([7.0, 1.0]))[None],
    )
    b_Q, b_K = torch.tensor([[0.0, 3.0]]), torch.tensor([[4.0, 0.0]])
    plain = attention_lipschitz_bound(x, x_other, W_Q, W_K, rotary=False, attn_scale=1.0)
    assert plain.item() == pytest.approx(0.5 * 2 * 4 * 14 * 1)
    biased = attention_lipschitz_bound(x, x_other, W_Q, W_K, b_Q, b_K, False, attn_scale=1.0)
    assert biased.item() == pytest.approx(0.5 * (2 * 4 * 14 + math.sqrt(2) * 3))
    rotary = attention_lipschitz_bound(x, x_other, W_Q, W_K, b_Q, b_K, attn_scale=2.0)
    bias = math.sqrt(2) * (5 * 4 + 7 * 3)
    assert rotary.item() == pytest.approx(0.5 * (2 * math.sqrt(17) * 35 + bias) / 2)


def test_default_scale_is_the_root_of_the_head_width():
    x, x_other, W = randn(0, 3, 6), randn(1, 3, 6), randn(2, 2, 6, 16)
    torch.testing.assert_close(
        attention_lipschitz_bound(x, x_other, W, W),
        attention_lipschitz_bound(x, x_other, W, W, attn_scale=4.0),
    )


def test_equal_inputs_have_bound_and_ratio_zero():
    x, W = randn(0, 3, 6), randn(1, 2, 6, 8)
    bound = attention_lipschitz_bound(x, x, W, W)
    assert (bound == 0).all()
    pattern = torch.ones(2, 3, 3) / 3
    assert (attention_lipschitz_ratio(pattern, pattern, bound.float()) == 0).all()
    assert attention_lipschitz_ratio(pattern, pattern + 0.1, bound.float()).isinf().all()


def test_batches_are_measured_one_by_one():
    x, x_other, W = randn(0, 2, 3, 5, 6), randn(1, 2, 3, 5, 6), randn(2, 4, 6, 8)
    bound = attention_lipschitz_bound(x, x_other, W, W)
    assert bound.shape == (2, 3, 4)
    torch.testing.assert_close(bound[1, 2], attention_lipschitz_bound(x[1, 2], x_other[1, 2], W, W))


def test_bfloat16_is_measured_in_float32():
    x, x_other, W = (randn(i, 6, 6).bfloat16() for i in range(3))
    assert attention_lipschitz_bound(x, x_other, W[None], W[None]).dtype == torch.float32


def test_refuses_heads_that_cannot_be_grouped():
    x = randn(0, 3, 6)
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        attention_lipschitz_bound(x, x, randn(1, 4, 6, 8), randn(2, 3, 6, 8))
