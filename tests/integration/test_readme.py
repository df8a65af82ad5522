"""The examples of the README run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), flags=re.S)


def test_the_readme_has_examples():
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example(number, capsys):
    namespace: dict = {}
    exec(compile(BLOCKS[number], f"README example {number}", "exec"), namespace)
    if number == 0:
        clean, corrupted = namespace["clean"], namespace["corrupted"]
        assert clean.answer != corrupted.answer
        assert namespace["lens"].predictions.shape[0] == namespace["model"].cfg.n_iterations
        printed = capsys.readouterr().out
        assert f"patched answer: {clean.answer} - clean answer: {clean.answer}" in printed


def test_links_lead_somewhere():
    text = (ROOT / "README.md").read_text("utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link
