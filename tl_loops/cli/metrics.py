"""``tl-loops metrics``."""

import argparse

from tl_loops.cli.output import print_json, print_table
from tl_loops.measurements.registry import MEASUREMENTS


def run(options: argparse.Namespace) -> None:
    """List the metrics that can be measured by name, with unit and meaning."""
    found = sorted(MEASUREMENTS.items())
    if options.json:
        print_json([{"name": name, "unit": m.unit, "summary": m.summary} for name, m in found])
        return
    print_table(("metric", "unit", "what it is"), [(n, m.unit, m.summary) for n, m in found])
