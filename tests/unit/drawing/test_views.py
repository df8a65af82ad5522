"""circuitsvis views: offline, the script once a notebook, text that stays text."""

import re
import socket
import sys
from types import SimpleNamespace

import pytest
import torch

from tl_loops.drawing.views import ViewPart, as_text
from tl_loops.plots import CircuitsView, attention_view, circuitsvis_script, colored_tokens

PATTERN = torch.softmax(torch.arange(18.0).reshape(2, 3, 3), dim=-1)
BUNDLE = "var CircuitsVis"


def view() -> CircuitsView:
    return attention_view(["a", "b", "c"], PATTERN)


class Shell:
    """What a view asks of IPython's shell."""

    def __init__(self, sends_ids: bool = True):
        self.sends_ids, self.execution_count, self.user_ns = sends_ids, 0, {"In": [""]}
        self.kernel = SimpleNamespace(get_parent=lambda: self.parent)

    def run(self, source: str, cell: str) -> None:
        self.execution_count += 1
        self.user_ns["In"].append(source)
        self.parent = {"metadata": {"cellId": cell} if self.sends_ids else {}}


@pytest.fixture(params=[True, False], ids=["cell ids", "no cell ids"])
def shell(request, monkeypatch):
    shell = Shell(request.param)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    return shell


def test_a_notebook_gets_the_script_once(shell):
    shell.run("view()", "1")
    assert BUNDLE in view()._repr_html_()
    assert BUNDLE not in view()._repr_html_()  # a second view of the same cell
    shell.run("view(2)", "2")
    second = view()._repr_html_()
    assert BUNDLE not in second and "draw(" in second
    shell.run("view()", "1")  # the first cell runs again and its old output is gone
    assert BUNDLE in view()._repr_html_()
    shell.run("view(2)", "2")
    assert BUNDLE not in view()._repr_html_()


def test_outside_of_a_notebook_every_view_is_complete(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert BUNDLE in view()._repr_html_()
    monkeypatch.delitem(sys.modules, "IPython")
    assert BUNDLE in view()._repr_html_()


def test_a_page_holds_the_script_once(shell):
    shell.run("x", "1")
    page = f"<script>{circuitsvis_script()}</script>{view().element()}{view().element()}"
    assert page.count(BUNDLE) == 1
    assert BUNDLE in view().to_html()


def test_a_script_that_is_there_is_not_run_again():
    assert "if(!window.CircuitsVis)" in view().to_html()


def test_no_network_is_asked(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a view asked for the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    html = view()._repr_html_()
    assert "unpkg.com" not in html
    assert not re.search(r'(src|href)\s*=\s*"?https?:', html)


def test_the_text_form_is_short():
    # A notebook stores it beside the HTML.
    assert repr(attention_view(["a", "b", "c"], PATTERN, title="Mine")) == (
        "CircuitsView('Mine': AttentionHeads)"
    )


def test_a_view_is_as_high_as_it_is_or_as_it_is_told():
    assert "height:" not in view().element().split("</style>")[1].split("<script")[0]
    wide = CircuitsView(view().parts, height=99, width=300)
    assert "height:99px;width:300px" in wide.element()


def test_text_cannot_leave_its_script_element():
    evil = ["</script><b>", "\u2028", "c"]
    html = attention_view(evil, PATTERN, title="<i>").element()
    assert html.count("</script>") == 1
    assert "\\u003c/script>" in html and "&lt;i&gt;" in html
    assert "</script" not in circuitsvis_script()


def test_tokens_are_text_where_circuitsvis_writes_html():
    view = colored_tokens(["<svg/onload=alert(1)>", "&lt;"], torch.zeros(2), "Mine")
    tokens = view.parts[0].props["tokens"]
    assert not any(re.search(r"<[a-z/!]|&\w", token) for token in tokens)
    assert as_text("a < b & c").replace("\u200b", "") == "a < b & c"


def test_numbers_must_be_finite():
    part = ViewPart("", "ColoredTokens", {"tokens": ["a"], "values": [float("nan")]})
    with pytest.raises(ValueError, match="JSON"):
        CircuitsView((part,)).element()
