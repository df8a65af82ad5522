"""Closed forms, laws and edge cases of the measurements on attention patterns."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.attention import (
    colsum_concentration,
    diagonal_score,
    mixing_score,
    previous_token_score,
    sink_identity_index,
    sink_rate,
    sink_score,
)

torch.set_num_threads(1)

PER_HEAD = {
    "sink": sink_score,
    "sink visible": lambda p, **k: sink_score(p, position=0, norm="visible", **k),
    "mixing": mixing_score,
    "mixing log": lambda p, **k: mixing_score(p, "log", **k),
    "mixing length": lambda p, **k: mixing_score(p, "length", **k),
    "mixing row": lambda p, **k: mixing_score(p, "row", **k),
    "colsum": colsum_concentration,
    "diagonal": diagonal_score,
    "previous": previous_token_score,
    "sink identity": sink_identity_index,
}
UPPER = {"mixing": math.inf, "mixing length": math.inf}
seeds = st.integers(0, 2**31 - 1)
lengths = st.integers(2, 9)


def random_patterns(seed, *shape, causal=True, sharpness=2.0):
    """Softmax of normal scores: `[*shape[:-1], n_tokens, n_tokens]`."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(*shape, shape[-1], generator=generator) * sharpness
    if causal:
        scores = scores.masked_fill(torch.ones(shape[-1], shape[-1]).triu(1).bool(), -math.inf)
    return scores.softmax(-1)


def uniform_causal(n):
    pattern = torch.ones(n, n).tril()
    return (pattern / pattern.sum(-1, keepdim=True))[None]


def pure_sink(n, position=0):
    pattern = torch.zeros(1, n, n)
    pattern[..., position] = 1
    return pattern


def identity(n):
    return torch.eye(n)[None]


def previous_token(n):
    pattern = torch.eye(n).roll(-1, dims=1)
    pattern[0] = torch.eye(n)[0]
    return pattern[None]


def harmonic(n):
    return sum(1 / i for i in range(1, n + 1))


def close(actual, expected, tolerance=1e-4):
    assert actual.item() == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("n", [2, 3, 8, 55, 128])
def test_sink_score_closed_forms(n):
    close(sink_score(pure_sink(n)), 1)
    close(sink_score(identity(n)), 1 / n)
    close(sink_score(previous_token(n)), 2 / n)
    close(sink_score(uniform_causal(n)), harmonic(n) / n)
    close(sink_score(torch.full((1, n, n), 1 / n)), 1 / n)
    p = 0.37
    close(sink_score(p * pure_sink(n) + (1 - p) * identity(n)), p + (1 - p) / n)


def test_visible_norm_divides_by_the_queries_that_see_the_key():
    pattern = random_patterns(0, 4, 7)
    for k in range(7):
        visible = sink_score(pattern, k, norm="visible")
        torch.testing.assert_close(visible, sink_score(pattern, k) * 7 / (7 - k))
        torch.testing.assert_close(visible, pattern[:, k:, k].mean(-1))


@pytest.mark.parametrize("n, rate", [(8, 1.0), (9, 1.0), (10, 0.0)])
def test_short_prompts_look_like_sinks(n, rate):
    assert sink_rate(uniform_causal(n)).item() == rate


def test_strict_threshold():
    half = 0.5 * pure_sink(4, 1) + 0.5 * pure_sink(4, 2)
    assert sink_rate(half, threshold=0.5, position=1).item() == 1
    assert sink_rate(half, threshold=0.5, position=1, strict=True).item() == 0


def test_sink_rate_is_the_mean_of_rates_not_the_rate_of_means():
    # Two sequences, one head that is a full sink in the first only: mean score 0.625 > 0.6.
    pattern = torch.stack([pure_sink(4), identity(4)])
    rates = sink_rate(pattern, threshold=0.6)
    assert rates.tolist() == [1.0, 0.0]
    assert sink_score(pattern).mean(0).item() > 0.6
    # The same over heads within one sequence.
    assert sink_rate(pattern[:, 0], threshold=0.6).item() == 0.5


