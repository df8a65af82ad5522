"""One batch through the model: every activation is reduced in its hook and let go."""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.measurements import Activation, Measurement, core_calls
from tl_loops.metrics.patterns import check_pattern

Hook = tuple[str, Callable[[Tensor, Any], Tensor | None]]
CallKey = tuple[Activation, str]
"""An activation of one core layer (or, between iterations, of the loop): its calls are one path."""

_SAMPLED = ("series", "path")
"""What is sampled call by call, and reduced when the run is over."""


@dataclass(frozen=True)
class PlannedMetric:
    """A measurement on one model.

    Attributes:
        name: In the registry.
        measurement: The registry's entry.
        options: All of its options.
        blocks: The unrolled blocks that get a value.
    """

    name: str
    measurement: Measurement
    options: Mapping[str, Any]
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class _Point:
    """A hook point that is read.

    Attributes:
        hook_name: Its canonical name.
        activation: What passes there.
        block: The block whose value it decides; between iterations the last one of the iteration.
        key: The path that it is a call of; ``None`` outside of the core.
        metrics: What reads it.
    """

    hook_name: str
    activation: Activation
    block: int
    key: CallKey | None
    metrics: tuple[PlannedMetric, ...]


@dataclass(frozen=True)
class StreamPlan:
    """Which hook points the metrics read.

    Attributes:
        metrics: What is measured.
        layout: ``None`` for a feedforward model.
        causal: Whether patterns must be causal.
        points: Every hook point that something reads.
    """

    metrics: tuple[PlannedMetric, ...]
    layout: LoopLayout | None
    causal: bool
    points: tuple[_Point, ...]

    @classmethod
    def make(
        cls,
        metrics: Sequence[PlannedMetric],
        layout: LoopLayout | None,
        n_layers: int,
        causal: bool,
    ) -> "StreamPlan":
        """Find the hook points.

        Args:
            metrics: What is measured.
            layout: ``None`` for a feedforward model.
            n_layers: Unrolled depth.
            causal: Whether the model's attention is causal.
        """
        physical = {} if layout is None else core_calls(layout)
        layer_of = {block: name for name, blocks in physical.items() for block in blocks}
        points = []
        for block in range(n_layers):
            for activation, rest in (
                ("pattern", "attn.hook_pattern"),
                ("resid_post", "hook_resid_post"),
            ):
                layer = layer_of.get(block)
                key = None if layer is None else (activation, layer)
                points.append((f"blocks.{block}.{rest}", activation, block, key))
        for t in range(0 if layout is None else layout.n_iterations):
            assert layout is not None
            block = layout.index(iteration=t, layer=-1)
            for activation in ("state_out", "exit_gate"):
                path = layout.state_path(t)
                name = f"iter.{t}.hook_{activation}"
                points.append((name, activation, block, (activation, path)))
        read = []
        for name, activation, block, key in points:
            readers = tuple(
                m
                for m in metrics
                if m.measurement.reads == activation
                # What needs other calls than this one also reads those that have no value.
                and (block in m.blocks or (m.measurement.needs != "value" and key is not None))
            )
            if readers:
                read.append(_Point(name, activation, block, key, readers))
        return cls(tuple(metrics), layout, causal, tuple(read))

    @property
    def needs_last_calls(self) -> bool:
        """Whether a pass before must keep what the last call of each layer gives."""
        return any(m.measurement.against_last for m in self.metrics)


@torch.no_grad()
def reduce_batch(
    model: Model, tokens: Int[Tensor, "batch pos"], plan: StreamPlan
) -> dict[str, Float[Tensor, "block batch"]]:
    """Run prompts of equal length and reduce what they give.

    Held at any time, besides what the forward pass itself needs: for metrics that compare calls the
    last one or two calls of each core layer, for those of the path of the states its first and its
    last 16 states, for those that compare with the last iteration one
    call of each, and one number per token and call for trajectories and exits. Metrics that compare
    with the last iteration take a second pass; where the initial state is drawn afresh at each
    pass, both start from one draw.

    Args:
        model: The model.
        tokens: Real tokens alone.
        plan: What to read.

    Returns:
        By metric, one value for each of its blocks and each prompt, float64 on the CPU.

    Raises:
        ValueError: A pattern is none (rows that do not sum to 1, or are not causal).
    """
    last: dict[CallKey, Tensor] = {}
    hooks: list[Hook] = []
    if plan.needs_last_calls:
        last, initial_state = _last_calls(model, tokens, plan)
        hooks.append(("hook_initial_state", lambda _, hook: initial_state))
    batch = _Batch(plan, last, tokens.shape[0], tokens.device)
    hooks += [(point.hook_name, batch.hook(point)) for point in plan.points]
    _run(model, tokens, hooks, return_type=None)
    return batch.finish()


def _run(model: Model, tokens: Tensor, hooks: list[Hook], **arguments: Any) -> None:
    # With an explicit mask no token is taken for padding because it has the padding's id.
    mask = torch.ones_like(tokens)
    model.run_with_hooks(tokens, fwd_hooks=hooks, attention_mask=mask, **arguments)


