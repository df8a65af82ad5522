"""``tl-loops models``."""

from typing import Any

from tl_loops.loading.catalogue import catalogue


def run(options: Any) -> None:
    """List the names that load, with notation, parameters and source."""
    rows = [("name", "notation", "parameters", "source")]
    for entry in catalogue():
        cfg = entry.config()
        rows.append((entry.name, cfg.notation, f"{cfg.n_params:,}", entry.source))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for name, notation, parameters, source in rows:
        print(f"{name:<{widths[0]}}  {notation:<{widths[1]}}  {parameters:>{widths[2]}}  {source}")