ENTROPY_TABLE = {
    2: (0.3466, 0.1733, 0.5),
    4: (0.7945, 0.1986, 0.5731),
    8: (1.3256, 0.1657, 0.6375),
    16: (1.9170, 0.1198, 0.6914),
    32: (2.5487, 0.0796, 0.7354),
    64: (3.2058, 0.0501, 0.7708),
    100: (3.6374, 0.0364, 0.7899),
    128: (3.8782, 0.0303, 0.7993),
    256: (4.5596, 0.0178, 0.8223),
    512: (5.2462, 0.0102, 0.8410),
}


@pytest.mark.parametrize("n", ENTROPY_TABLE)
def test_mixing_score_of_uniform_causal_attention(n):
    none, length, log = ENTROPY_TABLE[n]
    pattern = uniform_causal(n)
    close(mixing_score(pattern), math.lgamma(n + 1) / n)
    close(mixing_score(pattern), none, 1.1e-4)
    close(mixing_score(pattern, "length"), length, 1.1e-4)
    close(mixing_score(pattern, "log"), log, 1.1e-4)
    close(mixing_score(pattern, "row"), 1, 1e-6)


@pytest.mark.parametrize("normalize", ["none", "log", "length", "row"])
def test_mixing_score_cannot_tell_sink_from_identity(normalize):
    assert mixing_score(identity(6), normalize).item() == 0
    assert mixing_score(pure_sink(6), normalize).item() == 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mixing_score_of_sink_and_identity(p):
    n = 12
    h = -p * math.log(p) - (1 - p) * math.log(1 - p)
    pattern = p * pure_sink(n) + (1 - p) * identity(n)
    close(mixing_score(pattern), (n - 1) / n * h)
    row_share = sum(h / math.log(i) for i in range(2, n + 1)) / (n - 1)
    close(mixing_score(pattern, "row"), row_share)


COLSUM_TABLE = {
    2: 0.1887,
    4: 0.1722,
    8: 0.1512,
    16: 0.1305,
    32: 0.1124,
    64: 0.0974,
    100: 0.0892,
    128: 0.0852,
    256: 0.0754,
    512: 0.0674,
    1024: 0.0608,
}


@pytest.mark.parametrize("n", COLSUM_TABLE)
def test_colsum_concentration_of_uniform_causal_attention(n):
    shares = [(harmonic(n) - harmonic(j)) / n for j in range(n)]
    close(
        colsum_concentration(uniform_causal(n)),
        1 + sum(c * math.log(c) for c in shares) / math.log(n),
    )
    close(colsum_concentration(uniform_causal(n)), COLSUM_TABLE[n], 1.1e-4)


