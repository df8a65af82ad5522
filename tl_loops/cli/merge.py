"""``tl-loops merge``."""

import argparse
from pathlib import Path

from tl_loops.cli.inputs import check_place
from tl_loops.measurements.formats import ENDINGS, check_file_ending
from tl_loops.measurements.from_run import KIND, profile_parts
from tl_loops.measurements.profile import LoopProfile
from tl_loops.runs.merge import merge_runs, read_shard_file


def run(options: argparse.Namespace) -> None:
    """Merge the shards of one run, or the profiles of several."""
    check_place(options.out)
    as_profile = _is_profile(options.out)
    if as_profile:
        check_file_ending(options.out)
    if all(_is_profile(path) for path in options.files):
        first, *others = (LoopProfile.load(path) for path in options.files)
        first.merge(*others).save(options.out)
    elif any(_is_profile(path) for path in options.files):
        raise ValueError("some of the files are profiles and others are shards: merge one kind")
    else:
        whole = merge_runs([read_shard_file(path) for path in options.files])
        if as_profile and whole.run.kind != KIND:
            raise ValueError(
                f"these are shards of a run of kind {whole.run.kind}, not of a {KIND}: give --out "
                "another ending; the same call without shard and with that checkpoint gives its "
                "result"
            )
        if as_profile:
            LoopProfile(*profile_parts(whole)).save(options.out)
        else:
            whole.save(options.out)
    print(Path(options.out).resolve())


def _is_profile(path: str) -> bool:
    return Path(path).suffix.lower() in ENDINGS
