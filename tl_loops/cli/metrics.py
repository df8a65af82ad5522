"""``tl-loops metrics``."""

from typing import Any

from tl_loops.measurements.registry import MEASUREMENTS


def run(options: Any) -> None:
    """List the metrics that can be measured by name, with unit and meaning."""
    rows = [("metric", "unit", "what it is")]
    rows += [(name, m.unit, m.summary) for name, m in sorted(MEASUREMENTS.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for name, unit, summary in rows:
        print(f"{name:<{widths[0]}}  {unit:<{widths[1]}}  {summary}")
