"""Depth profiles: mean, deviation and count of each metric at each unrolled block."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.errors import did_you_mean
from tl_loops.layout.layout import LoopLayout
from tl_loops.measurements.figure import plot_profile
from tl_loops.measurements.formats import load_profile, save_profile
from tl_loops.measurements.from_run import profile_parts
from tl_loops.measurements.provenance import Provenance
from tl_loops.measurements.table import COLUMNS, Grouping, grouped, table_rows
from tl_loops.metrics import stages
from tl_loops.runs.batch_file import SavedRun
from tl_loops.runs.merge import merge_runs
from tl_loops.runs.moments import Moments

if TYPE_CHECKING:
    import pandas

Statistic = Literal["mean", "std", "count", "undefined"]


@dataclass(frozen=True, eq=False)
class LoopProfile:
    """Statistics over prompts of each metric at each unrolled block.

    The three groupings of arXiv 2604.11791 (section 4.1) are :meth:`unrolled`,
    :meth:`by_iteration` and :meth:`by_layer`, and the same for tables with :meth:`to_frame`. One
    prompt is one sample. Prompts whose value is NaN or infinite (a score that is undefined for one
    token, say) are counted as undefined and are no part of mean and deviation. Where a metric has
    no value by its nature (the first iteration of a successive difference) both counts are 0.

    Attributes:
        moments: Moments [n_layers] by metric.
        layout: The unrolled blocks; ``None`` for a feedforward model.
        provenance: What was measured.
        shard: The shard of a run that this is, with the numbers of each of its batches; ``None``
            for a whole one. The statistics of a shard are those of its own prompts.
    """

    moments: Mapping[str, Moments]
    layout: LoopLayout | None
    provenance: Provenance
    shard: SavedRun | None = None

    def __post_init__(self) -> None:
        depths = {moments.count.shape for moments in self.moments.values()}
        if len(depths) != 1:
            raise ValueError(f"a profile needs metrics of one depth, got {sorted(depths)}")
        if self.layout is not None and depths != {(self.layout.n_layers,)}:
            raise ValueError(
                f"moments have shape {list(depths.pop())}, but the layout has "
                f"{self.layout.n_layers} blocks"
            )

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return tuple(self.moments)

    @property
    def n_layers(self) -> int:
        """Unrolled depth."""
        return next(iter(self.moments.values())).count.shape[0]

    @checked
    def mean(self, metric: str) -> Float[Tensor, "block"]:
        """Mean over prompts at each unrolled block; NaN where no prompt has a value."""
        return self._of(metric).mean

    @checked
    def std(self, metric: str, ddof: int = 1) -> Float[Tensor, "block"]:
        """Standard deviation over prompts; NaN where ``ddof`` or fewer have a value.

        Args:
            metric: Name of a metric.
            ddof: 1 for the sample's deviation, 0 for the population's.
        """
        return self._of(metric).std(ddof)

    @checked
    def count(self, metric: str) -> Int[Tensor, "block"]:
        """Number of prompts that have a value."""
        return self._of(metric).count

    @checked
    def undefined(self, metric: str) -> Int[Tensor, "block"]:
        """Number of prompts whose value is undefined."""
        return self._of(metric).undefined

    @property
    def relative_depth(self) -> Float[Tensor, "block"]:
        """Depth of each block in percent of one pass: prelude, one iteration of the core, coda.

        The j-th of the k blocks on that way stands at 100 j / (k - 1), so every iteration covers
        the same range and compares with a feedforward model's layers (arXiv 2604.11791, Fig. 8). A
        single block stands at 0.
        """
        if self.layout is None:
            return self.pass_depth
        places = [self.layout.place_in_pass(block) for block in range(self.n_layers)]
        return self.pass_depth[places]

    @property
    def pass_depth(self) -> Float[Tensor, "depth"]:
        """Relative depths in percent along one pass: the x axis of :meth:`by_iteration`."""
        size = self.n_layers if self.layout is None else self.layout.n_pass
        return torch.arange(size, dtype=torch.float64) * (100.0 / max(size - 1, 1))

    @checked
    def unrolled(self, metric: str, statistic: Statistic = "mean") -> Shaped[Tensor, "block"]:
        """A statistic at each unrolled block: no grouping, realised depth.

        Raises:
            ValueError: Unknown metric (near matches are suggested) or statistic.
        """
        if statistic not in ("mean", "std", "count", "undefined"):
            raise ValueError(
                f"statistic={statistic!r}, expected 'mean', 'std', 'count' or 'undefined'"
            )
        return getattr(self, statistic)(metric)

    @checked
    def by_iteration(
        self, metric: str, statistic: Statistic = "mean", outer: bool = False
    ) -> Shaped[Tensor, "iteration depth"]:
        """A statistic with one row per iteration.

        Args:
            metric: Name of a metric.
            statistic: What to show.
            outer: Whether each row also has the prelude's blocks in front and the coda's after,
                which are the same in all rows; its x axis is then :attr:`pass_depth`. Otherwise it
                is that without ``n_prelude`` entries in front and ``n_coda`` after.

        Raises:
            ValueError: As :meth:`unrolled`; a feedforward model has no iterations.
            LoopedSemanticsError: The iterations differ in length, or with ``outer`` in depth.
        """
        at, values = self._looped("by_iteration"), self.unrolled(metric, statistic)
        if not outer:
            return at.by_iteration(values)
        return torch.stack([values[at.pass_blocks(t)] for t in range(at.n_iterations)])

    @checked
    def by_layer(
        self, metric: str, statistic: Statistic = "mean"
    ) -> Shaped[Tensor, "layer iteration"]:
        """A statistic with one row a core layer, along the iterations.

        Raises:
            ValueError: As :meth:`by_iteration`.
        """
        return self.by_iteration(metric, statistic).T

    @checked
    def to_frame(self, by: Grouping = "unrolled") -> "pandas.DataFrame":
        """A tidy table: one row for each metric and block that has a value.

        Args:
            by: Which rows and in which order. ``"unrolled"``: all, along the realised depth.
                ``"iteration"``: core rows along the depth of each iteration, with the rows of
                prelude and coda in each of them. ``"layer"``: core rows along the iterations of
                each layer.

        Returns:
            Columns metric, block, phase, iteration, layer, relative_depth (percent), mean, std,
            count and undefined. Iteration is missing outside of the core (for ``"iteration"`` it is
            filled in); phase is also missing for a feedforward model.

        Raises:
            ValueError: Unknown grouping; a feedforward model has no iterations.
        """
        import pandas

        if by not in ("unrolled", "iteration", "layer"):
            raise ValueError(f"by={by!r}, expected 'unrolled', 'iteration' or 'layer'")
        rows = table_rows(self)
        if by != "unrolled":
            rows = grouped(rows, self._looped("to_frame"), by)
        table = pandas.DataFrame(rows, columns=list(COLUMNS))
        whole = {"block": "int64", "iteration": "Int64", "layer": "int64"}
        return table.astype({**whole, "count": "int64", "undefined": "int64"})

    def merge(self, *others: "LoopProfile") -> "LoopProfile":
        """The profile of all prompts together, as if they had been measured in one run.

        Shards of one run (``measure(..., shard=(k, n))``) give the bits of one process on the same
        device. Profiles of several runs agree with those of one run up to rounding (see
        :class:`tl_loops.runs.moments.Moments`); nothing tells whether a prompt is in both.

        Raises:
            ValueError: The profiles are of different models, metrics, options, numbers of
                iterations or versions; the message says what differs.
            CheckpointError: A shard is missing, unfinished, given twice, or of another run; the
                message names it.
        """
        shards = [p.shard for p in (self, *others) if p.shard is not None]
        if shards:
            if len(shards) <= len(others):
                raise ValueError(
                    f"{shards[0].name} is a shard, but other profiles are whole: merge all shards "
                    "of its run first"
                )
            return LoopProfile(*profile_parts(merge_runs(shards)))
        merged = self
        for other in others:
            merged = merged._merge(other)
        return merged

    def _merge(self, other: "LoopProfile") -> "LoopProfile":
        sums = ("n_prompts", "n_tokens")
        for field in fields(Provenance):
            mine, theirs = (getattr(p.provenance, field.name) for p in (self, other))
            if field.name == "weights" and mine is None and theirs is None:
                raise ValueError(
                    f"nothing tells whether these profiles of {self.provenance.model} are of the "
                    "same weights, which changed or were deleted before they were asked for: merge "
                    "or save profiles while their model is as it was measured"
                )
            if field.name not in sums and mine != theirs:
                raise ValueError(
                    f"these profiles are not of one kind: {field.name} is {mine!r} and {theirs!r}"
                )
        if self.layout != other.layout or set(self.metrics) != set(other.metrics):
            raise ValueError(
                f"these profiles are not of one kind: {self!r} and {other!r} differ in their "
                "layout or metrics"
            )
        return LoopProfile(
            {name: moments.merge(other.moments[name]) for name, moments in self.moments.items()},
            self.layout,
            replace(
                self.provenance,
                n_prompts=self.provenance.n_prompts + other.provenance.n_prompts,
                n_tokens=self.provenance.n_tokens + other.provenance.n_tokens,
            ),
        )

    @checked
    def align_stages(
        self, reference: "LoopProfile", metric: str, outer: bool = False, **options: Any
    ) -> stages.StageAlignment:
        """Compare each iteration's curve with the layers of a feedforward model.

        Args:
            reference: Profile of the model to compare with; its unrolled curve is taken.
            metric: Which metric.
            outer: Whether each curve includes prelude and coda, as for :meth:`by_iteration`.
            **options: Of :func:`tl_loops.metrics.stages.align_stages`.

        Returns:
            One entry per iteration (a single one for a feedforward profile).

        Raises:
            ValueError: The metric is in only one of them, was measured with other options, or has
                no value at some block; see ``align_stages``.
        """
        mine, theirs = (p.provenance.options.get(metric) for p in (self, reference))
        curve = (
            self.unrolled(metric) if self.layout is None else self.by_iteration(metric, outer=outer)
        )
        target = reference.unrolled(metric)
        if mine != theirs:
            raise ValueError(f"{metric} was measured with other options: {mine} and {theirs}")
        return stages.align_stages(curve, target, **options)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table and where it comes from, whole or not at all.

        Args:
            path: Ends in ``.parquet``, ``.csv`` or ``.json``; for a shard in ``.shard``.

        Raises:
            ValueError: Another ending.
            FileNotFoundError: The directory does not exist.
            ImportError: pyarrow, which Parquet needs, is missing.
        """
        if self.provenance.weights is None:
            warnings.warn(
                f"{path} does not say which weights {self.provenance.model} had: they changed or "
                "were deleted between measuring and saving",
                stacklevel=2,
            )
        save_profile(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LoopProfile":
        """Read what :meth:`save` wrote; statistics come back bit by bit.

        Raises:
            ValueError: Another ending, or the file holds no (whole) profile.
            CheckpointError: A shard's file is damaged.
            FileNotFoundError: There is no such file.
            ImportError: pyarrow, which Parquet needs, is missing.
        """
        parts, shard = load_profile(path)
        return cls(*parts, shard)

    @checked
    def plot(self, metric: str | None = None, by: Grouping = "iteration", **options: Any) -> Any:
        """Draw a metric; see :func:`tl_loops.plots.plot_profile`.

        Args:
            metric: Name of a metric; ``None``: the first one.
            by: The grouping of the curves; a feedforward profile is always unrolled.
            **options: Of the plot, such as ``std=True``, ``backend="matplotlib"`` or ``title``.

        Returns:
            A figure of plotly, or of matplotlib.

        Raises:
            ValueError: Unknown metric or grouping.
            ImportError: The plotting library is missing.
        """
        return plot_profile(self, metric, by=by, **options)

    def __repr__(self) -> str:
        p = self.provenance
        shape = f"{self.n_layers} layers" if p.notation is None else p.notation
        names = ", ".join(self.metrics[:5]) + (", ..." if len(self.metrics) > 5 else "")
        part = "" if self.shard is None else f"shard {self.shard.shard}, "
        return f"LoopProfile({p.model} {shape}, {part}{p.n_prompts} prompts, metrics: {names})"

    def _of(self, metric: str) -> Moments:
        if metric not in self.moments:
            hint = did_you_mean(metric, self.metrics, f"it has {', '.join(self.metrics)}")
            raise ValueError(f"this profile has no metric {metric!r}: {hint}")
        return self.moments[metric]

    def _looped(self, what: str) -> LoopLayout:
        if self.layout is None:
            raise ValueError(
                f"{what} needs iterations, but {self.provenance.model} is a feedforward model; use "
                "the unrolled view"
            )
        return self.layout
