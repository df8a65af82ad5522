"""What the site makes of pages: links of arXiv numbers, typeset formulas, pages of notebooks."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "site_build"


def hook(name: str):
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location(f"site_build_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numbers_of_arxiv_are_links_in_prose_alone():
    linked = hook("links").on_page_content
    assert linked("<p>see arXiv 2604.11791, Eq. 3</p>") == (
        '<p>see <a href="https://arxiv.org/abs/2604.11791">arXiv 2604.11791</a>, Eq. 3</p>'
    )
    assert "abs/1706.03762" in linked("<p>(1706.03762)</p>")
    for left in (
        "<code>2604.11791</code>",
        '<a href="https://arxiv.org/abs/2604.11791">2604.11791</a>',
        "<!--n 2604.11791-->",
        "<p>0.26045 and 2699.12345</p>",
    ):
        assert linked(left) == left


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("‖x_t − x_{t−1}‖_F", "‖<i>x</i><sub><i>t</i></sub> − "),
        ("σ_j²", "<i>σ</i><sub><i>j</i></sub>²"),
        ("√d_head", "√<i>d</i><sub>head</sub>"),
        ("A_ij", "<i>A</i><sub><i>ij</i></sub>"),
        ("D^{k−1}", "<i>D</i><sup><i>k</i>−1</sup>"),
    ],
)
def test_formulas_are_typeset(text, html):
    formulas = hook("formulas")
    assert html in formulas.formula(text)
    line = f"<li><strong>Formula</strong> <code>{text}</code>, <code>norm=&quot;a&quot;</code></li>"
    typeset = formulas.on_page_content(line)
    assert html in typeset and "<code>norm=&quot;a&quot;</code>" in typeset
    assert formulas.on_page_content(f"<p><code>{text}</code></p>") == f"<p><code>{text}</code></p>"
    marked = formulas.on_page_content(f'<p>as <span class="formula">{text}</span> says</p>')
    assert html in marked


def test_notebooks_are_pages_and_open_in_colab_where_the_repository_is_known(tmp_path):
    notebooks, added = hook("notebooks"), []
    for repository, opens in (("", False), ("https://github.com/some-one/tl_loops", True)):
        config = SimpleNamespace(
            repo_url=repository, site_dir=str(tmp_path), use_directory_urls=False, plugins=None
        )
        config.plugins = SimpleNamespace(_current_plugin="test")
        added = notebooks.on_files([], config)
        pages = {file.src_uri: file.content_string for file in added if file.src_uri[-3:] == ".md"}
        assert set(pages) == {f"notebooks/{p.stem}.md" for p in notebooks.DEMOS.glob("*.ipynb")}
        url = "colab.research.google.com/github/some-one/tl_loops/blob/main/demos/lenses.ipynb"
        assert (url in pages["notebooks/lenses.md"]) is opens
    pictures = {Path(file.src_uri).name for file in added if file.src_uri.endswith(".png")}
    shown = {name for text in pages.values() for name in re.findall(r"\]\(([^)]*\.png)\)", text)}
    assert pictures and pictures == shown
    assert not any(re.search(r"<script|src=.http", text) for text in pages.values())
    tables = "".join(
        re.findall(r"^<table>.*?</table>$", pages["notebooks/first_steps.md"], re.M | re.S)
    )
    assert "<th>relative_depth</th>" in tables  # of pandas, as a table and not as code
    assert not any(re.search(r"<style|```text\n\s*<t", text) for text in pages.values())


def test_axes_are_words_and_returned_sentences_are_whole(tmp_path):
    griffe = pytest.importorskip("griffe")
    (tmp_path / "some.py").write_text(
        'def f(x: Float[Tensor, "iteration *batch"], y: "int") -> Bool[Tensor, "pos"] | None:\n'
        '    """Do.\n\n    Returns:\n        `[a: b]` in [0, 1]: one.\n    """\n'
    )
    extensions = griffe.load_extensions(hook("sphinx_roles").SphinxRoles)
    module = griffe.load("some", search_paths=[tmp_path], extensions=extensions)
    assert str(module["f"].parameters["x"].annotation) == "Float[Tensor, 'iteration *batch']"
    assert str(module["f"].parameters["y"].annotation) == "int"
    assert str(module["f"].returns) == "Bool[Tensor, 'pos'] | None"
    (returned,) = module["f"].docstring.parse("google", returns_multiple_items=False)[1].value
    assert returned.description == "`[a: b]` in [0, 1]&#58; one."
