"""Routing every firing of a bridge's hook points to the hook point of its iteration."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tl_loops.errors import LoopedSemanticsError
from tl_loops.model.bridged.taps import Reading, ReadOnly, Tap
from tl_loops.upstream import AnyHookPoint, has_hooks, unshared

Fire = Callable[[Tensor], Tensor]
Stop = tuple[str, bool]
"""A hook point to stop at, and whether before its hooks rather than after them."""


class _Stopped(Exception):
    """Ends a forward pass of the bridge where it is to stop."""


@dataclass
class Run:
    """One routed run of a bridge.

    Attributes:
        points: The unrolled model's hook points.
        wanted: Names whose tensors views of other names need.
        stop: Where to stop, if anywhere.
        kept: The tensors of ``wanted``, as they left their hook point.
        stopped: What the run stopped at.
        routes: The taps that are listened to.
    """

    points: Mapping[str, AnyHookPoint]
    wanted: frozenset[str] = frozenset()
    stop: Stop | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)
    stopped: Tensor | None = None
    routes: list["Route"] = field(default_factory=list)

    def call(self, forward: Callable[[], Any]) -> Any:
        """Run the bridge; ``None`` where it stopped on the way.

        Raises:
            LoopedSemanticsError: A hook point fired another number of times than the layout says.
        """
        try:
            result = forward()
        except _Stopped:
            return None
        for route in self.routes:
            route.check()
        return result

    def end(self, reading: Reading, x: Tensor, before: bool) -> None:
        """Stop here if this is where to stop."""
        if self.stop == (reading.name, before):
            self.stopped = reading.view.get(x, self.kept)
            raise _Stopped


@dataclass
class Route:
    """The firings of one tap during one run."""

    tap: Tap
    run: Run
    fired: int = 0

    def fire(self, x: Tensor) -> Tensor:
        """Show one firing to the hooks of its iteration; gives ``x`` itself if nothing edits it."""
        if self.fired == len(self.tap.firings):
            self.check(more=True)
        run = self.run
        for reading in self.tap.firings[self.fired]:
            run.end(reading, x, before=True)
            point = run.points[reading.name]
            if has_hooks(point) or reading.name in run.wanted:
                if isinstance(reading.view, ReadOnly) and point._backward_hooks:
                    raise LoopedSemanticsError(reading.view.why)
                value = reading.view.get(x, run.kept)
                seen = point(unshared(value, point))
                if seen is not value:
                    x = reading.view.put(x, seen, run.kept)
                if reading.name in run.wanted:
                    run.kept[reading.name] = seen
            run.end(reading, x, before=False)
        self.fired += 1
        return x

    def check(self, more: bool = False) -> None:
        """Raise on a run that fired another number of times than the layout has iterations.

        Raises:
            LoopedSemanticsError: It did.
        """
        expected = len(self.tap.firings)
        if more or self.fired != expected:
            found = f"more than {expected}" if more else str(self.fired)
            raise LoopedSemanticsError(
                f"{self.tap.source} fired {found} times where the layout has {expected} for it, so "
                "that its firings cannot be told apart: the number of iterations that ran is not "
                "that of model.cfg.n_iterations"
            )


@contextmanager
def routed(
    taps: Iterable[Tap],
    points: Mapping[str, AnyHookPoint],
    source: Callable[[str], Any],
    stop: Stop | None = None,
) -> Iterator[Run]:
    """Route firings for a block of code; hooks that nobody listens to are not installed.

    Args:
        taps: What fires where.
        points: The unrolled model's hook points, by name.
        source: Gives the hook point or module that a tap listens at.
        stop: Where the run is to stop.

    Yields:
        The run, whose ``call`` is to run the bridge.
    """
    taps = list(taps)
    readings = [reading for tap in taps for firing in tap.firings for reading in firing]
    hooked = {reading.name for reading in readings if has_hooks(points[reading.name])}
    needs = {reading.name: reading.needs for reading in readings}
    wanted: set[str] = set()
    new = {need for name in hooked for need in needs[name]}
    while new:  # What a view needs may be a view itself.
        wanted |= new
        new = {need for name in new for need in needs[name]} - wanted
    listened = hooked | wanted | ({stop[0]} if stop else set())
    run = Run(points, frozenset(wanted), stop)
    run.routes = [Route(tap, run) for tap in taps if not listened.isdisjoint(tap.names())]
    with ExitStack() as stack:
        for route in run.routes:
            stack.callback(_install(route, source(route.tap.source)))
        yield run


def _install(route: Route, source: Any) -> Callable[[], None]:
    """Start a route; gives what ends it."""
    if isinstance(source, AnyHookPoint):
        source.add_hook(_hook(route.fire))
        handle = source.fwd_hooks[-1]

        def remove() -> None:
            handle.hook.remove()
            source.fwd_hooks.remove(handle)

        return remove
    if route.tap.source.endswith(":in"):
        torch_handle = source.register_forward_pre_hook(
            lambda _, inputs: (route.fire(inputs[0]), *inputs[1:])
        )
    else:
        torch_handle = source.register_forward_hook(lambda _, __, output: route.fire(output))
    return torch_handle.remove


def _hook(fire: Fire) -> Callable[..., Tensor | None]:
    def hook(tensor: Tensor, hook: AnyHookPoint) -> Tensor | None:
        value = fire(tensor)
        # The bridge takes identity for "nothing was edited", and then runs the original norm.
        return None if value is tensor else value

    return hook
