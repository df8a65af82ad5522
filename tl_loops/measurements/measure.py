"""Measure a model on prompts: every metric at every unrolled block, streamed."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from tqdm.auto import tqdm

from tl_loops.layout.model import Model
from tl_loops.layout.of_model import layout_of, with_iterations
from tl_loops.measurements import (
    DEFAULT_METRICS,
    MEASUREMENTS,
    find_measurement,
    resolve_options,
    why_not,
)
from tl_loops.measurements.profile import LoopProfile, Provenance
from tl_loops.measurements.resume import (
    RunIdentity,
    check_can_resume,
    load_progress,
    model_fingerprint,
    prompts_fingerprint,
    run_settings,
    save_progress,
)
from tl_loops.measurements.streaming import PlannedMetric, StreamPlan, reduce_batch
from tl_loops.runs.batches import batches, check_batch_size, longest_first, token_prompts
from tl_loops.runs.moments import Moments
from tl_loops.version import __version__
from tl_loops.writing import in_use

Metrics = str | Sequence[str] | Mapping[str, Mapping[str, Any]]


def measure(
    model: Model,
    prompts: Iterable[Any],
    metrics: Metrics = DEFAULT_METRICS,
    n_iterations: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
) -> LoopProfile:
    """Mean, deviation and count over prompts of each metric at each unrolled block.

    Every activation is reduced in its hook and let go: memory grows neither with the number of
    prompts nor (but for hook points and a few numbers a block and token) with the iterations; the
    path of the states (``late_drift``, ``recurrence_lag``, ...) takes its first and last 16 states.
    Each prompt is measured at its own length, without padding; heads or tokens are averaged within
    a prompt, and prompts weigh the same (arXiv 2604.11791, section 4.1). Statistics are float32 or
    better, also of a bfloat16 model. Hooks that are on the model act, so that ablated models can be
    measured.

    Metrics that compare with the last iteration (``fixed_point_*``, ``attention_fixed_point_*``,
    ``trajectory_*``) take a second pass over each batch.

    Args:
        model: A looped model or, for the feedforward baseline, a plain HookedTransformer.
        prompts: Strings, or 1-D tensors of tokens, which get no BOS.
        metrics: Names of :data:`tl_loops.measurements.MEASUREMENTS`, or a mapping of names to
            options of the pure function behind each (``{"sink_rate": {"threshold": 0.5}}``), or
            ``"all"`` that the model can give.
        n_iterations: Number of iterations; ``None``: the model's.
        batch_size: Prompts of equal length in one pass at most. Results do not depend on it but for
            rounding.
        progress: Whether to show a progress bar.
        checkpoint: A file that is brought up to date after every batch. A call with the same model,
            prompts, metrics, options and iterations goes on from it, to the same bits where
            ``batch_size`` is the same; once the run is complete it answers at once. Not for a model
            with hooks, nor one whose initial states are drawn afresh at each call.

    Returns:
        The profile.

    Raises:
        ValueError: An unknown metric or option (near matches are suggested), a metric that the
            model cannot give, a bad prompt, or ``n_iterations`` for a feedforward model; all of
            these before the model runs. Also an attention pattern whose rows do not sum to 1.
        TypeError: Prompts are neither text nor tensors, or both.
        CheckpointError: The checkpoint is damaged or of another run, or the run cannot be resumed.
        FileInUseError: Another process or thread measures with the same checkpoint.
    """
    check_batch_size(batch_size)
    if checkpoint is not None:
        check_can_resume(model)
    tokens = token_prompts(model, prompts)
    lengths = [prompt.shape[0] for prompt in tokens]
    held = nullcontext() if checkpoint is None else in_use(checkpoint)
    with held, with_iterations(model, n_iterations):
        layout, cfg = layout_of(model), model.cfg
        chosen = _plan(model, metrics, min(lengths))
        plan = StreamPlan.make(chosen, layout, cfg.n_layers, cfg.attention_dir == "causal")
        identity = RunIdentity(
            weights=model_fingerprint(model),
            prompts=prompts_fingerprint(tokens),
            n_iterations=None if layout is None else layout.n_iterations,
            metrics={metric.name: metric.options for metric in chosen},
            tl_loops=__version__,
            settings=run_settings(model),
        )
        n_blocks = {metric.name: len(metric.blocks) for metric in chosen}
        moments = {name: Moments.empty(n) for name, n in n_blocks.items()}
        done = 0
        if checkpoint is not None:
            found = load_progress(checkpoint, identity, len(tokens), n_blocks)
            moments, done = found or (moments, 0)
            save_progress(checkpoint, identity, moments, done)  # a path that fails, fails now

        order = longest_first(lengths, lengths)[done:]
        device = next(model.parameters()).device
        with tqdm(
            total=len(tokens), initial=done, desc="measure", unit="prompt", disable=not progress
        ) as bar:
            for members in batches(order, lengths.__getitem__, batch_size):
                batch = torch.stack([tokens[i] for i in members]).to(device)
                for name, values in reduce_batch(model, batch, plan).items():
                    moments[name] = moments[name].merge(Moments.of(values))
                done += len(members)
                if checkpoint is not None:
                    save_progress(checkpoint, identity, moments, done)
                bar.update(len(members))

        return LoopProfile(
            {m.name: moments[m.name].scattered(m.blocks, cfg.n_layers) for m in chosen},
            layout,
            Provenance(
                model=cfg.model_name,
                weights=identity.weights,
                notation=None if layout is None else cfg.notation,
                n_iterations=identity.n_iterations,
                n_prompts=len(tokens),
                n_tokens=sum(lengths),
                tl_loops=__version__,
                options=identity.metrics,
            ),
        )


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
    """Resolve names and options, and refuse what the model cannot give."""
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
