"""A profile as rows: one for each metric and block that has a value, in three groupings."""

from typing import TYPE_CHECKING, Any, Literal

from tl_loops.layout.layout import LoopLayout

if TYPE_CHECKING:
    from tl_loops.measurements.profile import LoopProfile

Grouping = Literal["unrolled", "iteration", "layer"]
Row = dict[str, Any]

COLUMNS = (
    "metric",
    "block",
    "phase",
    "iteration",
    "layer",
    "relative_depth",
    "mean",
    "std",
    "count",
    "undefined",
)
"""Columns of the table."""


def table_rows(profile: "LoopProfile") -> list[Row]:
    """The rows in the order of metrics and unrolled blocks; ``None`` where there is no value."""
    depth = profile.relative_depth.tolist()
    rows = []
    for metric, moments in profile.moments.items():
        mean, std = moments.mean.tolist(), moments.std().tolist()
        count, undefined = moments.count.tolist(), moments.undefined.tolist()
        for block in range(profile.n_layers):
            if count[block] + undefined[block] == 0:
                continue
            at = None if profile.layout is None else profile.layout.coordinate(block)
            values = (
                metric,
                block,
                None if at is None else at.phase,
                None if at is None else at.iteration,
                block if at is None else at.layer,
                depth[block],
                _unless_nan(mean[block]),
                _unless_nan(std[block]),
                count[block],
                undefined[block],
            )
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def grouped(rows: list[Row], layout: LoopLayout, by: Grouping) -> list[Row]:
    """The rows of a looped model, rearranged.

    Args:
        rows: From :func:`table_rows`.
        layout: Of the profile.
        by: ``"unrolled"``: as they are. ``"iteration"``: along one pass through prelude, core and
            coda for each iteration; rows outside of the core appear in each. ``"layer"``: core
            rows along the iterations of each layer.
    """
    if by == "unrolled":
        return rows
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    core = [row for row in rows if row["iteration"] is not None]
    if by == "layer":
        return sorted(core, key=lambda r: (metrics.index(r["metric"]), r["layer"], r["iteration"]))
    outer = [row for row in rows if row["iteration"] is None]
    everywhere = [{**row, "iteration": t} for row in outer for t in range(layout.n_iterations)]
    return sorted(
        core + everywhere,
        key=lambda r: (metrics.index(r["metric"]), r["iteration"], r["relative_depth"]),
    )


def _unless_nan(value: float) -> float | None:
    return None if value != value else value
