"""Carrying components along a path of the residual stream, and directions back."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.cache.path import BeginLoop, Inject, Map, Site, Step, Write

INJECTION_ROWS = ("whole", "parts", "by_iteration")
"""How what entered through the injections appears among the components."""


class Rows(NamedTuple):
    """Components that one site contributes: ``[component, ..., d_model]`` and a label for each."""

    values: Tensor
    labels: Sequence[str]


class Carrier:
    """Carries the components of a path forward, step by step.

    Args:
        rows: What a site contributes; ``None``: nothing.
        injection: How e appears. ``"whole"``: one component "injection". ``"parts"``: as the
            components of e, each of which enters through every injection. ``"by_iteration"``: one
            component for every iteration.
    """

    def __init__(self, rows: Callable[[Site], Rows | None], injection: str = "parts"):
        self.labels: list[str] = []
        self._rows, self._injection = rows, injection
        self._done: Tensor | None = None
        self._pending: list[Tensor] = []
        self._fed: Tensor | None = None
        self._fed_at = 0
        self._entering: Tensor | None = None

    @property
    def stack(self) -> Float[Tensor, "component *batch_pos d_model"] | None:
        """The components where they stand now; ``None``: there are none yet."""
        if self._pending:
            done = [] if self._done is None else [self._done]
            self._done, self._pending = torch.cat([*done, *self._pending]), []
        return self._done

    def run(self, steps: Sequence[Step], has_injection: bool) -> "Carrier":
        """Take all steps of a path.

        Args:
            steps: The path.
            has_injection: Whether e enters again after the beginning of the loop. If neither it
                nor the state does, what lies before the loop does not reach the target.
        """
        starts = [(i, step) for i, step in enumerate(steps) if isinstance(step, BeginLoop)]
        if starts and starts[0][1].replaced:
            if self._injection != "parts" or not has_injection:
                steps = steps[starts[0][0] :]
        for step in steps:
            self.take(step)
        return self

    def take(self, step: Step) -> None:
        """Take one step."""
        if isinstance(step, Write):
            self._write(self._rows(step.site))
        elif isinstance(step, Map):
            if self.stack is not None:
                self._done = step.map(self.stack)
        elif isinstance(step, BeginLoop):
            self._begin(step.replaced)
        elif isinstance(step, Inject):
            self._inject(step)

    def _write(self, rows: Rows | None) -> None:
        if rows is not None:
            self._pending.append(rows.values)
            self.labels.extend(rows.labels)

    def _begin(self, replaced: bool) -> None:
        if self._injection == "parts":
            self._fed = self.stack
            if replaced and self._done is not None:
                self._done = torch.zeros_like(self._done)

    def _inject(self, step: Inject) -> None:
        if self._injection == "by_iteration":
            rows = self._rows(step.site)
            if rows is not None:
                self._write(Rows(step.prepare(rows.values), rows.labels))
            return
        if self._injection == "whole" and self._fed is None:
            rows = self._rows(Site("injection", "injection"))
            if rows is not None:
                self._fed, self._fed_at = rows.values, len(self.labels)
                self._write(Rows(torch.zeros_like(rows.values), rows.labels))
        stack, start = self.stack, self._fed_at
        if self._fed is None or stack is None:
            return
        if self._entering is None:
            self._entering = step.prepare(self._fed)
        stop = start + self._fed.shape[0]
        self._done = torch.cat([stack[:start], stack[start:stop] + self._entering, stack[stop:]])


def pull_back(
    steps: Sequence[Step],
    directions: Float[Tensor, "output *batch_pos d_model"],
    rows: Callable[[Site, Tensor], Rows | None],
) -> Iterator[Rows]:
    """Pull directions at the end of a path back to its sites, from the last to the first.

    ``rows(site, pulled)`` gives a site's components already multiplied with the directions that
    were pulled back to it, so that no component need exist in the width of the model.
    """
    fed: Tensor | None = None
    g: Tensor | None = directions
    for step in reversed(steps):
        if g is None:
            return
        if isinstance(step, Write):
            found = rows(step.site, g)
            if found is not None:
                yield found
        elif isinstance(step, Map):
            g = step.map.adjoint(g)
        elif isinstance(step, Inject):
            entered = step.prepare.adjoint(g)
            fed = entered if fed is None else fed + entered
        elif isinstance(step, BeginLoop):
            if step.replaced:
                g = fed
            elif fed is not None:
                g = g + fed
