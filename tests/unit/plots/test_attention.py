"""circuitsvis views without a network, safe for any prompt."""

import socket

import pytest
import torch

from tl_loops.plots import attention_view
from tl_loops.plots.attention import circuitsvis_script

PATTERN = torch.softmax(torch.arange(18.0).reshape(2, 3, 3), dim=-1)


def test_a_view_holds_its_data_and_no_script_of_its_own():
    view = attention_view(["a", "b", "c"], PATTERN, ["x", "y"])
    html = view.element()
    assert '"attentionHeadNames":["x","y"]' in html
    assert view.element_id in html
    assert len(html) < 2000
    assert attention_view(["a", "b", "c"], PATTERN).element_id != view.element_id


def test_a_notebook_gets_the_script_and_no_network_is_asked(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a view asked for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    html = attention_view(["a", "b", "c"], PATTERN)._repr_html_()
    assert "var CircuitsVis" in html
    assert "unpkg.com" not in html
    assert "if(!window.CircuitsVis)" in html


def test_text_cannot_leave_its_script_element():
    html = attention_view(["</script><b>", "b", "c"], PATTERN).element()
    assert html.count("</script>") == 1
    assert "\\u003c/script>" in html
    assert "</script" not in circuitsvis_script()


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="dest = src = 2 tokens"):
        attention_view(["a", "b"], PATTERN)
    with pytest.raises(ValueError, match="got 1 head names for 2 heads"):
        attention_view(["a", "b", "c"], PATTERN, ["x"])
