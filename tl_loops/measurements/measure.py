"""Measure a model on prompts: every metric at every unrolled block, streamed."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tl_loops.arguments import checked
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import layout_of, with_iterations
from tl_loops.measurements import (
    DEFAULT_METRICS,
    MEASUREMENTS,
    find_measurement,
    resolve_options,
    why_not,
)
from tl_loops.measurements.from_run import KIND, about_run, empty_sums, scattered
from tl_loops.measurements.profile import LoopProfile, Provenance
from tl_loops.measurements.streaming import PlannedMetric, StreamPlan, reduce_batch
from tl_loops.runs.batches import (
    bos_rule,
    check_batch_size,
    equal_batches,
    token_prompts,
)
from tl_loops.runs.fingerprint import PendingFingerprint
from tl_loops.runs.identity import identity_of, prompts_fingerprint
from tl_loops.runs.in_batches import Batch, Run, Split, run_in_batches
from tl_loops.runs.running_moments import batch_moments
from tl_loops.runs.shards import Shards
from tl_loops.upstream import Prompts, left_as_it_was
from tl_loops.version import __version__

Metrics = str | Sequence[str] | Mapping[str, Mapping[str, Any]]


@checked
@left_as_it_was
def measure(
    model: Model,
    prompts: Prompts,
    metrics: Metrics = DEFAULT_METRICS,
    n_iterations: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
) -> LoopProfile:
    """Mean, deviation and count over prompts of each metric at each unrolled block.

    Every activation is reduced in its hook and let go: memory grows neither with the number of
    prompts nor (but for hook points and a few numbers per block and token) with the iterations; the
    path of the states (``late_drift``, ``recurrence_lag``, ...) takes its first and last 16 states.
    Each prompt is measured at its own length, without padding; heads or tokens are averaged within
    a prompt, and prompts weigh the same (arXiv 2604.11791, section 4.1). Statistics are float32 or
    better, also of a bfloat16 model. Hooks that are on the model act, so that ablated models can be
    measured.

    Metrics that compare with the last iteration (``fixed_point_*``, ``attention_fixed_point_*``,
    ``trajectory_*``) take a second pass over each batch.

    Args:
        model: A looped model or, for the feedforward baseline, a plain HookedTransformer.
        prompts: Strings, or lists or 1-D tensors of token ids, which get no BOS.
        metrics: Names of :data:`tl_loops.measurements.MEASUREMENTS`, or a mapping of names to
            options of the pure function behind each (``{"sink_rate": {"threshold": 0.5}}``), or
            ``"all"`` that the model can give.
        n_iterations: Number of iterations; ``None``: the model's.
        batch_size: Prompts of equal length in one pass at most. Results do not depend on it but for
            rounding.
        progress: Whether to show a progress bar.
        checkpoint: A file to which every batch is added once it is done. The same call goes on from
            it, to the same bits; once the run is complete it answers at once. Not for a model with
            hooks, nor one whose initial states are drawn afresh at each call.
        shard: ``(k, n)`` or ``"k/n"``: measure every n-th batch of the whole list, from batch k on;
            the n profiles merge (:meth:`LoopProfile.merge`) to the bits of one process on the same
            device. ``"auto"``: k and n by ``RANK`` and ``WORLD_SIZE``, or
            ``SLURM_ARRAY_TASK_ID`` and ``SLURM_ARRAY_TASK_COUNT``. ``"distributed"``: the ranks of
            torch.distributed share the prompts, and each returns the whole profile. Each shard has
            a checkpoint of its own, ``run.1of4.ckpt`` for ``run.ckpt``. Not for a model with hooks.

    Returns:
        The profile.

    Raises:
        ValueError: An unknown metric or option (near matches are suggested), a metric that the
            model cannot give, a bad prompt, or ``n_iterations`` for a feedforward model; all of
            these before the model runs. Also an attention pattern whose rows do not sum to 1.
        TypeError: Prompts are neither text nor tensors, or both.
        CheckpointError: The checkpoint is damaged or of another run, or the run can be neither
            resumed nor cut into shards.
        FileInUseError: Another process or thread measures with the same checkpoint.
    """
    check_batch_size(batch_size)
    split = Split(shard, checkpoint)
    split.check(model, merges=True)
    listed = list(prompts) if not isinstance(prompts, (str, torch.Tensor)) else prompts
    tokens = token_prompts(model, listed)
    lengths = [prompt.shape[0] for prompt in tokens]
    with with_iterations(model, n_iterations):
        layout, cfg = layout_of(model), model.cfg
        chosen = _plan(model, metrics, min(lengths))
        plan = StreamPlan.make(chosen, layout, cfg.n_layers, cfg.attention_dir == "causal")
        members = equal_batches(lengths, lengths, batch_size)
        weights = PendingFingerprint(model)
        device = next(model.parameters()).device
        blocks = {metric.name: metric.blocks for metric in chosen}
        options = {metric.name: metric.options for metric in chosen}
        fixed: dict[str, Any] = {
            "model": cfg.model_name,
            "notation": None if layout is None else cfg.notation,
            "n_iterations": None if layout is None else layout.n_iterations,
            "tl_loops": __version__,
            "bos": bos_rule(model, listed),
            "options": options,
        }

        def compute(number: int) -> Batch:
            batch = torch.stack([tokens[i] for i in members[number]]).to(device)
            values = reduce_batch(model, batch, plan)
            return batch_moments(values, (batch.shape[0], batch.numel()))

        def identify() -> dict[str, Any]:
            prompts = prompts_fingerprint(tokens)
            return identity_of(model, prompts=prompts, metrics=options, batch_size=batch_size)

        about = {}
        if not split.is_plain:
            about = about_run(layout, cfg.n_layers, blocks, {**fixed, "weights": weights()})
        added = empty_sums(blocks)
        run = Run(KIND, [len(batch) for batch in members], identify, about)
        part = run_in_batches(run, compute, added.add, split, progress)
        n_prompts, n_tokens = added.counts
        what = Provenance.pending(weights, **fixed, n_prompts=n_prompts, n_tokens=n_tokens)
        return LoopProfile(scattered(added, blocks, cfg.n_layers), layout, what, part)


@checked
def available_metrics(model: Model, n_iterations: int | None = None) -> tuple[str, ...]:
    """Names of the metrics that a model can give.

    Args:
        model: A looped model or a plain HookedTransformer.
        n_iterations: Number of iterations; ``None``: the model's.

    Raises:
        ValueError: ``n_iterations`` for a feedforward model.
    """
    with with_iterations(model, n_iterations):
        cfg, layout = model.cfg, layout_of(model)
        return tuple(
            name
            for name, measurement in MEASUREMENTS.items()
            if why_not(measurement, {}, cfg, layout, cfg.n_layers) is None
        )


def _plan(model: Model, metrics: Metrics, shortest: int) -> list[PlannedMetric]:
    """Resolve names and options, and raise for what the model cannot give."""
    metrics = (metrics,) if isinstance(metrics, str) else metrics
    if tuple(metrics) == ("all",):
        metrics = available_metrics(model)
    given = metrics if isinstance(metrics, Mapping) else {name: {} for name in metrics}
    if not given:
        raise ValueError("metrics is empty: give names, or 'all'")
    cfg, layout = model.cfg, layout_of(model)
    chosen = []
    for name, options in given.items():
        measurement = find_measurement(name)
        options = resolve_options(name, measurement, options, shortest, cfg.d_model)
        reason = why_not(measurement, options, cfg, layout, cfg.n_layers)
        if reason is not None:
            raise ValueError(f"{cfg.model_name} cannot give metric {name!r}: {reason}")
        blocks = measurement.blocks(layout, cfg.n_layers)
        chosen.append(PlannedMetric(name, measurement, options, blocks))
    return chosen
