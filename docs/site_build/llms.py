"""``llms.txt``: the pages of the site in one plain list, for programs that read (llmstxt.org)."""

import re
from pathlib import Path
from typing import Any

_LINES: dict[str, str] = {}
_ORDER: list[str] = []


def on_nav(nav: Any, **_: Any) -> None:
    """Keep the order of the pages."""
    _LINES.clear()
    _ORDER[:] = [page.file.src_uri for page in nav.pages]


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> None:
    """Keep a page's title and first sentence."""
    prose = re.sub(r"^```.*?^```", "", markdown, flags=re.S | re.M)
    prose = re.sub(r"^#.*$|^\s*(?:[|!<`*-]|:::).*$", "", prose, flags=re.M).strip()
    first = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(prose.split("\n\n")[0].split()))
    sentence = re.split(r"(?<=[.:]) ", first)[0].rstrip(":")
    address = f"{(config.site_url or '').rstrip('/')}/{page.url}".lstrip("/")
    _LINES[page.file.src_uri] = f"- [{page.title}]({address}): {sentence}"


def on_post_build(config: Any) -> None:
    """Write the list in the order of the pages."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", "", "## Pages", ""]
    text = "\n".join([*lines, *(_LINES[page] for page in _ORDER)]) + "\n"
    (Path(config.site_dir) / "llms.txt").write_text(text, encoding="utf-8")
