"""Tokens with a number each, and log probabilities by iteration."""

import pytest
import torch

from tests.unit.plots.test_attention import drawn
from tl_loops import LoopedTransformer, lens
from tl_loops.plots import colored_tokens, token_log_probs

NAN = float("nan")


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny", device="cpu")


def test_each_token_has_its_number():
    view = colored_tokens(["a", " b"], torch.tensor([1, 3]), "Depth", unit="iteration", model="m")
    (props,) = drawn(view)
    assert props["tokens"] == ["a", " b"] and props["values"] == [1.0, 3.0]
    assert (props["minValue"], props["maxValue"]) == (0.0, 3.0)
    assert "<h4>Depth</h4>" in view.element() and "iteration 0 (pale) to 3 (full)" in view.element()


def test_several_numbers_share_a_scale():
    view = colored_tokens(
        ["a", "b"], {"one": torch.tensor([1.0, -2.0]), "two": torch.tensor([0.0, 5.0])}, "Mine"
    )
    one, two = drawn(view)
    assert one["values"] == [1.0, -2.0] and two["maxValue"] == one["maxValue"] == 5.0
    assert one["minValue"] == -2.0 and "<h5>two</h5>" in view.element()
    assert one["tokens"] == ["a ", "b "]  # words without spaces of their own are parted


def test_undefined_numbers_and_no_token_are_said():
    view = colored_tokens(["a", "b"], torch.tensor([NAN, 2.0]), "Mine")
    assert "undefined (NaN) for 1 tokens" in view.element()
    assert drawn(view)[0]["values"] == [0.0, 2.0]
    assert "there is no token to show" in colored_tokens([], torch.zeros(0), "Mine").element()
    every = colored_tokens(["a"], torch.tensor([NAN]), "Mine")
    assert drawn(every)[0]["maxValue"] == 1.0
    with pytest.raises(ValueError, match=r"values of 'x' has shape \[3\], expected \[2\]"):
        colored_tokens(["a", "b"], {"x": torch.zeros(3)}, "Mine")


def test_log_probabilities_are_those_of_the_lens(model):
    text = "Ann likes Bob . Bob likes Cid . 1 hops from Ann :"
    tokens = model.to_tokens(text)
    result = lens.coda_lens(model, text, keep_logits=True, n_iterations=3)
    view = token_log_probs(result, text, model, iterations=(0, 2), top_k=4)
    first, last = drawn(view)
    logits = model(tokens, n_iterations=3)[0, :-1].detach()
    log_p = logits.log_softmax(-1)
    expected = log_p.gather(-1, tokens[0, 1:, None])[:, 0]
    torch.testing.assert_close(
        torch.tensor(last["correctTokenLogProb"]), expected, atol=1e-3, rtol=1e-4
    )
    rank = (log_p > expected[:, None]).sum(-1)
    assert last["correctTokenRank"] == rank.tolist()
    assert last["topKTokens"][3][0].replace("\u200b", "") == model.to_single_str_token(
        int(log_p[3].argmax())
    )
    assert len(first["topKLogProbs"][0]) == 4 and len(first["prompt"]) == tokens.shape[1]
    assert "iteration 2 (mean log probability" in view.element()
    by_hand = token_log_probs(result.by_iteration(result.logits)[:, 0], tokens, model, top_k=4)
    assert drawn(by_hand)[2] == last


def test_what_cannot_be_read_is_refused_or_said(model):
    text = "Ann likes Bob ."
    n = model.to_tokens(text).shape[1]
    with pytest.raises(ValueError, match="keep_logits=True"):
        token_log_probs(lens.coda_lens(model, text), text, model)
    with pytest.raises(ValueError, match="positions='all'"):
        one = lens.coda_lens(model, text, positions="last", keep_logits=True)
        token_log_probs(one, text, model)
    with pytest.raises(ValueError, match="points='states'"):
        every = lens.logit_lens(model, text, points="core", keep_logits=True)
        token_log_probs(every, text, model)
    with pytest.raises(ValueError, match="top_k=0"):
        token_log_probs(torch.zeros(2, n, 34), text, model, top_k=0)
    with pytest.raises(ValueError, match=rf"\[iteration, {n}, d_vocab\]"):
        token_log_probs(torch.zeros(2, 3, 34), text, model)
    undefined = torch.zeros(2, n, 34)
    undefined[1] = NAN
    view = token_log_probs(undefined, text, model)
    assert len(view.parts) == 1 and "iteration 1 are not finite" in view.subtitle
    alone = token_log_probs(torch.zeros(2, 1, 34), torch.tensor([5]), model)
    assert not alone.parts and "predicts nothing" in alone.element()
