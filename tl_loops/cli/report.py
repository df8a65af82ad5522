"""``tl-loops report``."""

import argparse

from tl_loops.cli.inputs import check_place, load, read
from tl_loops.report import write_report


def run(options: argparse.Namespace) -> None:
    """Write the report."""
    check_place(options.out)
    prompts = read(options)
    model = load(options)
    print(write_report(model, options.out, prompts, progress=not options.quiet))