def _last_calls(
    model: Model, tokens: Tensor, plan: StreamPlan
) -> tuple[dict[CallKey, Tensor], Tensor]:
    """What the last call of each core layer gives, and the initial state that it came from."""
    assert plan.layout is not None
    wanted = {m.measurement.reads for m in plan.metrics if m.measurement.against_last}
    final = {blocks[-1] for blocks in core_calls(plan.layout).values()}
    last: dict[CallKey, Tensor] = {}
    start: list[Tensor] = []

    def keep(key: CallKey) -> Callable[[Tensor, Any], None]:
        def hook(x: Tensor, hook: Any) -> None:
            last[key] = x

        return hook

    def look(x: Tensor, hook: Any) -> None:
        """Keep nothing: a pattern that somebody looks at is computed as in the other pass."""

    hooks: list[Hook] = [("hook_initial_state", lambda x, hook: start.append(x))]
    for point in plan.points:
        if (
            point.activation not in ("pattern", "resid_post")
            or point.block >= plan.layout.coda_start
        ):
            continue
        key = point.key if point.activation in wanted and point.block in final else None
        hooks.append((point.hook_name, look if key is None else keep(key)))
    _run(model, tokens, hooks, stop_at_layer=plan.layout.coda_start)
    return last, start[0]


class _Batch:
    """What the hooks of one forward pass share.

    Whatever outlives a hook has its place from the start: small tensors that are made between large
    ones and stay would leave the allocator with holes that no large one fits into again.
    """

    def __init__(
        self, plan: StreamPlan, last: dict[CallKey, Tensor], batch: int, device: torch.device
    ):
        self.plan = plan
        self.last = last
        # The calls before the present one, as many as a metric needs.
        self.before: dict[CallKey, deque[Tensor]] = {}
        self.first: dict[CallKey, Tensor] = {}
        self.series: dict[tuple[CallKey, Callable], Tensor] = {}
        self.n_calls = Counter(point.key for point in plan.points)
        self.calls_seen: Counter[CallKey] = Counter()
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.values = {
            metric.name: torch.full((len(metric.blocks), batch), torch.nan, dtype=dtype).to(device)
            for metric in plan.metrics
        }

    def hook(self, point: _Point) -> Callable[[Tensor, Any], None]:
        """The hook of one point."""

        def reduce(x: Tensor, hook: Any) -> None:
            self._observe(point, x)

        return reduce

    def _observe(self, point: _Point, x: Tensor) -> None:
        if point.activation == "pattern":
            try:
                check_pattern(x, causal=self.plan.causal)
            except ValueError as error:
                raise ValueError(f"{point.hook_name}: {error}") from error
        sampled = set()
        for metric in point.metrics:
            m = metric.measurement
            if m.needs in _SAMPLED:
                if m.per_token not in sampled:  # Several metrics share one series.
                    self._sample(point, m, x)
                    sampled.add(m.per_token)
            elif point.block in metric.blocks:
                arguments = self._arguments(m, point.key, x)
                self._put(metric, point.block, m.function(*arguments, **metric.options))
        if point.key is not None:
            self.calls_seen[point.key] += 1
            self._remember(point, point.key, x)

    def _arguments(self, m: Measurement, key: CallKey | None, x: Tensor) -> tuple[Tensor, ...]:
        if m.needs == "value":
            return (x,)
        assert key is not None
        if m.needs == "last":
            return x, self.last[key]
        return *list(self.before[key])[1 - m.window :], x

    def _remember(self, point: _Point, key: CallKey, x: Tensor) -> None:
        n = max(m.measurement.window for m in point.metrics) - 1
        if any(m.measurement.needs == "path" for m in point.metrics):
            self.first.setdefault(key, x)
        if n:
            self.before.setdefault(key, deque(maxlen=n)).append(x)

    def _sample(self, point: _Point, m: Measurement, x: Tensor) -> None:
        key = point.key
        assert key is not None and m.per_token is not None
        if m.needs == "path":
            recent = [*self.before.get(key, ()), x][-m.window :]
            value = m.per_token(self.first.get(key, x), *recent)
        else:
            value = m.per_token(x, self.last[key]) if m.against_last else m.per_token(x)
        if (key, m.per_token) not in self.series:
            self.series[key, m.per_token] = value.new_empty(self.n_calls[key], *value.shape)
        self.series[key, m.per_token][self.calls_seen[key]] = value

    def _put(self, metric: PlannedMetric, block: int, value: Tensor) -> None:
        self.values[metric.name][metric.blocks.index(block)] = value

    def finish(self) -> dict[str, Float[Tensor, "block batch"]]:
        """Reduce the series, and give all values."""
        for metric in self.plan.metrics:
            if metric.measurement.needs in _SAMPLED:
                self._finish_series(metric)
        return {name: values.cpu().double() for name, values in self.values.items()}

    def _finish_series(self, metric: PlannedMetric) -> None:
        m = metric.measurement
        assert m.per_token is not None
        blocks: dict[CallKey, list[int]] = {}
        for point in self.plan.points:
            if metric in point.metrics and point.block in metric.blocks:
                assert point.key is not None
                blocks.setdefault(point.key, []).append(point.block)
        for key, path in blocks.items():
            value = m.function(self.series[key, m.per_token], **metric.options)
            rows = value if value.ndim == 2 else value.unsqueeze(0)
            for block, row in zip(path, rows, strict=True):
                self._put(metric, block, row)
