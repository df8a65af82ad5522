"""Plain words: a few that readers stumbled over stay out of documentation, docstrings and messages.

Prose of the pages, every string of the package that holds more than a word (docstrings, messages,
help), and the text of the demos are read; code and names are not.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNITS = "iteration|layer|head|token|block|step|prompt|position|row|cell|line|page|point|neuron"
BANNED = {
    r"\bbehind\b": "after",
    r"\brefus(?:e|es|ed|ing|al|als)\b": "raises, or is not supported",
    rf"\b(?:once|twice|times?|one|entry|nats|row) an? (?:{UNITS})\b(?! is)": "per iteration, ...",
    r"\bless (?:the|that|its|those|what)\b": "minus, without",
    r"\ba matter of (?:speed|the call)\b": "say what it affects",
    r"\bnext to nothing\b": "almost no effect",
    r"\bask no network\b": "work offline",
}
"""Each with what to write instead."""

ALLOWED = {
    "left behind": "what stays on a disk",
    "behind the bridge": "the original stands there: a place, and no order",
    "behind each": "the function that a measurement calls",
    "behind an ``@``": "a place in a text",
    "refused: ": "a field of that name, and the one word for a status",
    "every number is exact or refused": "the promise of the project, in one line",
}
"""Phrases that stay, with the reason."""


def prose(page: Path) -> str:
    """A page without its code."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.S | re.M)
    return re.sub(r"`[^`\n]*`", "`code`", text)


def strings(module: Path) -> str:
    """The strings of a module that are more than a name; those of one message are one."""
    tree = ast.parse(module.read_text("utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            found.append(node.value)
    return "\n\n".join(found)


def comments(script: Path) -> str:
    """The comments of a script, which are the text of its notebook."""
    lines = [line for line in script.read_text("utf-8").split("\n") if line.startswith("# ")]
    return "\n".join(line.removeprefix("# ") for line in lines)


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted((ROOT / "tl_loops").rglob("*.py"))
TEXTS = {
    **{path: prose for path in [*PAGES, *sorted(ROOT.glob("tl_loops/*/README.md"))]},
    **dict.fromkeys(MODULES, strings),
    **dict.fromkeys(sorted((ROOT / "demos").glob("*.py")), comments),
}


def faults(text: str) -> list[str]:
    """What a text says in words that it should not."""
    text = " ".join(text.split())
    for phrase in ALLOWED:
        text = text.replace(phrase, "")
    return [
        f"...{text[max(0, match.start() - 40) : match.end() + 30]}... (write: {instead})"
        for banned, instead in BANNED.items()
        for match in re.finditer(banned, text, re.I)
    ]


def test_words_are_plain():
    found = {
        path.relative_to(ROOT).as_posix(): said
        for path, read in TEXTS.items()
        if (said := faults(read(path)))
    }
    lines = [f"{path}: {fault}" for path, said in found.items() for fault in said]
    assert not lines, "\n" + "\n".join(lines)


def test_every_exception_is_needed():
    everything = " ".join(" ".join(read(path).split()) for path, read in TEXTS.items())
    unused = [phrase for phrase in ALLOWED if phrase not in everything]
    assert not unused, f"nothing says {unused} any more"


@pytest.mark.parametrize(
    "text", ["the norm behind it", "it is refused", "once an iteration", "clean less that of b"]
)
def test_the_words_are_found(text):
    assert faults(text) and not faults("the norm after it is raised once per iteration")
