"""Numbers of arXiv become links wherever prose names one, also in notebooks and docstrings."""

import re
from typing import Any

NUMBER = re.compile(r"(?:arXiv[ :])?\b(?:0[7-9]|[12]\d)(?:0[1-9]|1[0-2])\.\d{4,5}\b")
TAG = re.compile(r"(<!--.*?-->|<[^>]*>)", re.S)
CLOSED = ("a", "code", "pre", "script", "style", "nav", "title")
"""Elements whose text stays as it is."""


def on_page_content(html: str, **_: Any) -> str:
    """Link every number that stands in prose."""
    inside, parts = 0, TAG.split(html)
    for place, part in enumerate(parts):
        if place % 2:
            name = re.match(r"</?([a-z0-9]+)", part)
            if name is not None and name[1] in CLOSED:
                inside += -1 if part.startswith("</") else 1
        elif not inside:
            parts[place] = NUMBER.sub(_link, part)
    return "".join(parts)


def _link(found: re.Match[str]) -> str:
    number = re.sub(r"^arXiv[ :]", "", found[0])
    return f'<a href="https://arxiv.org/abs/{number}">{found[0]}</a>'
