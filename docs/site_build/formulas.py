"""Formulas are typeset: code after **Formula**, and what stands in ``<span class="formula">``.

The pages write formulas in plain characters (``‖x_t − x_{t−1}‖``), which read well in a file, too.
Here ``_`` and ``^`` become subscripts and superscripts, and single letters italic. No script is
needed, so that pages work offline.
"""

import re
from typing import Any

PLACE = re.compile(r"(?:<li>|<p>)\s*(?:<p>)?<strong>Formula</strong>.*?</(?:li|p)>", re.S)
SPAN = re.compile(r'<span class="formula">([^<]*)</span>')
CODE = re.compile(r"<code>([^<]*)</code>")
RAISED = re.compile(
    r"([_^])(?:\{([^{}]*)\}|\(([^()]*)\)|([A-Za-zα-ωΑ-Ω0-9]+(?:,[A-Za-z0-9]+)?|\*))"
)
LETTER = re.compile(r"(?<![A-Za-z0-9α-ωΑ-Ω&])([A-Za-zα-ωΑ-Ω])(?![A-Za-z0-9α-ωΑ-Ω;])")
TAG = re.compile(r"(<code>.*?</code>|<[^>]*>)", re.S)
ARGUMENT = re.compile(r"&quot;|[\"=]$|^[a-z_]{2,}(?:=\S+)?$|^\w+\(\)$")


def on_page_content(html: str, **_: Any) -> str:
    """Typeset the formulas of a page."""
    html = SPAN.sub(lambda span: _mathematics(span[1]), html)
    return PLACE.sub(lambda place: _line(place[0]), html)


def _line(html: str) -> str:
    """A line with its code as formulas, and the indices of the words between them lowered."""
    parts = TAG.split(html)
    for place, part in enumerate(parts):
        code = CODE.fullmatch(part)
        if code is not None:
            parts[place] = formula(code[1])
        elif not place % 2:
            parts[place] = _raised(part, letters=False)
    return "".join(parts)


def formula(text: str) -> str:
    """A formula in plain characters as HTML; names of arguments stay code."""
    if ARGUMENT.search(text):
        return f"<code>{text}</code>"
    return _mathematics(text)


def _mathematics(text: str) -> str:
    return f'<span class="formula">{_raised(text, letters=True)}</span>'


def _raised(text: str, letters: bool) -> str:
    parts, last = [], 0
    for found in RAISED.finditer(text):
        inner = next(group for group in found.groups()[1:] if group is not None)
        tag = "sub" if found[1] == "_" else "sup"
        inner = f"<i>{inner}</i>" if re.fullmatch("[a-z]{2}", inner) else _italic(inner, True)
        parts += [_italic(text[last : found.start()], letters), f"<{tag}>{inner}</{tag}>"]
        last = found.end()
    return "".join([*parts, _italic(text[last:], letters)])


def _italic(text: str, letters: bool) -> str:
    return LETTER.sub(r"<i>\1</i>", text) if letters else text
