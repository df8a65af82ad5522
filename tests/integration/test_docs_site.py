"""The site: every public name has a place in its reference, and no page fetches anything."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import tl_loops

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.M)
SHOWN = [
    name
    for page in sorted((DOCS / "reference").glob("*.md"))
    for name in DIRECTIVE.findall(page.read_text("utf-8"))
]
MODULES = ("attribution", "lens", "loop_hooks", "loop_losses", "measurements", "metrics")
MODULES += ("circuits", "dynamics", "patching", "plots", "probes", "steering", "tasks", "training")
# Types of two words, which say nothing beside the functions that take them.
NOT_SHOWN = {"tl_loops.measurements.Activation"}
# These functions have the names of their modules, which the reference would show instead.
ELSEWHERE = {
    "tl_loops.measure": "tl_loops.measurements.measure.measure",
    "tl_loops.kv_sharing_effect": "tl_loops.model.kv_sharing_effect.kv_sharing_effect",
    "tl_loops.metrics.kmeans": "tl_loops.metrics.kmeans.kmeans",
}


def _public(module) -> set[str]:
    """Full names of what a module offers: its ``__all__``, or else what it defines."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_")
            and (inspect.isfunction(value) or inspect.isclass(value))
            and value.__module__ == module.__name__
        ]
    return {
        f"{module.__name__}.{name}" for name in names if not inspect.ismodule(getattr(module, name))
    }


def test_the_reference_shows_each_name_once():
    assert len(SHOWN) == len(set(SHOWN))


@pytest.mark.parametrize("name", ["tl_loops", *(f"tl_loops.{module}" for module in MODULES)])
def test_every_public_name_is_in_the_reference(name):
    public = {ELSEWHERE.get(path, path) for path in _public(importlib.import_module(name))}
    missing = public - set(SHOWN) - NOT_SHOWN
    assert not missing, f"put ':::' lines into a page of docs/reference for {sorted(missing)}"


def test_what_the_reference_shows_exists_under_that_name():
    for name in SHOWN:
        module, attribute = name.rsplit(".", 1)
        assert hasattr(importlib.import_module(module), attribute), name
        source = (ROOT / name.replace(".", "/")).with_suffix(".py")
        assert not source.exists(), f"{name} shows the module of the same name"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = set(re.findall(r"([\w/]+\.md)$", text[text.index("\nnav:") :], flags=re.M))
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "demos").glob("*.ipynb")}
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} | notebooks


def test_titles_are_those_of_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    named = re.findall(r"^ +- (.+?): ([\w/]+\.md)$", text[text.index("\nnav:") :], flags=re.M)
    for title, page in named:
        if page == "index.md":  # the way home is called that; its page is called as the project
            continue
        notebook = page.startswith("notebooks/")
        file = ROOT / "demos" / f"{Path(page).stem}.py" if notebook else DOCS / page
        found = re.search(r"^# # (.+)$" if notebook else r"^# (.+)$", file.read_text("utf-8"), re.M)
        assert found is not None and found[1] == title, page


def test_pages_fetch_nothing():
    settings = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert "font: false" in settings and "extra_javascript" not in settings
    assert not re.search(r"https?://", settings)
    for page in DOCS.rglob("*.md"):
        text = page.read_text("utf-8")
        assert not re.search(r"!\[[^\]]*\]\(https?:|<(script|iframe|link)\b", text), page
        assert "```mermaid" not in text, f"{page}: the theme fetches a script for diagrams"


def test_modules_without_a_page_are_not_offered_at_the_top():
    offered = {name for name in tl_loops.__all__ if inspect.ismodule(getattr(tl_loops, name))}
    assert offered <= set(MODULES)
