"""Every call of docs/figures.md makes its figure, and every kind of figure is on the page."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import plotly.graph_objects as go
import pytest

from tl_loops import plots

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "figures.md"
RERUN = "run `python demos/figures.py`"
LARGEST = 100_000


@pytest.fixture(scope="module")
def script():
    spec = spec_from_file_location("figures", ROOT / "demos" / "figures.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["figures"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["figures"]


def text() -> str:
    return DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_call_makes_a_figure(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    titles = []
    for example, figure in script.made(text(), "plotly"):
        if isinstance(figure, plots.CircuitsView):
            assert figure.parts and figure.title, example.name
            continue
        assert isinstance(figure, go.Figure), example.name
        assert "Nothing to draw" not in figure.to_json(), example.name
        told = figure.layout.title.text
        titles.append(told)
        # Each says the model, the iterations and the prompts.
        assert re.search(r"tl-loops-tiny|random", told), example.name
        assert re.search(r"iteration|weights only|tokens\)", told), example.name
        assert re.search(r"prompt|“|weights only|tokens\)", told), example.name
    assert len(titles) >= 25
    assert list(tmp_path.iterdir()) == []


def test_every_picture_is_there_and_small(script):
    named = {example.picture for example in script.examples(text()) if example.picture}
    stored = {f"images/figures/{p.name}" for p in (DOCUMENT.parent / "images/figures").iterdir()}
    assert named == stored, RERUN
    assert len(named) == text().count("](images/figures/")
    for name in sorted(named):
        assert 3_000 < (DOCUMENT.parent / name).stat().st_size < LARGEST, f"{name}: {RERUN}"


def test_every_kind_of_figure_is_on_the_page():
    makers = [
        name
        for name in plots.__all__
        if name.startswith(("plot_", "attention_", "colored_", "token_"))
        and name != "attention_view"
    ]
    missing = [name for name in makers if f"plots.{name}(" not in text()]
    assert missing == []
