"""Steering: directions added to (or taken out of) the stream at chosen iterations."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout
from tl_loops.layout.selection import Selection, distinct_indices, index_along
from tl_loops.loop_hooks import every_iteration, stack_iterations
from tl_loops.metrics.precision import full_precision
from tl_loops.runs.activations import find_activation
from tl_loops.runs.cells import Cell, Edit
from tl_loops.runs.grid import Region, make_grid
from tl_loops.runs.inputs import real_positions
from tl_loops.runs.scoring import Metric, logits_score, start_run
from tl_loops.upstream import Cache, TextOrTokens, left_as_it_was

HookList = list[tuple[str, Callable]]
Direction = Float[Tensor, "*iteration_layer d_model"]


@checked
def steer(
    model: Model,
    direction: Direction,
    activation: str = "resid_post",
    *,
    iterations: Selection | None = None,
    layers: Selection | None = None,
    positions: Selection | None = None,
    scale: float | int = 1.0,
) -> HookList:
    """Hooks that add a direction at chosen iterations, layers and positions.

    Args:
        model: A looped model.
        direction: [d_model], the same everywhere; or loop-specific: [iteration, d_model], one row
            for each chosen iteration; or [iteration, layer, d_model], likewise.
        activation: A stream activation of a core block, or ``"state_in"``, ``"injected"``,
            ``"state_out"``.
        iterations: Where to add it; ``None``: every iteration.
        layers: Layers of the core; ``None``: all. Not for points between iterations.
        positions: Positions, as they are in each forward pass; ``None``: all.
        scale: Multiplies the direction.

    Returns:
        Pairs for ``run_with_hooks`` or ``model.hooks``. They add out of place.

    Raises:
        ValueError: The direction's shape does not fit, or the activation has no stream axis.
        IndexError: An iteration or a layer is out of range.

    Source: 2308.10248 (activation addition), 2312.06681 (contrastive means).
    """
    return [
        (name, partial(_add, scale * vector, positions))
        for name, vector in _placed(model, direction, activation, iterations, layers)
    ]


@checked
def ablate_direction(
    model: Model,
    direction: Direction,
    activation: str = "resid_post",
    *,
    iterations: Selection | None = None,
    layers: Selection | None = None,
    positions: Selection | None = None,
) -> HookList:
    """Hooks that project a direction out: ``x - (x · r) r / |r|²``.

    Args:
        model: As in :func:`steer`.
        direction: As in :func:`steer`; its length does not matter.
        activation: As in :func:`steer`.
        iterations: As in :func:`steer`.
        layers: As in :func:`steer`.
        positions: As in :func:`steer`.

    Returns:
        Pairs for ``run_with_hooks`` or ``model.hooks``.

    Raises:
        ValueError: As :func:`steer`; or a direction of length 0.
        IndexError: As :func:`steer`.

    Source: 2406.11717, equation 4 (directional ablation).
    """
    hooks: HookList = []
    for name, vector in _placed(model, direction, activation, iterations, layers):
        length = torch.linalg.vector_norm(vector.double())
        if length == 0:
            raise ValueError(
                f"the direction for {name} is zero, so there is nothing to project out"
            )
        unit = (vector.double() / length).to(vector.dtype)
        hooks.append((name, partial(_project_out, unit, positions)))
    return hooks


@checked
def difference_directions(
    model: Model,
    positive: Cache,
    negative: Cache,
    activation: str = "resid_post",
    *,
    layer: int | None = None,
    pos: Selection | None = -1,
    normalize: bool = False,
) -> Float[Tensor, "iteration *layer d_model"]:
    """Loop-specific directions: the difference of means of two sets of prompts, at each iteration.

    Args:
        model: A looped model.
        positive: Cache of the prompts that show a property. Padding, by its ``mask``, is left out.
        negative: Cache of those that do not; another batch size is allowed.
        activation: As in :func:`steer`.
        layer: Layer of the core; ``None``: all. Not for points between iterations.
        pos: Which of each prompt's tokens enter the mean, padding not counted; -1: its last;
            ``None``: all.
        normalize: Scale each direction to length 1.

    Returns:
        [iteration, d_model], or [iteration, layer, d_model] without a layer; float32 (float64 for
        float64 caches). The mean over iterations is a direction shared by all of them.

    Raises:
        ValueError: The activation has no stream axis, or a cache does not hold it.
        IndexError: A prompt has no such token.

    Source: 2312.06681, section 3 (difference of means).
    """
    _check_stream(model, activation)
    means = []
    for cache in (positive, negative):
        stacked = stack_iterations(cache, model, activation, layer)
        if not getattr(cache, "has_batch_dim", True):
            stacked = stacked.unsqueeze(-3)
        stacked = stacked.to(torch.float64 if stacked.dtype == torch.float64 else torch.float32)
        batch, n_pos = stacked.shape[-3:-1]
        chosen = real_positions(cache, batch, n_pos, pos).to(stacked.device)
        means.append(stacked[..., chosen, :].mean(-2))
    direction = means[0] - means[1]
    if normalize:
        direction = torch.nn.functional.normalize(direction, dim=-1)
    return direction


@checked
@left_as_it_was
def steering_effect(
    model: Model,
    tokens: TextOrTokens,
    metric: Metric,
    direction: Float[Tensor, "*iteration d_model"],
    activation: str = "resid_post",
    axes: Sequence[str] = ("iteration", "layer"),
    *,
    scales: float | int | Sequence[float | int] = 1.0,
    window: int = 1,
    where: Mapping[str, Selection] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    gradients: bool = False,
    **forward_arguments: Any,
) -> Float[Tensor, "..."]:
    """The effect of a direction at every place of a grid.

    Args:
        model: A looped model.
        tokens: [batch, pos], or text.
        metric: Maps the logits [batch, pos, d_vocab] of one cell to a scalar.
        direction: [d_model], or loop-specific [n_iterations, d_model] (of which a cell uses the
            rows of the iterations that it covers).
        activation: As in :func:`steer`.
        axes: As in :func:`tl_loops.patching.activation_patch`, without heads.
        scales: One factor, or several, which put an axis in front.
        window: As in :func:`tl_loops.patching.activation_patch`.
        where: As in :func:`tl_loops.patching.activation_patch`.
        batch_size: As in :func:`tl_loops.patching.activation_patch`.
        progress: Show a progress bar.
        gradients: As in :func:`tl_loops.patching.activation_patch`.
        **forward_arguments: As in :func:`tl_loops.patching.activation_patch`.

    Returns:
        The metric of each steered run, one axis a name.

    Raises:
        ValueError: As :func:`tl_loops.patching.activation_patch`, or a direction that does not fit.
        IndexError: A value in ``where`` is out of range.
    """
    layout = require_layout(model)
    run = start_run(model, tokens, metric, batch_size, forward_arguments, gradients)
    _check_stream(model, activation)
    grid = make_grid(model, activation, axes, run.n_pos, window, where)
    d_model = model.cfg.d_model
    if tuple(direction.shape) not in ((d_model,), (layout.n_iterations, d_model)):
        raise ValueError(
            f"direction must be [d_model] = ({d_model},) or [n_iterations, d_model] = "
            f"({layout.n_iterations}, {d_model}), got {tuple(direction.shape)}"
        )
    vectors: dict[str, Tensor] = {}
    for name in grid.names:
        kind, number = name.split(".")[:2]
        t = int(number) if kind == "iter" else layout.coordinate(int(number)).iteration
        if direction.ndim == 2 and t is None:
            raise ValueError(
                f"a loop-specific direction has no row for {name}, outside the core: name the axes "
                "'iteration' and 'layer', or give one direction [d_model]"
            )
        vectors[name] = direction if direction.ndim == 1 else direction[t]
    run.execute(grid.names)
    several = not isinstance(scales, (int, float))
    factors = [float(s) for s in scales] if several else [float(scales)]
    cells = [
        _steered(region, vectors, scale, run.n_pos) for scale in factors for region in grid.regions
    ]
    scores = run.score(cells, logits_score(metric), batch_size, progress, "steer")
    return scores.reshape((*([len(factors)] if several else []), *grid.shape))


def _steered(region: Region, vectors: Mapping[str, Tensor], scale: float, n_pos: int) -> Cell:
    edits: list[tuple[str, Edit]] = [
        (name, partial(_add_rows, scale * vectors[name], part, n_pos))
        for name in region.names
        for part in region.pos
    ]
    return Cell(edits, region.first_pos)


def _add_rows(vector: Tensor, part: slice, n_pos: int, rows: Tensor) -> None:
    left_out = n_pos - rows.shape[1]
    first = max(part.start, left_out)
    if first < part.stop:
        rows[:, first - left_out : part.stop - left_out] += vector.to(rows)


def _check_stream(model: Model, activation: str) -> None:
    found = find_activation(model, activation)
    vectors = found.dims == ("batch", "pos", "d_model") and found.rest.startswith("hook_")
    if not vectors or found.place == "run" or found.name == "state_gate":
        raise ValueError(
            f"activation {activation!r} does not live in the residual stream: use resid_pre, "
            "resid_mid, resid_post, attn_out, mlp_out, state_in, injected or state_out"
        )


def _placed(
    model: Model,
    direction: Tensor,
    activation: str,
    iterations: Selection | None,
    layers: Selection | None,
) -> list[tuple[str, Tensor]]:
    """Hook names with the direction that belongs to each."""
    layout = require_layout(model)
    _check_stream(model, activation)
    ts = distinct_indices("iteration", layout.n_iterations, iterations)
    names = every_iteration(model, activation, layers, ts)
    n_layers = len(names) // len(ts)
    shapes = [(), (len(ts),), (len(ts), n_layers)]
    wanted = [(*shape, model.cfg.d_model) for shape in shapes]
    if tuple(direction.shape) not in wanted:
        raise ValueError(
            f"direction must be [d_model], [iteration, d_model] or [iteration, layer, d_model] = "
            f"{', '.join(map(str, wanted))}, got {tuple(direction.shape)}"
        )
    lead = direction.reshape(*direction.shape[:-1], *(1,) * (3 - direction.ndim), -1)
    full = lead if direction.ndim > 1 else direction
    vectors = full.expand(len(ts), n_layers, model.cfg.d_model).reshape(-1, model.cfg.d_model)
    return list(zip(names, vectors, strict=True))


def _add(vector: Tensor, positions: Any, value: Tensor, hook: Any) -> Tensor:
    value = value.clone()
    value[:, index_along("position", value.shape[1], positions)] += vector.to(value)
    return value


@full_precision
def _project_out(unit: Tensor, positions: Any, value: Tensor, hook: Any) -> Tensor:
    unit = unit.to(value)
    value = value.clone()
    at = index_along("position", value.shape[1], positions)
    part = value[:, at]
    value[:, at] = part - (part @ unit)[..., None] * unit
    return value
