"""Attention views: addressed by iteration, layer and head, with the weights given."""

import json
import re

import pytest
import torch

from tests.models import tiny_model, tiny_tokens
from tl_loops import plots
from tl_loops.plots import attention_heads, attention_patterns, attention_view

PATTERN = torch.softmax(torch.arange(18.0).reshape(2, 3, 3), dim=-1)
WORDS = [f"t{i}" for i in range(9)]


@pytest.fixture(scope="module")
def model():
    return tiny_model("retrofitted")


@pytest.fixture(scope="module")
def cache(model):
    with torch.no_grad():
        return model.run_with_cache(tiny_tokens())[1]


def drawn(view) -> list[dict]:
    """The properties that each component is called with, read from the HTML."""
    found = re.findall(r'draw\("[\w-]+","(\w+)",(\{.*?\})\)(?=;draw|\}\))', view.element())
    assert len(found) == len(view.parts)
    return [{"component": component, **json.loads(props)} for component, props in found]


def test_a_view_holds_its_data_and_no_script_of_its_own():
    view = attention_view(["a", "b", "c"], PATTERN, ["x", "y"], title="Mine")
    (props,) = drawn(view)
    assert props["component"] == "AttentionHeads"
    assert props["attentionHeadNames"] == ["x", "y"] and props["tokens"] == ["a", "b", "c"]
    torch.testing.assert_close(torch.tensor(props["attention"]), PATTERN, atol=6e-4, rtol=0)
    assert view.element_id in view.element() and "<h4>Mine</h4>" in view.element()
    assert len(view.element()) < 3000
    assert attention_view(["a", "b", "c"], PATTERN).element_id != view.element_id


def test_heads_stand_side_by_side_by_iteration(cache, model):
    view = attention_heads(cache, WORDS, iterations=(0, -1), layers=1, heads=(2, 0), row=1)
    first, last = drawn(view)
    assert first["attentionHeadNames"] == ["r0.1H2", "r0.1H0"]
    assert last["attentionHeadNames"] == ["r2.1H2", "r2.1H0"]
    expected = cache["pattern", 2, 1][1, [2, 0]]
    torch.testing.assert_close(torch.tensor(last["attention"]), expected, atol=6e-4, rtol=0)
    html = view.element()
    assert "iteration 0" in html and "iteration 2" in html
    assert html.count('style="width:380px"') == 2
    assert "(1, 2⊗3, 1)_I" in html and "3 iterations" in html
    low = attention_heads(cache, WORDS, iterations=0, height=200).element()
    assert "height:200px;width:380px" in low


def test_every_head_is_shown_unless_some_are_chosen(cache, model):
    parts = drawn(attention_heads(cache, WORDS))
    assert len(parts) == 3
    assert len(parts[0]["attention"]) == model.cfg.n_core * model.cfg.n_heads


def test_one_head_over_iterations(cache):
    view = attention_patterns(cache, WORDS, layer=0, head=3)
    parts = drawn(view)
    assert [part["component"] for part in parts] == ["AttentionPattern"] * 3
    for t, part in enumerate(parts):
        expected = cache["pattern", t, 0][0, 3]
        torch.testing.assert_close(torch.tensor(part["attention"]), expected, atol=6e-4, rtol=0)
    assert "iteration 1: r1.0H3" in view.element()


def test_plain_patterns_need_a_layout(cache, model):
    patterns = torch.stack([cache["pattern", i][0] for i in range(model.cfg.n_layers)])
    same = attention_patterns(patterns, WORDS, layout=model.layout)
    assert drawn(same) == drawn(attention_patterns(cache, WORDS))
    assert drawn(attention_patterns(patterns, WORDS, model=model)) == drawn(same)
    with pytest.raises(ValueError, match=r"layout=model\.layout"):
        attention_heads(patterns, WORDS)
    with pytest.raises(ValueError, match="with 8 blocks"):
        attention_heads(patterns[1:], WORDS, layout=model.layout)


def test_undefined_weights_are_said():
    pattern = PATTERN.clone()
    pattern[0, 1, 0] = float("nan")
    view = attention_view(["a", "b", "c"], pattern)
    assert "undefined (NaN) weights are shown as 0" in view.element()
    assert drawn(view)[0]["attention"][0][1][0] == 0.0


def test_what_does_not_fit_is_refused(cache):
    with pytest.raises(ValueError, match="dest = src = 2 tokens"):
        attention_view(["a", "b"], PATTERN)
    with pytest.raises(ValueError, match="got 1 head names for 2 heads"):
        attention_view(["a", "b", "c"], PATTERN, ["x"])
    with pytest.raises(IndexError, match="there is no iteration 3: there are 3"):
        attention_heads(cache, WORDS, iterations=3)
    with pytest.raises(IndexError, match="there is no head 9"):
        attention_patterns(cache, WORDS, head=9)
    with pytest.raises(ValueError, match="no tokenizer to ask"):
        attention_heads(cache, tiny_tokens()[:1])
    with pytest.raises(ValueError, match="expected one prompt"):
        attention_heads(cache, tiny_tokens())


@torch.no_grad()
def test_a_cache_knows_its_tokens():
    model = tiny_model("retrofitted")
    tokens = tiny_tokens(2, 5)
    _, cache = model.run_with_cache(tokens)
    found = plots.attention_patterns(cache, iterations=[0, 1, 2], layers=0, row=1)
    expected = plots.attention_heads(
        cache, [str(t) for t in tokens[1].tolist()], iterations=[0, 1, 2], layers=0, row=1
    )
    assert found.parts == expected.parts and len(found.parts) == 3
    assert torch.equal(cache.apply_slice_to_batch_dim(slice(1, 2)).tokens, tokens[1:])
    _, cache = model.run_with_cache(tokens[0], remove_batch_dim=True, pos_slice=(1, 4))
    assert torch.equal(cache.tokens, tokens[0, 1:4])
    resid = model.embed(tokens)
    _, cache = model.run_with_cache(resid, start_at_layer=0)
    assert cache.tokens is None
    with pytest.raises(ValueError, match="does not know its tokens"):
        plots.attention_patterns(cache)
