"""The examples of every page run as they stand, and print what the page says that they print.

They run with both lines of TransformerLens, but for blocks that a page itself marks: one after
``*TransformerLens 3.9 only.*``, on a line of its own, uses what 4 lacks.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel

from tests.bridged.models import build_bridge
from tl_loops import HookedTransformer, LoopedTransformer
from tl_loops.upstream import HAS_HOOKED_TRANSFORMER

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?:\*TransformerLens 3\.9 (only)\.\*\n+)?```(\w+)\n(.*?)^```$", re.S | re.M)
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


def small_bridge(tokenizer: Any) -> Any:
    """A bridge of a random GPT-2 of the released one's depth."""
    sizes = {"n_layer": 12, "n_embd": 24, "n_head": 4, "n_positions": 64}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    config = GPT2Config(vocab_size=len(tokenizer), **sizes, **ids)
    return build_bridge(GPT2LMHeadModel(config).eval(), config, tokenizer)


@pytest.fixture
def _gpt2_is_small(monkeypatch):
    """The pages load GPT-2, which is on no disk here: a random model of its depth stands in."""

    def tokenizer():
        return LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny").tokenizer

    def boot(name, *args, **kwargs):
        assert name == "gpt2"
        return small_bridge(tokenizer())

    monkeypatch.setattr(TransformerBridge, "boot_transformers", staticmethod(boot))
    load = HookedTransformer.from_pretrained

    def from_pretrained(name, *args, **kwargs):
        if name != "gpt2":
            return load(name, *args, **kwargs)
        sizes = {"n_layers": 12, "d_model": 24, "d_head": 6, "n_heads": 4, "n_ctx": 64}
        return HookedTransformer({**sizes, "act_fn": "gelu_new", "seed": 0}, tokenizer=tokenizer())

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
    for number, (only, kind, text) in enumerate(FENCE.findall(page.read_text("utf-8"))):
        if only and not HAS_HOOKED_TRANSFORMER:
            kind = f"{kind} of the other line"
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
