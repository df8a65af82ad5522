"""``tl-loops measure``."""

import argparse
from pathlib import Path
from typing import Any

from tl_loops.cli.inputs import check_place, load, read
from tl_loops.measurements.formats import check_file_ending
from tl_loops.measurements.measure import measure
from tl_loops.report import default_prompts
from tl_loops.writing import check_writable


def run(options: argparse.Namespace) -> None:
    """Measure prompts and write (or print) the profile."""
    if options.out is not None:
        check_file_ending(options.out)
        check_place(options.out)
    if options.checkpoint is not None:
        check_writable(options.checkpoint)
    prompts = read(options)
    model = load(options)
    if prompts is None:
        prompts = list(default_prompts(model).evaluated)
    arguments: dict[str, Any] = (
        {} if options.metrics is None else {"metrics": tuple(options.metrics)}
    )
    profile = measure(
        model,
        [p.text for p in prompts],
        batch_size=options.batch_size,
        checkpoint=options.checkpoint,
        progress=not options.quiet,
        **arguments,
    )
    if options.out is None:
        print(profile.to_frame().to_string(index=False))
    else:
        profile.save(options.out)
        print(Path(options.out).resolve())
