"""Distances between attention patterns, and all pairs of blocks."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.pairwise import (
    pairwise_cosine,
    pairwise_pattern_distance,
    pattern_distance,
)
from tl_loops.metrics.residual import cosine_similarity

torch.set_num_threads(1)

HEADS = ["mean", "stack", "avg_pattern"]
seeds = st.integers(0, 2**31 - 1)
lengths = st.integers(1, 7)


def random_patterns(seed, *shape):
    """Causal softmax of normal scores: `[*shape, shape[-1]]`."""
    scores = torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(torch.ones(shape[-1], shape[-1]).triu(1).bool(), -math.inf).softmax(
        -1
    )


def random_resids(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sink_and_identity(n):
    sink = torch.zeros(n, n)
    sink[:, 0] = 1
    return sink, torch.eye(n)


@pytest.mark.parametrize("n", [2, 5, 33])
def test_distance_between_sink_and_identity(n):
    # The rows after the first differ by sqrt 2 each: the largest distance of causal patterns.
    sink, identity = sink_and_identity(n)
    expected = math.sqrt(2 * (n - 1))
    a = torch.stack([sink, sink, identity])
    b = torch.stack([identity, sink, sink])
    assert pattern_distance(a, b).item() == pytest.approx(expected * 2 / 3, rel=1e-5)
    assert pattern_distance(a, b, "stack").item() == pytest.approx(expected * 2**0.5, rel=1e-5)
    # What two heads exchange cancels in the average.
    assert pattern_distance(a, b, "avg_pattern").item() == pytest.approx(0, abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(seeds, lengths, st.sampled_from(HEADS))
def test_distance_is_a_metric(seed, n, heads):
    a, b, c = random_patterns(seed, 3, 2, 4, n)
    ab = pattern_distance(a, b, heads)
    assert ab.shape == (2,)
    assert (pattern_distance(a, a, heads) == 0).all()
    torch.testing.assert_close(ab, pattern_distance(b, a, heads))
    assert (pattern_distance(a, c, heads) <= ab + pattern_distance(b, c, heads) + 1e-6).all()
    limit = math.sqrt(2 * (n - 1)) * (2 if heads == "stack" else 1)
    assert (ab <= limit + 1e-6).all()


@settings(deadline=None, max_examples=25)
@given(seeds, lengths)
def test_ways_to_pool_heads_are_ordered(seed, n):
    a, b = random_patterns(seed, 2, 3, 4, n)
    mean = pattern_distance(a, b)
    # Triangle inequality, and root mean square >= mean.
    assert (pattern_distance(a, b, "avg_pattern") <= mean + 1e-6).all()
    assert (mean <= pattern_distance(a, b, "stack") / 4**0.5 + 1e-6).all()
    for heads in HEADS:
        torch.testing.assert_close(
            pattern_distance(a[:, :1], b[:, :1], heads), pattern_distance(a[:, :1], b[:, :1])
        )
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(
            pattern_distance(a[:, order], b[:, order], heads), pattern_distance(a, b, heads)
        )


def test_batch_axes_broadcast():
    states, reference = random_patterns(0, 5, 2, 3, 4), random_patterns(1, 2, 3, 4)
    distance = pattern_distance(states, reference)
    assert distance.shape == (5, 2)
    torch.testing.assert_close(distance[3, 1], pattern_distance(states[3, 1], reference[1]))


@pytest.mark.parametrize("heads", HEADS)
def test_pairwise_equals_pattern_distance(heads):
    patterns = random_patterns(2, 4, 2, 3, 5)
    matrix = pairwise_pattern_distance(patterns, heads)
    assert matrix.shape == (4, 4, 2)
    for i in range(4):
        for j in range(4):
            torch.testing.assert_close(
                matrix[i, j], pattern_distance(patterns[i], patterns[j], heads)
            )
    assert pairwise_pattern_distance(patterns[:, 0], heads).shape == (4, 4)


def test_distances_of_long_prompts_keep_their_digits():
    # One float32 sum over all 10^5 entries would be off by 10^-5 and more.
    a, b = random_patterns(3, 2, 2, 300)
    expected = (a - b).double().square().sum((-2, -1)).sqrt().mean().item()
    assert pattern_distance(a, b).item() == pytest.approx(expected, rel=2e-6)
    pairs = pairwise_pattern_distance(torch.stack([a, b]))
    assert pairs[0, 1].item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("heads", HEADS)
def test_a_cycle_of_blocks_gives_zeros_on_every_kth_diagonal(heads):
    cycle = random_patterns(4, 3, 2, 6)
    blocks = cycle.repeat(4, 1, 1, 1)
    matrix = pairwise_pattern_distance(blocks, heads)
    i, j = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    same = (i - j) % 3 == 0
    assert (matrix[same] == 0).all()
    assert (matrix[~same] > 0.1).all()
    torch.testing.assert_close(matrix[3:, 3:], matrix[:-3, :-3])


def test_cosine_of_equal_blocks_is_one_and_of_opposite_blocks_minus_one():
    x = random_resids(5, 2, 6, 8)
    matrix = pairwise_cosine(torch.stack([x, 3 * x, -0.5 * x]))
    assert matrix.shape == (3, 3, 2)
    expected = torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]])[..., None].expand(3, 3, 2)
    torch.testing.assert_close(matrix, expected)
    assert (matrix.abs() <= 1).all()


@settings(deadline=None, max_examples=25)
@given(seeds, lengths)
def test_pairwise_cosine_equals_cosine_similarity(seed, n):
    resids = random_resids(seed, 3, 2, n, 5)
    matrix = pairwise_cosine(resids)
    for i in range(3):
        for j in range(3):
            torch.testing.assert_close(matrix[i, j], cosine_similarity(resids[i], resids[j]))


def test_mean_over_tokens_weighs_tokens_equally():
    # A token of length 1000 counts as much as one of length 1: no pooled inner product.
    a = torch.tensor([[1000.0, 0.0], [0.0, 1.0]])
    b = torch.tensor([[1000.0, 0.0], [1.0, 0.0]])
    assert pairwise_cosine(torch.stack([a, b]))[0, 1].item() == pytest.approx(0.5)


def test_a_zero_token_makes_its_block_undefined():
    resids = random_resids(6, 3, 4, 5)
    resids[1, 2] = 0
    undefined = pairwise_cosine(resids).isnan()
    assert undefined[1].all() and undefined[:, 1].all()
    assert not undefined[[0, 0, 2, 2], [0, 2, 0, 2]].any()


@settings(deadline=None, max_examples=25)
@given(seeds, st.integers(1, 6), st.booleans(), st.booleans(), st.sampled_from(HEADS))
def test_padding_never_changes_a_number(seed, n, left, drop_bos, heads):
    total = 7
    start = total - n if left else 0
    mask = torch.zeros(2, total, dtype=torch.bool)
    mask[0, start : start + n] = True
    mask[1] = True
    patterns = torch.full((3, 2, 4, total, total), math.nan)
    patterns[:, 0, :, start : start + n, start : start + n] = short = random_patterns(seed, 3, 4, n)
    patterns[:, 1] = full = random_patterns(seed + 1, 3, 4, total)
    options = {"heads": heads, "drop_bos": drop_bos}
    # A padded key of a real query holds 0.
    patterns[:, 0, :, start : start + n] = patterns[:, 0, :, start : start + n].nan_to_num()
    matrix = pairwise_pattern_distance(patterns, mask=mask, **options)
    close = {"equal_nan": True, "rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(matrix[..., 0], pairwise_pattern_distance(short, **options), **close)
    torch.testing.assert_close(matrix[..., 1], pairwise_pattern_distance(full, **options), **close)
    torch.testing.assert_close(
        pattern_distance(patterns[0], patterns[1], mask=mask, **options), matrix[0, 1], **close
    )
    resids = torch.full((3, 2, total, 5), math.nan)
    resids[:, 0, start : start + n] = short = random_resids(seed, 3, n, 5)
    resids[:, 1] = random_resids(seed + 1, 3, total, 5)
    cosines = pairwise_cosine(resids, mask, drop_bos=drop_bos)
    expected = pairwise_cosine(short, drop_bos=drop_bos)
    torch.testing.assert_close(cosines[..., 0], expected, **close)
    torch.testing.assert_close(
        cosines[..., 1], pairwise_cosine(resids[:, 1], drop_bos=drop_bos), **close
    )


def test_one_token():
    one = torch.ones(3, 2, 4, 1, 1)
    for heads in HEADS:
        assert (pattern_distance(one[0], one[1], heads) == 0).all()
        assert (pairwise_pattern_distance(one, heads) == 0).all()
        assert pattern_distance(one[0], one[1], heads, drop_bos=True).isnan().all()
        nothing = pairwise_pattern_distance(one, heads, drop_bos=True)
        assert nothing.shape == (3, 3, 2) and nothing.isnan().all()
    resids = random_resids(0, 3, 2, 1, 4)
    assert pairwise_cosine(resids).isfinite().all()
    assert pairwise_cosine(resids, drop_bos=True).isnan().all()


@pytest.mark.parametrize("heads", HEADS)
def test_gradients_flow_also_where_blocks_are_equal(heads):
    patterns = random_patterns(7, 3, 2, 4).double()
    patterns[2] = patterns[0]
    patterns.requires_grad_()
    pairwise_pattern_distance(patterns, heads).sum().backward()
    from_pairs = patterns.grad.clone()
    patterns.grad = None
    total = sum(pattern_distance(a, b, heads) for a in patterns for b in patterns)
    total.backward()
    assert from_pairs.abs().max() > 0
    torch.testing.assert_close(from_pairs, patterns.grad)


def test_bfloat16_is_measured_in_float32():
    patterns, resids = random_patterns(8, 3, 2, 9).bfloat16(), random_resids(8, 3, 9, 4).bfloat16()
    for low, exact in [
        (
            pairwise_pattern_distance(patterns),
            pairwise_pattern_distance(patterns.float(), validate=False),
        ),
        (pattern_distance(*patterns[:2]), pattern_distance(*patterns[:2].float(), validate=False)),
        (pairwise_cosine(resids), pairwise_cosine(resids.float())),
    ]:
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, exact)


def test_bad_input_is_refused():
    good = random_patterns(9, 3, 2, 4)
    bad = good.clone()
    bad[1, 0, 2] *= 2
    with pytest.raises(ValueError, match=r"pattern\[1, 0, 2\].*sums to 2 "):
        pairwise_pattern_distance(bad)
    with pytest.raises(ValueError, match=r"pattern\[0, 2\].*sums to 2 "):
        pattern_distance(good[1], bad[1])
    with pytest.raises(ValueError, match="same heads and positions"):
        inspect.unwrap(pattern_distance)(good[0], good[0, :1])
    with pytest.raises(ValueError, match="heads='max'"):
        inspect.unwrap(pattern_distance)(good[0], good[1], "max")
    with pytest.raises(ValueError, match="heads='max'"):
        inspect.unwrap(pairwise_pattern_distance)(good, "max")
    with pytest.raises(ValueError, match=r"expected \[block, \.\.\., head, dest, src\]"):
        inspect.unwrap(pairwise_pattern_distance)(good[0])
    with pytest.raises(ValueError, match=r"expected \[block, \.\.\., pos, d_model\]"):
        inspect.unwrap(pairwise_cosine)(torch.ones(2, 3))
