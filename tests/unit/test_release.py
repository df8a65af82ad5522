"""The version stands in one place, and everything else that names it agrees."""

import re
from pathlib import Path

import tl_loops
from tests.dist import INSIDE, example

ROOT = Path(__file__).parents[2]


def test_all_that_names_the_version_agrees():
    version = tl_loops.__version__
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.search(r"^version: (.*)$", citation, re.M)[1] == version
    released = re.findall(r"^## (\d.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert released[0] == version
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert 'dynamic = ["version", "urls"]' in project
    assert version not in re.findall(r'"(.*?)"', project)


def test_what_make_dist_tries_is_there():
    code, shown = example()
    assert "from_pretrained" in code and shown.strip()
    assert all((ROOT / "tl_loops" / name).is_file() for name in INSIDE)
