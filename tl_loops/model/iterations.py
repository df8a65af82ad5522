"""Changing how often a loop runs: blocks and hook points come and go, weights stay."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tl_loops.nn.unrolling import unroll


def set_iterations(model: Any, n_iterations: int) -> None:
    """Change the number of iterations of a model in place; see ``model.set_iterations``.

    All that can fail is made first, by a config of its own; the model changes last.
    """
    if n_iterations == model.cfg.n_iterations:
        return
    old, blocks, physical = model.layout, list(model.blocks), model.physical_blocks()
    cfg = copy.copy(model.cfg)
    cfg.set_iterations(n_iterations)
    kept = [
        [blocks[i] for i in old.iteration_blocks(t)]
        for t in range(min(old.n_iterations, n_iterations))
    ]
    layout = cfg.layout
    unrolled = unroll(layout, physical, reuse=kept)
    core = unrolled[layout.core_start : layout.coda_start]
    new_blocks = nn.ModuleList([*blocks[: old.core_start], *core, *blocks[old.coda_start :]])
    new_iter = nn.ModuleList(model.iteration_hooks(cfg, model.iter))
    _assign(model, n_iterations, new_blocks, new_iter)


@contextmanager
def iterations(model: Any, n_iterations: int | None) -> Iterator[Any]:
    """Run a block of code with another number of iterations; ``None``: with the present one.

    This is the one way in which a call takes ``n_iterations``. Blocks and hook points of before
    come back after it, with their hooks.
    """
    if n_iterations is None:
        yield model
        return
    before, blocks, hooks = model.cfg.n_iterations, model.blocks, model.iter
    set_iterations(model, n_iterations)
    try:
        yield model
    finally:
        if model.cfg.n_iterations != before or model.blocks is not blocks:
            _assign(model, before, blocks, hooks)


def _assign(model: Any, n_iterations: int, blocks: nn.ModuleList, hooks: nn.ModuleList) -> None:
    model.cfg.set_iterations(n_iterations)
    model.blocks, model.iter = blocks, hooks
    model.setup()
