"""What can be wrong to the eye with a page, at the widths of a phone, a tablet and a desktop."""

from pathlib import Path

WIDTHS = (390, 768, 1440)
SCHEMES = ("light", "dark")
PROBLEMS = (Path(__file__).parent / "problems.js").read_text("utf-8")


def problems(page, selector: str) -> list[str]:
    """What ``problems.js`` finds in the elements that each hold one figure."""
    drawn = "[...document.querySelectorAll('.circuits-frame')].every(f => f.querySelector('{}'))"
    page.wait_for_function(drawn.format("canvas, span"))
    page.wait_for_timeout(300)  # canvases take the size of their frame
    assert page.problems == []
    return page.evaluate(f"({PROBLEMS})({selector!r})")
