"""Heatmaps as HTML tables: a few kilobytes each, with hover, without script."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from jaxtyping import Float
from torch import Tensor

from tl_loops.plots.colours import SCALES, colour_at, is_dark


@dataclass(frozen=True)
class Heatmap:
    """A matrix of numbers as a coloured table.

    Attributes:
        values: [row, column]; NaN cells are hatched and say "undefined".
        rows: Labels of the rows.
        columns: Labels of the columns.
        title: What the numbers are, with model, prompts and number of iterations.
        row_title: What the rows are.
        column_title: What the columns are.
        unit: Unit or range, said in the legend.
        scale: ``"sequential"``, or ``"diverging"`` (white at 0).
        limits: Values of the scale's ends; ``None``: from the data.
        show_values: Whether cells hold their number.
    """

    values: Float[Tensor, "row column"]
    rows: Sequence[str]
    columns: Sequence[str]
    title: str
    row_title: str
    column_title: str
    unit: str = ""
    scale: str = "sequential"
    limits: tuple[float, float] | None = None
    show_values: bool = True

    def __post_init__(self) -> None:
        if tuple(self.values.shape) != (len(self.rows), len(self.columns)):
            raise ValueError(
                f"values {tuple(self.values.shape)} do not fit {len(self.rows)} rows and "
                f"{len(self.columns)} columns"
            )
        if self.scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {self.scale!r}")

    def bounds(self) -> tuple[float, float]:
        """Values at the ends of the colour scale."""
        if self.limits is not None:
            return self.limits
        finite = self.values[self.values.isfinite()]
        if finite.numel() == 0:
            return 0.0, 1.0
        low, high = float(finite.min()), float(finite.max())
        if self.scale == "diverging":
            reach = max(abs(low), abs(high)) or 1.0
            return -reach, reach
        return (low, high) if high > low else (low, low + 1.0)

    def to_html(self) -> str:
        """The figure; every label is escaped."""
        low, high = self.bounds()
        lines = ['<figure class="heatmap">', f"<figcaption>{escape(self.title)}</figcaption>"]
        lines.append('<div class="scroll"><table>')
        corner = f"{escape(self.row_title)} ↓ · {escape(self.column_title)} →"
        heads = "".join(
            f'<th scope="col"><span>{escape(str(name))}</span></th>' for name in self.columns
        )
        lines.append(f'<thead><tr><th class="corner">{corner}</th>{heads}</tr></thead><tbody>')
        for name, row in zip(self.rows, self.values.float().tolist(), strict=True):
            cells = "".join(
                self._cell(value, str(name), str(column), low, high)
                for value, column in zip(row, self.columns, strict=True)
            )
            lines.append(f'<tr><th scope="row">{escape(str(name))}</th>{cells}</tr>')
        lines.append("</tbody></table></div>")
        ramp = ", ".join(SCALES[self.scale])
        lines.append(
            f'<p class="legend"><span>{low:.3g}</span>'
            f'<i style="background:linear-gradient(90deg,{ramp})"></i>'
            f"<span>{high:.3g}</span> {escape(self.unit)}</p></figure>"
        )
        return "\n".join(lines)

    def _cell(self, value: float, row: str, column: str, low: float, high: float) -> str:
        where = escape(f"{row}, {column}", quote=True)
        if math.isnan(value):
            return f'<td class="undefined" title="{where}: undefined"></td>'
        colour = colour_at(SCALES[self.scale], (value - low) / (high - low))
        text = f"{value:.2f}" if self.show_values else ""
        ink = "#fff" if is_dark(colour) else "#111"
        return (
            f'<td style="background:{colour};color:{ink}" title="{where}: {value:.4g}">{text}</td>'
        )
