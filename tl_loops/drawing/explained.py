"""Words where numbers are missing."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tl_loops.drawing.figure import Bars, Figure, Heat, Line, Panel


def explained(figure: Figure) -> Figure:
    """The figure with words where numbers are missing.

    A panel without a finite value gets a note in place of its marks; where only some values are
    missing, the figure gets a footnote that counts them.
    """
    panels, undefined, hidden = [], 0, 0
    for panel in figure.panels:
        drawn = gone = 0
        for values, log in _numbers(panel):
            finite = np.isfinite(values)
            positive = finite & (values > 0) if log else finite
            drawn += int(positive.sum())
            gone += int((~finite).sum())
            hidden += int((finite & ~positive).sum())
        if not drawn and not panel.note:
            reason = (
                "every value is undefined (NaN)"
                if gone
                else "every value is 0, which a logarithmic axis cannot show"
                if hidden
                else "there are no values"
            )
            panel = replace(panel, note=f"Nothing to draw: {reason}.")
        undefined += gone if drawn else 0
        panels.append(replace(panel, marks=()) if panel.note else panel)
    notes = list(figure.footnotes)
    if undefined:
        notes.append(f"{_count(undefined, 'value')} undefined (NaN) and left out.")
    if hidden and any(panel.marks for panel in panels):
        notes.append(f"{_count(hidden, 'value')} 0 or less, which a logarithmic axis cannot show.")
    return replace(figure, panels=tuple(panels), footnotes=tuple(notes))


def _numbers(panel: Panel) -> Iterator[tuple[np.ndarray, bool]]:
    """The values of each mark, and whether they stand on a logarithmic axis."""
    for mark in panel.marks:
        if isinstance(mark, Line):
            yield mark.y, panel.y.log
        elif isinstance(mark, Bars):
            yield mark.height, panel.y.log
        elif isinstance(mark, Heat):
            values = mark.values
            yield values[np.isfinite(values)] if mark.blank else values, False


def _count(n: int, what: str) -> str:
    return f"{n} {what}{' is' if n == 1 else 's are'}"
