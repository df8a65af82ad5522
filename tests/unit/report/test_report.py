"""The report of models of several kinds: which sections apply, and bad input."""

import re

import pytest

import tl_loops
from tests.feedforward import only_before_4, plain_model
from tests.models import SIZES, tiny_model
from tl_loops import LoopedTransformer
from tl_loops.report import MOST_BYTES, report_html
from tl_loops.report.probes import probes_section
from tl_loops.tasks.prompts import PromptText

TEXTS = ["Ann likes Bob . Bob likes Cid . 2 hops from Ann :", "Ann likes Bob . 1 hops from Ann :"]


@pytest.fixture(scope="module")
def tokenizer():
    return LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny").tokenizer


@pytest.fixture
def make(monkeypatch, tokenizer):
    monkeypatch.setitem(SIZES, "d_vocab", 80)

    def model(architecture, **changes):
        made = tiny_model(architecture, **changes)
        made.set_tokenizer(tokenizer)
        return made

    return model


def sections(page):
    return re.findall(r'<section id="([\w-]+)">', page)


# Some of their states cannot be read out, or their loop carries more than its state.
REFUSING = ("act", "hrm_text", "hyperloop")


@pytest.mark.parametrize("architecture", ["huginn", "ouro", "layer_norm", *REFUSING])
def test_sections_of_every_kind_of_model(make, architecture):
    model = make(architecture)
    page = report_html(model, TEXTS, progress=False)
    found = sections(page)
    assert len(page.encode()) < MOST_BYTES
    assert len(set(found)) == len(found)
    assert {"summary", "model", "readout", "answers", "dynamics", "pairs", "floorplan"} <= {*found}
    assert ("exits" in found) == bool(model.cfg.exit_gate)
    assert {"loop-map", "gradients", "geometry"} <= {*found} and "probes" not in found
    carrying = "carries more than its state" in page
    assert carrying == (architecture in ("act", "hyperloop"))
    assert ("Small changes" in page) != carrying
    assert "most through iteration" in page and "have a kernel alignment of" in page
    assert ("Not shown for this model" in page) == (architecture in REFUSING)
    assert "nan" not in re.sub(r"<script.*?</script>", "", page, flags=re.S).lower().split()


def test_one_iteration(make):
    page = report_html(make("huginn"), labelled(), n_iterations=1, progress=False)
    assert {"dynamics", "probes"} <= {*sections(page)}
    assert "The label is read best at iteration 0, layer" in page


def labelled():
    kinds = ["ann", "bob"] * 5
    texts = [f"{name.capitalize()} likes Cid . 1 hops from Ann :" for name in kinds]
    return [PromptText(text, label=kind) for text, kind in zip(texts, kinds, strict=True)]


@pytest.mark.parametrize("architecture", ["huginn", "hrm_text"])
def test_probes_where_prompts_have_labels(make, architecture):
    model, alone = make(architecture), PromptText(TEXTS[0], label="alone")
    section = probes_section(model, [*labelled(), alone], progress=False)
    text = " ".join(section.paragraphs)
    assert "1 prompt(s) without a label, or with one of their own" in text
    assert section.finding.startswith("The label is read best at iteration") and "nan" not in text
    assert len(section.figures) == 2 and "tested at iteration" in section.figures[1]
    one_kind = probes_section(model, labelled()[::2], progress=False)
    assert "5 prompts have a label, of 1 kind(s)" in one_kind.paragraphs[0]
    assert probes_section(model, [PromptText(text) for text in TEXTS], progress=False) is None


def test_bad_input(make):
    model = make("huginn")
    with pytest.raises(ValueError, match="at least one prompt"):
        report_html(model, [], progress=False)
    model.tokenizer = None
    with pytest.raises(ValueError, match="set_tokenizer"):
        report_html(model, TEXTS, progress=False)


@only_before_4
@pytest.mark.parametrize("repeats", [{2: 2, 4: 3}, {1: 2, 2: 2, 4: 3}])
def test_several_loops(tokenizer, repeats):
    plain = plain_model(
        n_layers=6, d_model=16, d_head=4, n_heads=4, n_ctx=64, d_vocab=80, d_mlp=32, act_fn="gelu"
    )
    plain.set_tokenizer(tokenizer)
    page = report_html(tl_loops.loop(plain, repeats=repeats), TEXTS, progress=False)
    assert "attention-metrics" in sections(page)
