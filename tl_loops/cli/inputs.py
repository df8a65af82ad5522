"""What several commands do with their options: places, prompts, models."""

import argparse
from pathlib import Path

import torch

from tl_loops.cli.output import STANDARD_OUTPUT
from tl_loops.model.looped import LoopedTransformer
from tl_loops.tasks.data_sets import read_column, read_tokens
from tl_loops.tasks.prompts import PromptText, read_prompts
from tl_loops.writing import check_writable


def check_place(out: str) -> None:
    """Raise on a place that cannot be written before anything is computed."""
    if out == STANDARD_OUTPUT:
        return
    path = Path(out)
    if path.is_dir():
        raise ValueError(f"--out {out} is a directory; give a file")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"--out {out}: the directory {path.resolve().parent} does not exist")
    check_writable(out)


def read(options: argparse.Namespace) -> list[PromptText] | None:
    """The prompts of ``--prompts``."""
    return None if options.prompts is None else read_prompts(options.prompts)


def read_any(options: argparse.Namespace) -> list[str] | list[list[int]] | None:
    """The prompts of ``--prompts``, ``--tokens`` or ``--dataset``, as text or token ids."""
    given = [name for name in ("prompts", "tokens", "dataset") if getattr(options, name)]
    if len(given) > 1:
        raise ValueError(f"give one of {' and '.join('--' + name for name in given)}")
    if (options.column is None) != (options.dataset is None):
        raise ValueError("--dataset NAME and --column NAME go together")
    if options.dataset is not None:
        given = (options.column, options.split, options.subset, options.limit)
        return read_column(options.dataset, *given)
    for name in ("split", "subset"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is about --dataset, which is not given")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    if options.tokens is not None:
        return read_tokens(options.tokens)[: options.limit]
    prompts = read(options)
    return None if prompts is None else [prompt.text for prompt in prompts][: options.limit]


def load(options: argparse.Namespace, device: torch.device | None = None) -> LoopedTransformer:
    """The model, with its weights as they are stored.

    Args:
        options: Of the command.
        device: Where to, if ``--device`` does not say; ``None``: TransformerLens's choice.

    Raises:
        ValueError: There is no such device, or no model has that number of iterations.
    """
    check_iterations(options)
    device = device_of(options) or device
    place = {} if device is None else {"device": device}
    return LoopedTransformer.from_pretrained_no_processing(
        options.model, n_iterations=options.n_iterations, dtype=options.dtype, **place
    )


def device_of(options: argparse.Namespace) -> torch.device | None:
    """What ``--device`` names; ``None``: nothing.

    Raises:
        ValueError: PyTorch knows no device of that name, or there is none here.
    """
    if options.device is None:
        return None
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device {options.device}: there is no such device here; give cpu, or leave it out"
        ) from error
    return device


def check_iterations(options: argparse.Namespace) -> None:
    """Raise on numbers of iterations that no model has."""
    if options.n_iterations is not None and options.n_iterations < 1:
        raise ValueError(f"--n-iterations must be at least 1, got {options.n_iterations}")
