"""Changing how often a loop runs: blocks and hook points come and go, weights stay."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tl_loops.model.hooks import CoordinateHooks
from tl_loops.nn.loop.hooks import IterationHooks
from tl_loops.nn.unrolling import unroll


class Iterations(CoordinateHooks):
    """A model whose blocks are unrolled from physical ones, as often as its config says."""

    blocks: nn.ModuleList
    iter: nn.ModuleList
    physical_blocks: Callable[[], dict[str, Any]]

    def _iteration_hooks(self, old: Iterable[nn.Module]) -> list[IterationHooks]:
        """Hook points for the present iterations; those of ``old`` are kept where they fit."""
        raise NotImplementedError

    def set_iterations(self, n_iterations: int) -> None:
        """Change the number of iterations in place; no weight is copied.

        Iterations that remain keep their hooks; those that go lose them.

        Raises:
            ConfigError: ``n_iterations`` is not an integer of at least 1.
            LoopedSemanticsError: The model has several loops.
        """
        if n_iterations == self.cfg.n_iterations:
            return
        old, blocks, physical = self.layout, list(self.blocks), self.physical_blocks()
        self.cfg.set_iterations(n_iterations)
        kept = [
            [blocks[i] for i in old.iteration_blocks(t)]
            for t in range(min(old.n_iterations, n_iterations))
        ]
        layout = self.layout
        unrolled = unroll(layout, physical, reuse=kept)
        core = unrolled[layout.core_start : layout.coda_start]
        self.blocks = nn.ModuleList([*blocks[: old.core_start], *core, *blocks[old.coda_start :]])
        self.iter = nn.ModuleList(self._iteration_hooks(self.iter))
        self.setup()

    @contextmanager
    def iterations(self, n_iterations: int) -> Iterator[Any]:
        """Run a block of code with another number of iterations; hooks are restored behind it.

        Raises:
            ConfigError: ``n_iterations`` is not an integer of at least 1.
            LoopedSemanticsError: The model has several loops.
        """
        before, blocks, hooks = self.cfg.n_iterations, self.blocks, self.iter
        self.set_iterations(n_iterations)
        try:
            yield self
        finally:
            if self.cfg.n_iterations != before or self.blocks is not blocks:
                self.cfg.set_iterations(before)
                self.blocks, self.iter = blocks, hooks
                self.setup()