@pytest.mark.parametrize("n", [2, 3, 8, 55, 128])
def test_colsum_concentration_closed_forms(n):
    close(colsum_concentration(identity(n)), 0)
    for position in (0, n // 2, n - 1):
        close(colsum_concentration(pure_sink(n, position)), 1)
    close(colsum_concentration(previous_token(n)), 2 * math.log(2) / (n * math.log(n)))
    close(colsum_concentration(torch.full((1, n, n), 1 / n)), 0)


@pytest.mark.parametrize("n", [2, 3, 8, 55])
def test_sink_versus_identity_closed_forms(n):
    uniform = (harmonic(n) - 1) / (n - 1)
    close(sink_identity_index(pure_sink(n)), 1)
    close(sink_identity_index(identity(n)), -1)
    close(sink_identity_index(uniform_causal(n)), 0)
    close(sink_identity_index(0.8 * pure_sink(n) + 0.2 * identity(n)), 0.6)
    close(diagonal_score(identity(n)), 1)
    close(diagonal_score(pure_sink(n)), 0)
    close(diagonal_score(uniform_causal(n)), uniform)
    close(previous_token_score(previous_token(n)), 1)
    close(previous_token_score(identity(n)), 0)
    close(previous_token_score(pure_sink(n)), 1 / (n - 1))
    close(previous_token_score(uniform_causal(n)), uniform)


def test_sink_identity_index_is_nan_where_a_head_does_neither():
    # Token 1 onwards attends to token 1 only, which itself attends to token 0.
    pattern = torch.zeros(1, 4, 4)
    pattern[0, 0, 0] = 1
    pattern[0, [1, 2, 3], [2, 3, 1]] = 1
    assert sink_identity_index(pattern).isnan().all()


@settings(deadline=None, max_examples=25)
@given(seeds, lengths, st.sampled_from([0.1, 1.0, 5.0, 40.0]))
def test_ranges(seed, n, sharpness):
    pattern = random_patterns(seed, 3, n, sharpness=sharpness)
    for name, metric in PER_HEAD.items():
        lower = -1 if name == "sink identity" else 0
        value = metric(pattern)
        assert value.min() >= lower - 1e-6, name
        assert value.max() <= UPPER.get(name, 1) + 1e-6, name
    assert mixing_score(pattern).max() <= math.lgamma(n + 1) / n + 1e-6
    assert 0 <= sink_rate(pattern).item() <= 1


@settings(deadline=None, max_examples=25)
@given(seeds, lengths)
def test_heads_and_batch_are_independent(seed, n):
    pattern = random_patterns(seed, 2, 3, 4, n)
    order = torch.tensor([2, 0, 3, 1])
    for name, metric in PER_HEAD.items():
        value = metric(pattern)
        assert value.shape == (2, 3, 4), name
        torch.testing.assert_close(metric(pattern[:, :, order]), value[:, :, order])
        torch.testing.assert_close(metric(pattern[1, 2]), value[1, 2])
    rate = sink_rate(pattern)
    assert rate.shape == (2, 3)
    torch.testing.assert_close(sink_rate(pattern[:, :, order]), rate)


@settings(deadline=None, max_examples=25)
@given(seeds, st.permutations(range(7)))
def test_colsum_concentration_does_not_depend_on_which_key_is_the_sink(seed, order):
    pattern = random_patterns(seed, 3, 7)
    permuted = pattern[..., torch.tensor(order)]
    torch.testing.assert_close(colsum_concentration(permuted), colsum_concentration(pattern))
    # The sink score does, which is what makes the law above say something.
    sink_first, sink_last = pure_sink(7, 0), pure_sink(7, 6)
    assert sink_score(sink_first).item() != sink_score(sink_last).item()


def padded(pattern, start, total, fill):
    n = pattern.shape[-1]
    result = torch.full((*pattern.shape[:-2], total, total), fill)
    result[..., start : start + n, :] = 0
    result[..., start : start + n, start : start + n] = pattern
    return result


@settings(deadline=None, max_examples=25)
@given(
    seeds,
    st.lists(st.tuples(st.integers(1, 8), st.booleans()), min_size=1, max_size=4),
    st.booleans(),
)
def test_padding_never_changes_a_number(seed, rows, drop_bos):
    total = 9
    mask = torch.zeros(len(rows), total, dtype=torch.bool)
    batch, singles = [], []
    for i, (n, left) in enumerate(rows):
        single = random_patterns(seed + i, 3, n)
        start = total - n if left else 0
        mask[i, start : start + n] = True
        singles.append(single)
        batch.append(padded(single, start, total, fill=math.nan if i % 2 else 0.0))
    batch = torch.stack(batch)
    for name, metric in PER_HEAD.items():
        expected = torch.stack([metric(single, drop_bos=drop_bos) for single in singles])
        actual = metric(batch, mask=mask, drop_bos=drop_bos)
        torch.testing.assert_close(actual, expected, equal_nan=True, msg=name)
    expected = torch.stack([sink_rate(single, drop_bos=drop_bos) for single in singles])
    torch.testing.assert_close(
        sink_rate(batch, mask=mask, drop_bos=drop_bos), expected, equal_nan=True
    )


def test_mask_broadcasts_over_leading_axes():
    pattern = torch.stack([padded(random_patterns(i, 2, 3, 4), 1, 5, 0.0) for i in range(3)])
    mask = torch.tensor([False, True, True, True, True])
    expected = torch.stack([sink_score(random_patterns(i, 2, 3, 4)) for i in range(3)])
    torch.testing.assert_close(sink_score(pattern, mask=mask), expected)
    torch.testing.assert_close(sink_score(pattern, mask=mask.expand(2, 5)), expected)


def test_drop_bos_slices_and_renormalize_rescales():
    pattern = random_patterns(3, 2, 6)
    rest = pattern[:, 1:, 1:]
    torch.testing.assert_close(sink_score(pattern, drop_bos=True), rest[..., 0].mean(-1))
    conditional = rest / rest.sum(-1, keepdim=True)
    for name, metric in PER_HEAD.items():
        torch.testing.assert_close(
            metric(pattern, drop_bos=True, renormalize=True), metric(conditional), msg=name
        )
    # Scaling all rows alike leaves the shares of the columns: no need to rescale first.
    half = 0.5 * pure_sink(6) + 0.5 * identity(6)
    close(colsum_concentration(half, drop_bos=True), 0)
    # A row that only attends to the dropped token has no distribution left.
    assert mixing_score(pure_sink(6), drop_bos=True, renormalize=True).isnan().all()
    assert colsum_concentration(pure_sink(6), drop_bos=True).isnan().all()
    assert mixing_score(pure_sink(6), drop_bos=True).item() == 0


def test_one_token():
    one = torch.ones(2, 3, 1, 1)
    defined = {"mixing", "mixing length"}
    for name, metric in PER_HEAD.items():
        value = metric(one)
        assert value.shape == (2, 3)
        assert (value == 0).all() if name in defined else value.isnan().all(), name
        assert metric(one, drop_bos=True).isnan().all(), name
    assert sink_rate(one).shape == (2,)
    assert sink_rate(one).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_is_measured_in_float32(dtype):
    pattern = random_patterns(5, 2, 40).to(dtype)
    expected_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for name, metric in PER_HEAD.items():
        value = metric(pattern)
        assert value.dtype == expected_dtype
        torch.testing.assert_close(
            value, metric(pattern.to(expected_dtype), validate=False), msg=name
        )
    assert sink_rate(pattern).dtype == expected_dtype


@pytest.mark.parametrize("name", PER_HEAD)
def test_gradients_of_causal_patterns_are_finite_and_right(name):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    causal = torch.ones(3, 3).triu(1).bool()

    def measure(scores):
        return PER_HEAD[name](scores.masked_fill(causal, -math.inf).softmax(-1))

    assert torch.autograd.gradcheck(measure, scores)


@pytest.mark.parametrize("name", PER_HEAD)
def test_bad_patterns_are_refused_unless_told_not_to_look(name):
    pattern = uniform_causal(4).clone()
    pattern[0, 2] *= 0.9
    with pytest.raises(ValueError, match=r"pattern\[0, 2\].*sums to 0\.9 "):
        PER_HEAD[name](pattern)
    assert PER_HEAD[name](pattern, validate=False).isfinite().all()


def test_causality_is_required_where_visible_keys_are_counted():
    bidirectional = torch.full((1, 4, 4), 0.25)
    for name, metric in PER_HEAD.items():
        if name in ("sink visible", "mixing row"):
            with pytest.raises(ValueError, match="above the diagonal"):
                metric(bidirectional)
        else:
            assert metric(bidirectional).isfinite().all()


@pytest.mark.parametrize("position", [-1, 4, 100])
def test_positions_outside_the_prompt_are_refused(position):
    with pytest.raises(ValueError, match=f"position={position}, expected 0 <= position < 4"):
        sink_score(uniform_causal(4), position)


def test_a_position_outside_one_padded_row_is_refused():
    pattern = torch.stack([padded(uniform_causal(n), 0, 4, 0.0) for n in (4, 2)])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    with pytest.raises(ValueError, match="position < 2"):
        sink_score(pattern, 3, mask=mask)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="norm='rows'"):
        inspect.unwrap(sink_score)(uniform_causal(4), norm="rows")
    with pytest.raises(ValueError, match="normalize='bits'"):
        inspect.unwrap(mixing_score)(uniform_causal(4), "bits")
