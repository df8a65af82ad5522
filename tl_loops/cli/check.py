"""``tl-loops check``."""

import argparse
import dataclasses
import warnings

from tl_loops.cli.inputs import check_iterations, device_of
from tl_loops.cli.output import print_json, print_lines
from tl_loops.model.check import check


def run(options: argparse.Namespace) -> int:
    """Load a checkpoint, try what a looped model promises, and say what holds."""
    check_iterations(options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no tokenizer files")
        report = check(options.model, options.n_iterations, options.dtype, device_of(options))
    if options.json:
        print_json({**dataclasses.asdict(report), "passed": report.passed})
    else:
        print_lines(str(report))
    return 0 if report.passed else 1
