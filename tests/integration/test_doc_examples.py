"""The examples of every page run as they stand, and print what the page says that they print."""

import re
from pathlib import Path

import pytest

from tl_loops import LoopedTransformer
from tl_loops.upstream import HAS_HOOKED_TRANSFORMER

if not HAS_HOOKED_TRANSFORMER:
    pytest.skip("the pages import HookedTransformer, which 4.0 removed", allow_module_level=True)

from transformer_lens import HookedTransformer

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.S | re.M)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
ELSEWHERE = {"figures.md"}  # run by test_figures_page.py
WITH_EXAMPLES = [
    page for page in PAGES if "```python" in page.read_text("utf-8") and page.name not in ELSEWHERE
]


def assert_prints(printed: str, shown: str) -> None:
    """Equal words; decimal numbers within 2 percent or 0.03, which another processor may differ."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split(), printed
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    for found, expected in pairs:
        if "." in expected:
            assert float(found) == pytest.approx(float(expected), rel=0.02, abs=0.03), printed
        else:
            assert found == expected, printed


@pytest.fixture
def _gpt2_is_small(monkeypatch):
    """The pages load GPT-2, which is on no disk here: a random model of its depth stands in."""
    load = HookedTransformer.from_pretrained

    def from_pretrained(name, *args, **kwargs):
        if name != "gpt2":
            return load(name, *args, **kwargs)
        tokenizer = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny").tokenizer
        sizes = {"n_layers": 12, "d_model": 24, "d_head": 6, "n_heads": 4, "n_ctx": 64}
        return HookedTransformer({**sizes, "act_fn": "gelu_new", "seed": 0}, tokenizer=tokenizer)

    monkeypatch.setattr(HookedTransformer, "from_pretrained", staticmethod(from_pretrained))


def test_there_are_pages_with_examples():
    names = {page.name for page in WITH_EXAMPLES}
    assert {"README.md", "interventions.md", "guarantees.md"} <= names


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.usefixtures("_gpt2_is_small")
def test_examples(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "example"}
    kind_before = ""
    for number, (kind, text) in enumerate(FENCE.findall(page.read_text("utf-8"))):
        if kind == "python":
            capsys.readouterr()
            exec(compile(text, f"{page.name}, block {number + 1}", "exec"), namespace)
        elif kind == "text" and kind_before == "python":
            assert_prints(capsys.readouterr().out, text)
        kind_before = kind


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link
