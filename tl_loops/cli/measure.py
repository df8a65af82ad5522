"""``tl-loops measure``, also as one of several processes."""

import argparse
from pathlib import Path
from typing import Any

from tl_loops.cli.inputs import check_place, load, read_any
from tl_loops.cli.output import (
    STANDARD_OUTPUT,
    output_width,
    print_table,
    shows_progress,
    write_out,
)
from tl_loops.measurements.formats import check_file_ending
from tl_loops.measurements.measure import measure
from tl_loops.measurements.profile import LoopProfile
from tl_loops.report import default_prompts
from tl_loops.runs.ranks import launched, process_group, rank_device
from tl_loops.runs.shards import WHOLE, Shard, read_shard
from tl_loops.writing import check_writable


def run(options: argparse.Namespace) -> None:
    """Measure prompts and write (or print) the profile; a shard goes to its checkpoint."""
    if options.shard is None and launched():
        _check(options)
        with process_group() as rank:
            profile = _measured(options, rank, together=True)
        if rank.index == 0:
            _write(options, profile)
        return
    shard = read_shard(options.shard)
    _check(options)
    if shard == WHOLE:
        _write(options, _measured(options, shard))
        return
    if options.checkpoint is None or options.out is not None:
        raise ValueError(
            f"--shard {shard} writes to --checkpoint FILE, and not to --out: tl-loops merge makes "
            "the profile of all shards"
        )
    _measured(options, shard)
    print(Path(options.checkpoint).resolve())


def _check(options: argparse.Namespace) -> None:
    """Raise, before anything is computed, for places that cannot be written."""
    if options.out is not None and options.rows:
        raise ValueError("--rows prints the rows, and --out writes them: give one of the two")
    if options.out not in (None, STANDARD_OUTPUT):
        check_file_ending(options.out)
        check_place(options.out)
    if options.checkpoint is not None:
        check_writable(options.checkpoint)


def _measured(options: argparse.Namespace, shard: Shard, together: bool = False) -> LoopProfile:
    """The profile of a shard or, where the processes work together, of all."""
    prompts = read_any(options)
    model = load(options, rank_device() if together else None)
    if prompts is None:
        sample = default_prompts(model).evaluated
        prompts = [prompt.text for prompt in sample][: options.limit]
    arguments: dict[str, Any] = (
        {} if options.metrics is None else {"metrics": tuple(options.metrics)}
    )
    checkpoint = options.checkpoint
    if checkpoint is not None:
        options.checkpoint = str(shard.path(checkpoint))  # what is said after Ctrl-C
    return measure(
        model,
        prompts,
        batch_size=options.batch_size,
        checkpoint=checkpoint,
        shard="distributed" if together else shard,
        progress=shows_progress(options) and (shard.index == 0 or not together),
        **arguments,
    )


def _write(options: argparse.Namespace, profile: LoopProfile) -> None:
    if options.out == STANDARD_OUTPUT:
        write_out(profile.to_frame().to_csv(index=False).encode("utf-8"))
    elif options.rows:
        _print_rows(profile)
    elif options.out is None:
        print_table(*summary(profile))
    else:
        profile.save(options.out)
        print(Path(options.out).resolve())


def _print_rows(profile: LoopProfile) -> None:
    """A row per block; its means are shortened only where the terminal has no room for them."""
    frame = profile.to_frame()
    text = frame.to_string(index=False)
    if len(text.partition("\n")[0]) <= output_width():
        print(text)
        return
    words = frame.astype(object).where(frame.notna(), "")
    for column in ("relative_depth", "mean", "std"):
        words[column] = [f"{x:.4g}" if x != "" else "" for x in words[column]]
    columns = [str(column) for column in frame.columns]
    rows = [tuple(map(str, row)) for row in words.itertuples(index=False)]
    print_table(columns, rows, numbers=[c for c in columns if c not in ("metric", "phase")])


def summary(profile: LoopProfile) -> tuple[tuple[str, ...], list[tuple[str, ...]], tuple[str, ...]]:
    """A profile as a table with a row per metric: its mean, and how iterations begin and end.

    Returns:
        Heads, rows, and the heads of numbers. The mean is over all blocks that have a value; those
        of the first and the last iteration are over their blocks.
    """
    frame = profile.to_frame()
    layout, ends = profile.layout, {}
    if layout is not None:
        ends = {"first iteration": 0, "last iteration": layout.n_iterations - 1}
    heads = ("mean", *ends)
    rows = []
    for metric, of_metric in frame.groupby("metric", sort=False):
        means = [of_metric["mean"].mean()]
        for t in ends.values():
            means.append(of_metric["mean"][of_metric["iteration"] == t].mean())
        rows.append((str(metric), *(f"{mean:.4g}" for mean in means)))
    return ("metric", *heads), rows, heads
