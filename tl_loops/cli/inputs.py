"""What several commands do with their options: places, prompts, models."""

import argparse
from pathlib import Path

from tl_loops.model.looped import LoopedTransformer
from tl_loops.tasks.prompts import PromptText, read_prompts
from tl_loops.writing import check_writable


def check_place(out: str) -> None:
    """Refuse a place that cannot be written before anything is computed."""
    path = Path(out)
    if path.is_dir():
        raise ValueError(f"--out {out} is a directory; give a file")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"--out {out}: the directory {path.resolve().parent} does not exist")
    check_writable(out)


def read(options: argparse.Namespace) -> list[PromptText] | None:
    """The prompts of ``--prompts``."""
    return None if options.prompts is None else read_prompts(options.prompts)


def load(options: argparse.Namespace) -> LoopedTransformer:
    """The model, with its weights as they are stored."""
    check_iterations(options)
    return LoopedTransformer.from_pretrained_no_processing(
        options.model, n_iterations=options.n_iterations, dtype=options.dtype
    )


def check_iterations(options: argparse.Namespace) -> None:
    """Refuse numbers of iterations that no model has."""
    if options.n_iterations is not None and options.n_iterations < 1:
        raise ValueError(f"--n-iterations must be at least 1, got {options.n_iterations}")
