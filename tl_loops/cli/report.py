"""``tl-loops report``."""

import argparse

from tl_loops.cli.inputs import check_place, load, read
from tl_loops.cli.output import STANDARD_OUTPUT, shows_progress, write_out
from tl_loops.report import report_html, write_report


def run(options: argparse.Namespace) -> None:
    """Write the report."""
    check_place(options.out)
    prompts = read(options)
    model = load(options)
    progress = shows_progress(options)
    if options.out == STANDARD_OUTPUT:
        write_out(report_html(model, prompts, progress=progress).encode("utf-8"))
        return
    print(write_report(model, options.out, prompts, progress=progress))
