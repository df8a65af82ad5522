"""What counts as an attention pattern, and what the refusal says."""

import pytest
import torch

from tl_loops.metrics.patterns import check_pattern

torch.set_num_threads(1)


def uniform_causal(n_tokens):
    pattern = torch.ones(n_tokens, n_tokens).tril()
    return pattern / pattern.sum(-1, keepdim=True)


def stacked(n_batch=2, n_heads=3, n_tokens=5):
    return uniform_causal(n_tokens).expand(n_batch, n_heads, -1, -1).clone()


def test_good_patterns_pass():
    check_pattern(stacked(), causal=True)
    check_pattern(torch.full((1, 4, 4), 0.25))


@pytest.mark.parametrize("n_tokens", [3, 7, 64, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_half_precision_is_tolerated(n_tokens, dtype):
    # [1/3, 1/3, 1/3] sums to 1.002 in bfloat16, outside 1e-3.
    check_pattern(uniform_causal(n_tokens)[None].to(dtype), causal=True)


def test_the_message_names_the_row_and_its_sum():
    pattern = stacked()
    pattern[1, 2, 3] *= 0.5
    with pytest.raises(ValueError, match=r"pattern\[1, 2, 3\].*head 2, dest 3; 1 bad rows.*0\.5 "):
        check_pattern(pattern)


@pytest.mark.parametrize("excess, accepted", [(0.9e-3, True), (1.2e-3, False)])
def test_tolerance_is_one_in_a_thousand(excess, accepted):
    pattern = stacked()
    pattern[0, 0, 2, 0] += excess
    if accepted:
        check_pattern(pattern)
    else:
        with pytest.raises(ValueError, match=r"sums to 1\.001"):
            check_pattern(pattern)


def test_scores_before_the_softmax_are_refused():
    scores = torch.zeros(1, 2, 2)
    scores[0, 1] = torch.tensor([-1.0, 2.0])
    scores[0, 0, 0] = 1
    with pytest.raises(ValueError, match=r"entry -1 .*after the softmax"):
        check_pattern(scores)


def test_nan_rows_are_refused():
    pattern = stacked()
    pattern[0, 1, 4] = float("nan")
    with pytest.raises(ValueError, match=r"pattern\[0, 1, 4\].*nan"):
        check_pattern(pattern)


def test_causality_is_checked_only_on_request():
    pattern = stacked()
    pattern[1, 0, 2] = torch.tensor([0.2, 0.2, 0.2, 0.4, 0.0])
    check_pattern(pattern)
    with pytest.raises(ValueError, match=r"pattern\[1, 0, 2\].*has 0\.4 of it above the diagonal"):
        check_pattern(pattern, causal=True)


def test_rows_and_keys_of_padding_are_not_looked_at():
    pattern = stacked(n_batch=2)
    pattern[1, :, :2] = 0
    pattern[1, 0, 0] = float("nan")
    pattern[1, :, 2:] = 0
    pattern[1, :, 2:, 2:] = uniform_causal(3)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, :2] = False
    check_pattern(pattern, mask, causal=True)
    with pytest.raises(ValueError, match=r"pattern\[1, 0, 0\]"):
        check_pattern(pattern)


def test_weight_on_padding_is_refused_unless_rows_are_renormalized():
    pattern = stacked()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, :2] = False
    with pytest.raises(ValueError, match=r"pattern\[1, 0, 2\].*0\.3333.*renormalize=True"):
        check_pattern(pattern, mask)
    check_pattern(pattern, mask, renormalize=True)
    pattern[1, 1, 4, 2:] = 0
    with pytest.raises(
        ValueError, match=r"pattern\[1, 1, 4\].*0 over src, expected a positive sum"
    ):
        check_pattern(pattern, mask, renormalize=True)


def test_decoding_steps_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 1, 5\].*key-value"):
        check_pattern(torch.full((2, 1, 5), 0.2))
