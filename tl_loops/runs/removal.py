"""What stands in the place of an activation that is removed: zeros, means, other prompts' own."""

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tl_loops.layout.model import Model
from tl_loops.layout.names import spec_of
from tl_loops.runs.activations import Activation, check_cache, take
from tl_loops.runs.inputs import real_positions

Removal = Literal["zero", "mean", "resample", "paired"]
"""``"zero"``. ``"mean"``: over the reference prompts. ``"resample"``: what a reference prompt has
that is drawn at random for each prompt, the same one everywhere. ``"paired"``: what the reference
prompt with the prompt's own number has."""

MeanOver = Literal["batch", "batch_pos"]
"""Whether a mean is over prompts, or over prompts and positions."""


def check_removal(what: str, method: str, reference: Any) -> None:
    """Check the name of a method, and that it has the reference that it needs.

    Args:
        what: What the argument is called, for the message.
        method: One of :data:`Removal`.
        reference: A cache, or ``None``.

    Raises:
        ValueError: The method is unknown, or the reference is missing or needless.
    """
    known = get_args(Removal)
    if method not in known:
        names = ", ".join(map(repr, known[:-1]))
        raise ValueError(f"{what} must be {names} or {known[-1]!r}, got {method!r}")
    if (reference is None) != (method == "zero"):
        need = "needs none" if method == "zero" else "needs reference=, a cache of other prompts"
        raise ValueError(f"{what}={method!r} {need}")


def removal_values(
    model: Model,
    activation: Activation,
    names: Iterable[str],
    method: str,
    reference: Any,
    shape: tuple[int, int],
    mean_over: MeanOver = "batch",
    seed: int = 0,
) -> dict[str, Tensor]:
    """What stands in the place of an activation at some hook points.

    Args:
        model: A looped model or a plain HookedTransformer.
        activation: What it is.
        names: Canonical hook names of it.
        method: One of :data:`Removal`, checked by :func:`check_removal`.
        reference: Cache of the reference prompts, where the method needs one.
        shape: Batch and number of positions of the run that it goes into.
        mean_over: ``"batch"`` or ``"batch_pos"``, of ``"mean"``.
        seed: Of the draw of ``"resample"``; activations with one seed share the draw.

    Returns:
        By hook name; batch axis 1 or that of the run.

    Raises:
        ValueError: The reference lacks an activation or does not fit.
    """
    names = list(names)
    heads = activation.n_heads(model.cfg)
    if method == "zero":
        return _zeros(model, activation, names, heads, shape[1])
    check_cache(reference, model, names)
    if method == "mean":
        return _means(activation, names, heads, reference, shape[1], mean_over)
    if method == "paired":
        return {name: take(reference, activation, name, shape, heads) for name in names}
    return _resampled(activation, names, heads, reference, shape, seed)


def _zeros(
    model: Model, activation: Activation, names: list[str], heads: int | None, n_pos: int
) -> dict[str, Tensor]:
    zero = torch.zeros((), device=next(model.parameters()).device)
    spec = spec_of(names[0]) if names else None
    # Of hook points that are not in the table the last axis broadcasts.
    width = 1 if spec is None else getattr(model.cfg, spec.axes_on(model.cfg)[-1], None) or 1
    size: tuple[int, ...] = (1, n_pos, width)
    if activation.kind == "heads":
        size = (1, n_pos, heads or 1, width)
    elif activation.kind == "pattern":
        size = (1, heads or 1, n_pos, n_pos)
    return dict.fromkeys(names, zero.expand(size))


def _means(
    activation: Activation,
    names: list[str],
    heads: int | None,
    reference: Any,
    n_pos: int,
    mean_over: MeanOver,
) -> dict[str, Tensor]:
    if mean_over == "batch_pos" and activation.kind == "pattern":
        raise ValueError("a mean over positions has no meaning for patterns: use mean_over='batch'")
    values = {}
    for name in names:
        value = reference[name]
        length = n_pos if mean_over == "batch" else value.shape[activation.pos_dim]
        value = take(reference, activation, name, (value.shape[0], length), heads)
        real = real_positions(reference, value.shape[0], length).to(value.device)
        if mean_over == "batch":
            # Where no prompt has a token all rows are padding: their mean.
            weights = torch.where(real.any(0), real, True)
            shape = [1] * value.ndim
            shape[0], shape[activation.pos_dim] = weights.shape
            weights = weights.reshape(shape)
            total = torch.where(weights, value.float(), 0.0).sum(0, keepdim=True)
            values[name] = total / weights.sum(0, keepdim=True)
        else:
            mean = value.float()[real].mean(0)[None, None]
            values[name] = mean.expand(1, n_pos, *mean.shape[2:])
    return values


def _resampled(
    activation: Activation,
    names: list[str],
    heads: int | None,
    reference: Any,
    shape: tuple[int, int],
    seed: int,
) -> dict[str, Tensor]:
    batch, n_pos = shape
    n_reference = reference[names[0]].shape[0]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_reference, (batch,), generator=generator)
    values = {}
    for name in names:
        value = take(reference, activation, name, (n_reference, n_pos), heads)
        values[name] = value[drawn.to(value.device)]
    return values
