"""Run a lens: one pass of the model, readouts reduced one point at a time."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout, with_iterations
from tl_loops.lens.decode import CodaLens, ExitLens, Lens, LogitLens
from tl_loops.lens.points import LensPoint, PointSet, select_points
from tl_loops.lens.result import LensResult, TokenTrajectory, point_series
from tl_loops.lens.tracked_tokens import TrackedTokens, tracked_ids
from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.readout import (
    kl_divergence,
    output_entropy,
    predicted_tokens,
    token_probability,
    token_rank,
)
from tl_loops.runs.cells import named_hooks
from tl_loops.runs.identity import identity_of, tensors_fingerprint
from tl_loops.runs.in_batches import Batch, Run, Split, run_in_batches
from tl_loops.runs.inputs import LensInputs, Positions, lens_inputs
from tl_loops.runs.read_positions import logits_only_at
from tl_loops.runs.shards import Shards
from tl_loops.upstream import TextOrTokens, left_as_it_was

_POINTWISE = ("predictions", "top_tokens", "top_probabilities", "entropy")


@checked
@left_as_it_was
def read_lens(
    model: Model,
    input: TextOrTokens,
    lens: Lens,
    *,
    points: PointSet | str | Sequence[str] | None = None,
    positions: Positions = "all",
    track: Mapping[str, TrackedTokens] | None = None,
    top_k: int = 5,
    keep_logits: bool = False,
    attention_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    n_iterations: int | None = None,
    batch_size: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
) -> LensResult:
    """Read the residual stream of one run through a lens.

    Readouts are made and reduced one point at a time, so that memory does not grow with points
    times vocabulary. Hooks that are on the model act on the run and on the readouts. Padding of
    the vocabulary (``cfg.padded_vocab``) is neither ranked nor given probability.

    Args:
        model: A looped model.
        input: Text, or tokens [batch, pos] or [pos].
        lens: :class:`LogitLens`, :class:`CodaLens`, :class:`ExitLens`, a :class:`TunedLens` or a
            :class:`JacobianLens`.
        points: ``"blocks"`` (after every unrolled block), ``"core"`` (after every core block),
            ``"states"`` (what leaves each iteration), or hook names of the residual stream;
            ``None``: what the lens reads by itself.
        positions: ``"all"``; ``"last"``: the last real token of each prompt; indices; or
            [batch, read], for each prompt its own.
        track: Tokens to follow, by name. A value is an id or a single token's text for all
            prompts; a list with one entry per prompt, each an id, a text, or a list of spellings;
            or ids [batch] or [batch, spelling], -1 where there is none.
        top_k: Number of top tokens to keep.
        keep_logits: Keep all logits, [point, batch, read, d_vocab]. Only then do gradients flow
            into the result.
        attention_mask: [batch, pos], 1 at tokens, 0 at padding.
        initial_state: [batch, pos, d_model], the state before iteration 0.
        n_iterations: Number of iterations for this run.
        batch_size: Prompts in one pass; ``None``: all.
        checkpoint: A file to which every batch is added once it is done. The same call goes on from
            it, to the same bits. Not with ``keep_logits``.
        shard: ``(k, n)``, ``"auto"`` or ``"distributed"``: which batches are read here, as for
            :func:`tl_loops.measure`. With ``(k, n)`` the result is about the prompts of that shard;
            :func:`tl_loops.merge_shards` puts the checkpoints of all shards together, from which
            the same call without ``shard`` gives the result for all prompts.

    Returns:
        The readouts in the order of the points.

    Raises:
        ValueError: A point, a position, a token or a shape that does not fit.
        HookNameError: A point that the model does not have.
        LoopedSemanticsError: This lens has no meaning on this model.
        CheckpointError: The checkpoint is damaged or of another run, or the run can be neither
            resumed nor cut into shards.
    """
    require_layout(model)
    split = Split(shard, checkpoint)
    split.check(model, gradients=keep_logits)
    with with_iterations(model, n_iterations):
        chosen = select_points(model, lens.points if points is None else points)
        lens.check(model, chosen)
        inputs = lens_inputs(model, input, positions, attention_mask, initial_state)
        batch = inputs.tokens.shape[0]
        tracked = {
            name: tracked_ids(model, name, value, batch) for name, value in (track or {}).items()
        }
        top_k = _checked_top_k(model, top_k)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        size = batch if batch_size is None else batch_size
        batches = [slice(start, min(start + size, batch)) for start in range(0, batch, size)]
        parts: dict[int, Batch] = {}

        def compute(number: int) -> Batch:
            rows = batches[number]
            ids = {name: value[rows] for name, value in tracked.items()}
            return _read(model, inputs.rows(rows), lens, chosen, ids, top_k, keep_logits)

        def identify() -> dict[str, Any]:
            given = (inputs.tokens, inputs.attention_mask, inputs.positions, inputs.initial_state)
            tensors = {n: t for n, t in vars(lens).items() if isinstance(t, Tensor)}
            return identity_of(
                model,
                prompts=tensors_fingerprint(given),
                lens=[lens.name, tensors_fingerprint(tensors)],
                points=[point.alias for point in chosen],
                track=tensors_fingerprint(tracked),
                top_k=top_k,
                batch_size=size,
            )

        run = Run(f"{lens.name} lens", [rows.stop - rows.start for rows in batches], identify)
        with nullcontext() if keep_logits else torch.no_grad():
            run_in_batches(run, compute, parts.__setitem__, split)
        if len(parts) < len(batches):
            mine = [row for k in parts for row in range(batch)[batches[k]]]
            rows = torch.tensor(mine, dtype=torch.long, device=inputs.tokens.device)
            if not mine:
                raise ValueError(
                    f"shard {split.shard} has no prompt: there are {len(batches)} batch(es) of "
                    f"{size}; give a smaller batch_size"
                )
            inputs = inputs.rows(rows)
            tracked = {name: value[rows] for name, value in tracked.items()}
    tokenizer = getattr(model, "tokenizer", None)
    return _result(lens, chosen, inputs, tracked, list(parts.values()), tokenizer)


@checked
@left_as_it_was
def logit_lens(model: Model, input: TextOrTokens, **options: Any) -> LensResult:
    """Final norm and unembedding applied to the residual after each block.

    What lies between the point and the final norm is skipped: the rest of the loop, the norm
    before the coda, the coda. Without a coda, a state after the norm between iterations is normed
    already and is unembedded as it is. After the last block the result is the model's logits
    (unless a model without coda has a norm in its place).

    Args:
        model: A looped model.
        input: Text or tokens.
        **options: As :func:`read_lens`; ``points`` defaults to ``"blocks"``.

    Returns:
        As :func:`read_lens`.

    Raises:
        ValueError: As :func:`read_lens`.

    Source: nostalgebraist 2020; for loops 2507.02199, section 3.
    """
    return read_lens(model, input, LogitLens(), **options)


@checked
@left_as_it_was
def coda_lens(model: Model, input: TextOrTokens, **options: Any) -> LensResult:
    """The state of each iteration through all that the model does after the loop.

    That is the norm before the coda, the coda's blocks on the whole sequence, the final norm and
    the unembedding; without a coda the final norm and the unembedding. At the state of iteration t
    the result is what ``model(tokens, n_iterations=t + 1)`` gives, at the last state the model's
    logits. Any other residual is read as if the loop ended there.

    Args:
        model: A looped model.
        input: Text or tokens.
        **options: As :func:`read_lens`; ``points`` defaults to ``"states"``.

    Returns:
        As :func:`read_lens`.

    Raises:
        ValueError: As :func:`read_lens`; a point inside of a coda block.

    Source: 2507.02199, section 3.
    """
    return read_lens(model, input, CodaLens(), **options)


@checked
@left_as_it_was
def exit_lens(model: Model, input: TextOrTokens, **options: Any) -> LensResult:
    """The exit of every iteration: ``model(tokens, exit_at=t)`` for all t, in one pass.

    Args:
        model: A looped model without a coda.
        input: Text or tokens.
        **options: As :func:`read_lens`; ``points`` defaults to ``"states"``.

    Returns:
        As :func:`read_lens`.

    Raises:
        LoopedSemanticsError: The model has a coda; use :func:`coda_lens`.
        ValueError: As :func:`read_lens`; a point that is no exit.

    Source: Ouro, 2510.25741.
    """
    return read_lens(model, input, ExitLens(), **options)


def capture(
    model: Model,
    inputs: LensInputs,
    points: Sequence[LensPoint],
    whole: Callable[[LensPoint], bool],
) -> tuple[dict[str, Tensor], Float[Tensor, "batch read d_vocab"]]:
    """Run the model once; what passes the points, and its logits at the positions that are read.

    Args:
        model: A looped model.
        inputs: The prompts.
        points: What to keep.
        whole: Whether a point is kept at all positions rather than at those that are read.

    Returns:
        Residuals by hook name, [batch, pos or read, d_model], and logits [batch, read, d_vocab].
    """
    residuals: dict[str, Tensor] = {}

    entire = {point.name for point in points if whole(point)}

    def keep(name: str, x: Tensor) -> None:
        residuals[name] = x if name in entire else inputs.select(x)

    hooks = named_hooks((point.name for point in points), keep)
    with logits_only_at(model, inputs.positions):
        logits = model.run_with_hooks(inputs.tokens, fwd_hooks=hooks, **inputs.forward_arguments)
    return residuals, logits


def _checked_top_k(model: Model, top_k: int) -> int:
    vocabulary = vocabulary_size(model)
    if not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k={top_k}, expected 1 to the vocabulary of {vocabulary}")
    return top_k


def vocabulary_size(model: Model) -> int:
    """Number of ids that are tokens: the output vocabulary without its padding."""
    padded = model.cfg.padded_vocab
    return model.cfg.d_vocab_out if padded is None else padded


def _read(
    model: Model,
    inputs: LensInputs,
    lens: Lens,
    points: tuple[LensPoint, ...],
    tracked: dict[str, Tensor],
    top_k: int,
    keep_logits: bool,
) -> dict[str, Tensor]:
    """Statistics of one part of the batch, each [point, batch, read, ...]."""
    size = vocabulary_size(model)
    residuals, final = capture(model, inputs, points, lens.reads_sequence)
    rows: list[dict[str, Tensor]] = [{} for _ in points]
    for members in point_series(points).values():
        previous: tuple[int, Tensor] | None = None
        for index, point in members:
            resid = residuals.pop(point.name)
            logits = lens.logits(model, resid, point, inputs)
            row = rows[index]
            with torch.no_grad():
                row.update(_statistics(logits, size, top_k))
                row["kl_to_final"] = kl_divergence(final, logits, size)
                if previous is not None and previous[0] + 1 == point.iteration:
                    row["kl_from_previous"] = kl_divergence(previous[1], logits, size)
                else:
                    row["kl_from_previous"] = torch.full_like(row["entropy"], torch.nan)
                for name, ids in tracked.items():
                    row[f"rank {name}"], row[f"probability {name}"] = _track(logits, ids, size)
            if keep_logits:
                row["logits"] = logits
            if point.iteration is not None:
                previous = (point.iteration, logits.detach())
    out = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    out["final_predictions"] = predicted_tokens(final, size)[None]
    if keep_logits:
        out["final_logits"] = final[None]
    return out


def _statistics(logits: Tensor, size: int, top_k: int) -> dict[str, Tensor]:
    real = logits[..., :size].to(statistic_dtype(logits))
    top = real.topk(top_k, -1)
    return {
        "predictions": predicted_tokens(logits, size),
        "top_tokens": top.indices,
        "top_probabilities": (top.values - real.logsumexp(-1, keepdim=True)).exp(),
        "entropy": output_entropy(logits, size),
    }


def _track(logits: Tensor, ids: Int[Tensor, "batch spelling"], size: int) -> tuple[Tensor, Tensor]:
    """Best rank and total probability of the spellings, each [batch, read]."""
    rank = torch.full(logits.shape[:2], size + 1, device=logits.device)
    probability = torch.zeros(logits.shape[:2], dtype=statistic_dtype(logits), device=logits.device)
    for spelling in ids.to(logits.device).unbind(-1):
        there = (spelling >= 0).unsqueeze(-1)
        token = spelling.clamp(min=0).unsqueeze(-1)
        rank = torch.where(there, torch.minimum(rank, token_rank(logits, token, size)), rank)
        probability += torch.where(there, token_probability(logits, token, size), 0.0)
    return rank, probability


def _result(
    lens: Lens,
    points: tuple[LensPoint, ...],
    inputs: LensInputs,
    tracked: dict[str, Tensor],
    parts: Sequence[Batch],
    tokenizer: Any,
) -> LensResult:
    device = inputs.tokens.device
    joined = {key: torch.cat([p[key].to(device) for p in parts], dim=1) for key in parts[0]}
    mask, positions = inputs.attention_mask, inputs.positions
    real = torch.ones_like(positions, dtype=torch.bool)
    if mask is not None:
        real = mask.gather(1, positions)
    return LensResult(
        lens=lens.name,
        points=points,
        tokens=inputs.tokens,
        positions=positions,
        real=real,
        **{key: joined[key] for key in (*_POINTWISE, "kl_to_final", "kl_from_previous")},
        final_predictions=joined["final_predictions"][0],
        tracked={
            name: TokenTrajectory(ids, joined[f"rank {name}"], joined[f"probability {name}"])
            for name, ids in tracked.items()
        },
        logits=joined.get("logits"),
        final_logits=joined["final_logits"][0] if "final_logits" in joined else None,
        tokenizer=tokenizer,
    )
