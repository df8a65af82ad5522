"""Readout statistics over iterations: closed forms and laws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.answers import (
    answer_flips,
    first_of_final_run,
    oracle_headroom,
    oracle_iteration,
    overthinking,
    saturation_iteration,
)
from tl_loops.metrics.readout import (
    divergence_from_last,
    js_divergence,
    kl_divergence,
    output_entropy,
    predicted_tokens,
    successive_divergence,
    token_margin,
    token_probability,
    token_rank,
)

torch.set_num_threads(1)
few = settings(deadline=None, max_examples=25)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- one distribution ---


def test_rank_of_every_id_is_its_place_in_the_sorted_logits():
    logits = torch.tensor([0.3, 5.0, -2.0, 1.0])
    assert [token_rank(logits, v).item() for v in range(4)] == [3, 1, 4, 2]


def test_tied_ids_share_the_best_rank():
    assert token_rank(torch.zeros(3, 7), 4).tolist() == [1, 1, 1]
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    assert [token_rank(logits, v).item() for v in range(5)] == [1, 2, 2, 2, 5]


@few
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 50), shift=st.floats(-50, 50))
def test_ranks_are_a_permutation_and_depend_on_the_order_only(seed, scale, shift):
    logits = normal(4, 11, seed=seed, dtype=torch.float64)
    ranks = torch.stack([token_rank(logits, v) for v in range(11)], -1)
    assert torch.equal(ranks.sort(-1).values, torch.arange(1, 12).expand(4, 11))
    moved = torch.stack([token_rank(scale * logits + shift, v) for v in range(11)], -1)
    assert torch.equal(moved, ranks)
    assert torch.equal(predicted_tokens(logits), ranks.argmin(-1))


def test_tokens_broadcast_over_iterations():
    logits = normal(5, 2, 3, 11)
    tokens = torch.tensor([[0, 3, 10], [2, 2, 1]])
    for measure in (token_rank, token_probability, token_margin):
        got = measure(logits, tokens)
        assert got.shape == (5, 2, 3)
        assert torch.equal(got[4, 1, 2], measure(logits[4, 1, 2], 1))
        assert torch.equal(got[0, 0, 2], measure(logits[0, 0, 2], 10))


def test_probability_margin_and_entropy_closed_forms():
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    logits = p.log() - 7
    assert token_probability(logits, 2).item() == pytest.approx(0.125)
    assert output_entropy(logits).item() == pytest.approx(1.75 * math.log(2))
    assert token_margin(logits).item() == pytest.approx(math.log(2))
    assert token_margin(logits, 0).item() == pytest.approx(math.log(2))
    assert token_margin(logits, 1).item() == pytest.approx(-math.log(2))
    assert token_margin(logits, 2).item() == pytest.approx(-math.log(4))
    assert token_margin(torch.zeros(5), 2).item() == 0
    assert output_entropy(torch.zeros(3, 8)).tolist() == pytest.approx([math.log(8)] * 3)


def test_ids_without_mass():
    logits = torch.tensor([0.0, 0.0, float("-inf")])
    assert output_entropy(logits).item() == pytest.approx(math.log(2))
    assert token_probability(logits, 2).item() == 0
    other = torch.tensor([0.0, float("-inf"), 0.0])
    assert kl_divergence(logits, logits).item() == 0
    assert kl_divergence(logits, other).item() == math.inf
    assert js_divergence(logits, other).item() == pytest.approx(math.log(2) / 2)


def test_vocabulary_padding_is_excluded():
    logits = normal(3, 11)
    padded = torch.cat([logits, torch.full((3, 5), 100.0)], -1)
    for measure in (output_entropy, predicted_tokens, token_margin):
        assert torch.equal(measure(padded, vocab_size=11), measure(logits))
        assert not torch.equal(measure(padded), measure(logits))
    for measure in (token_rank, token_probability, token_margin):
        assert torch.equal(measure(padded, 4, vocab_size=11), measure(logits, 4))
        assert not torch.equal(measure(padded, 4), measure(logits, 4))
    for measure in (divergence_from_last, successive_divergence):
        assert torch.equal(measure(padded, vocab_size=11), measure(logits))
    assert torch.equal(
        kl_divergence(padded[0], padded[1], vocab_size=11), kl_divergence(logits[0], logits[1])
    )
    assert torch.equal(
        js_divergence(padded[0], padded[1], vocab_size=11), js_divergence(logits[0], logits[1])
    )


def test_half_precision_is_measured_in_float32():
    half = (5 * normal(3, 2, 300)).bfloat16()
    for measure in (output_entropy, divergence_from_last, successive_divergence, token_margin):
        assert measure(half).dtype == torch.float32
        assert torch.equal(measure(half), measure(half.float()))
    assert token_probability(half, 3).dtype == torch.float32
    assert output_entropy(half.double()).dtype == torch.float64


# --- divergences ---


def test_kl_is_not_symmetric():
    p, q = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
    assert kl_divergence(p, q).item() == pytest.approx(0.368, abs=5e-4)
    assert kl_divergence(q, p).item() == pytest.approx(0.511, abs=5e-4)


@few
@given(seed=st.integers(0, 10_000), scale=st.floats(0, 30), shift=st.floats(-20, 20))
def test_divergence_laws(seed, scale, shift):
    p, q = scale * normal(4, 9, seed=seed), scale * normal(4, 9, seed=seed + 1)
    kl, jsd = kl_divergence(p, q), js_divergence(p, q)
    assert (kl >= 0).all()
    assert (jsd >= 0).all() and (jsd <= math.log(2) + 1e-6).all()
    assert torch.allclose(jsd, js_divergence(q, p), atol=1e-6)
    assert (jsd <= kl / 2 + 1e-6).all()  # KL(p || m) <= KL(p || q) / 2 and JSD <= (KL + KL') / 4
    assert torch.equal(kl_divergence(p, p), torch.zeros(4))
    assert torch.allclose(kl_divergence(p + shift, q), kl, atol=1e-3, rtol=1e-3)


def test_divergence_over_iterations():
    logits = normal(5, 2, 9)
    from_last = divergence_from_last(logits)
    steps = successive_divergence(logits)
    assert from_last.shape == (5, 2) and steps.shape == (4, 2)
    assert (from_last[-1] == 0).all()
    for t in range(5):
        assert torch.equal(from_last[t], kl_divergence(logits[-1], logits[t]))
    for t in range(4):
        assert torch.equal(steps[t], kl_divergence(logits[t], logits[t + 1]))
    jsd = divergence_from_last(logits, "jsd")
    assert torch.equal(jsd[1], js_divergence(logits[-1], logits[1]))
    assert torch.equal(successive_divergence(logits, "jsd")[0], js_divergence(logits[0], logits[1]))
    assert successive_divergence(logits[:1]).shape == (0, 2)


# --- answers over iterations ---


def test_flips_and_saturation():
    predictions = torch.tensor([[1, 1, 1, 1], [1, 2, 2, 2], [1, 2, 1, 2], [3, 1, 2, 1]]).T
    assert answer_flips(predictions).tolist() == [0, 1, 3, 3]
    assert saturation_iteration(predictions).tolist() == [0, 1, 3, 3]
    assert answer_flips(predictions[:1]).tolist() == [0] * 4
    assert saturation_iteration(predictions[:1]).tolist() == [0] * 4


@few
@given(seed=st.integers(0, 10_000), n=st.integers(1, 9))
def test_saturation_laws(seed, n):
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randint(0, 2, (n, 20), generator=generator)
    flips, saturation = answer_flips(predictions), saturation_iteration(predictions)
    assert (flips <= saturation).all()  # every flip happens on the way to saturation
    assert ((flips == 0) == (saturation == 0)).all()
    for example in range(20):
        t = int(saturation[example])
        assert (predictions[t:, example] == predictions[-1, example]).all()
        assert t == 0 or predictions[t - 1, example] != predictions[-1, example]


def test_overthinking_and_oracle():
    correct = torch.tensor(
        [
            [True, False, False, False],  # right, then lost
            [False, True, True, False],  # right in the middle only
            [False, False, True, True],
            [False, False, False, False],
        ]
    ).T
    assert overthinking(correct).tolist() == [0.25, 0.25, 0.25, 0.0]
    assert oracle_iteration(correct).tolist() == [0, 1, 2, 3]
    assert oracle_headroom(correct).item() == 0.5
    assert overthinking(correct[:, 0]).tolist() == [1.0, 0.0, 0.0, 0.0]  # one example


@few
@given(seed=st.integers(0, 10_000), n=st.integers(1, 6))
def test_oracle_laws(seed, n):
    correct = torch.rand(n, 30, generator=torch.Generator().manual_seed(seed)) < 0.5
    lost = overthinking(correct)
    headroom = oracle_headroom(correct)
    best = correct.any(0).float().mean()
    assert headroom.item() == pytest.approx((best - correct[-1].float().mean()).item(), abs=1e-6)
    assert (lost <= headroom).all() and headroom <= lost.sum() + 1e-6
    assert lost[-1] == 0
    chosen = correct.gather(0, oracle_iteration(correct)[None])[0]
    assert torch.equal(chosen, correct.any(0))


def test_end_to_end_from_logits():
    targets = torch.tensor([2, 0])
    logits = torch.zeros(3, 2, 4)
    logits[0, 0, 2] = logits[1, 0, 2] = logits[2, 0, 1] = 1  # right, right, wrong
    logits[0, 1, 3] = logits[1, 1, 0] = logits[2, 1, 0] = 1  # wrong, right, right
    correct = predicted_tokens(logits) == targets
    assert overthinking(correct).tolist() == [0.5, 0.5, 0.0]
    assert oracle_headroom(correct).item() == 0.5
    assert answer_flips(predicted_tokens(logits)).tolist() == [1, 1]


def test_first_of_final_run():
    holds = torch.tensor([[0, 0, 1], [1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 0, 0]]).bool().T
    assert first_of_final_run(holds).tolist() == [2, 0, 2, 1, 2]


# --- refusals ---


def test_refusals():
    logits = normal(3, 5)
    for bad in (0, 6):
        with pytest.raises(ValueError, match=f"vocab_size={bad}, expected 1 to d_vocab=5"):
            output_entropy(logits, vocab_size=bad)
    with pytest.raises(ValueError, match="logits contain NaN"):
        token_rank(logits * float("nan"), 0)
    for bad in (-1, 5):
        with pytest.raises(ValueError, match=r"expected ids in 0 to 4"):
            token_rank(logits, bad)
    with pytest.raises(ValueError, match=r"expected ids in 0 to 2"):
        token_probability(logits, 3, vocab_size=3)
    with pytest.raises(ValueError, match="at least two ids"):
        token_margin(logits[:, :1])
    for function in (answer_flips, saturation_iteration):
        with pytest.raises(ValueError, match="at least one iteration"):
            function(torch.zeros(0, 3, dtype=torch.int64))
    for function in (overthinking, oracle_iteration, oracle_headroom):
        with pytest.raises(ValueError, match="at least one iteration"):
            function(torch.zeros(0, 3, dtype=torch.bool))
    for function in (divergence_from_last, successive_divergence):
        with pytest.raises(ValueError, match="at least one iteration"):
            function(logits[:0])
