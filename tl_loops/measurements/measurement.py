"""One measurement: what it needs of a run, which blocks get a value, which options it takes."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.errors import did_you_mean
from tl_loops.layout.layout import LoopLayout

Activation = Literal["pattern", "resid_post", "state_out", "exit_gate"]
Needs = Literal["value", "previous", "last", "series", "path"]
Place = Literal["blocks", "calls", "last calls", "iterations", "last iteration"]
Bounds = tuple[float, float]


@dataclass(frozen=True)
class Measurement:
    """One entry of the registry.

    A *call* of a core layer is one of its passes: block i at iteration t is call t of its layer.

    Attributes:
        function: Gives ``[batch]`` from what ``needs`` says, and the options by keyword.
        unit: Of the value.
        bounds: Smallest and largest possible value.
        summary: What it says, in one line.
        source: Where it is defined.
        reads: ``"pattern"`` [batch, head, dest, src] and ``"resid_post"`` [batch, pos, d_model] of
            blocks; ``"state_out"`` [batch, pos, d_model] and ``"exit_gate"`` [batch, pos, 1] of
            iterations.
        needs: ``"value"``: the activation. ``"previous"``: also that of the same layer in the
            ``window - 1`` calls before, oldest first. ``"last"``: also that of the layer's last
            call. ``"series"``: what ``per_token`` made of all calls, [iteration, batch, pos].
            ``"path"``: the same, where ``per_token`` is given the first call's activation and those
            of the last ``window`` calls, oldest first (fewer at the beginning), and may give
            several numbers a token, [iteration, batch, pos, number].
        place: Which blocks get a value: all (``"blocks"``); those of the core that have what is
            needed (``"calls"``); the last call of each core layer (``"last calls"``); the last
            layer of each iteration (``"iterations"``) or of the last one (``"last iteration"``). A
            series that is placed at iterations gives [iteration, batch].
        options: Names and defaults of the options.
        window: Calls that ``"previous"`` and ``"path"`` span, this one included.
        least_calls: Iterations (with two stacks, calls of the stack that is read out) without which
            a path has no value.
        per_token: For series: one number per token, [batch, pos], from an activation and (with
            ``against_last``) the activation of the layer's last call. For paths: as said there.
        against_last: Whether a pass before this one must keep what the last calls give.
        causal: Whether it is defined for causal attention only, or the option and its value for
            which that is so.
    """

    function: Callable[..., Float[Tensor, "*iteration batch"]]
    unit: str
    bounds: Bounds
    summary: str
    source: str
    reads: Activation
    needs: Needs
    place: Place
    options: Mapping[str, Any]
    window: int = 1
    least_calls: int = 1
    per_token: Callable[..., Float[Tensor, "batch pos *number"]] | None = None
    against_last: bool = False
    causal: bool | tuple[str, str] = False

    def blocks(self, layout: LoopLayout | None, n_layers: int) -> tuple[int, ...]:
        """The unrolled blocks that get a value; empty where the model cannot give any.

        Args:
            layout: ``None`` for a feedforward model.
            n_layers: Unrolled depth.
        """
        if self.place == "blocks":
            return tuple(range(n_layers))
        if layout is None:
            return ()
        if self.place == "iterations":
            return tuple(layout.index(iteration=t, layer=-1) for t in range(layout.n_iterations))
        if self.place == "last iteration":
            if self.needs == "path" and _last_path(layout) < self.least_calls:
                return ()
            return (layout.index(iteration=-1, layer=-1),)
        calls = core_calls(layout).values()
        if self.place == "last calls":
            return tuple(sorted(blocks[-1] for blocks in calls if len(blocks) > 1))
        if self.needs == "last":  # The distance of the last call to itself says nothing.
            return tuple(sorted(block for blocks in calls for block in blocks[:-1]))
        return tuple(sorted(b for blocks in calls for b in blocks[self.window - 1 :]))


def _last_path(layout: LoopLayout) -> int:
    """Number of states on the path that the last iteration belongs to."""
    paths = [layout.state_path(t) for t in range(layout.n_iterations)]
    return paths.count(paths[-1])


def core_calls(layout: LoopLayout) -> dict[str, list[int]]:
    """For each layer of the core the unrolled blocks that call it, one per iteration, in order.

    Stacks that share their layers stay apart: their states are two. So do the times that an
    iteration runs its layers.
    """
    calls: dict[str, list[int]] = {}
    for block in range(layout.core_start, layout.coda_start):
        stack = layout.coordinate(block).stack if layout.shared_stacks else None
        name = layout.physical_name(block)
        if layout.layer_repeats > 1:
            name += f" ({layout.coordinate(block).layer})"
        calls.setdefault(name if stack is None else f"{name} ({stack})", []).append(block)
    return calls


def why_not(
    measurement: Measurement,
    options: Mapping[str, Any],
    cfg: Any,
    layout: LoopLayout | None,
    n_layers: int,
) -> str | None:
    """Why a model cannot give a measurement, in one clause; ``None`` if it can.

    Args:
        measurement: The registry's entry.
        options: Those that differ from the defaults.
        cfg: The model's config.
        layout: ``None`` for a feedforward model.
        n_layers: Unrolled depth.
    """
    if measurement.place != "blocks" and layout is None:
        return "it is about iterations, but this model has no loop"
    if measurement.reads == "exit_gate" and not cfg.exit_gate:
        return "it reads the halting gate, but this model has none (cfg.exit_gate is False)"
    causal = measurement.causal
    if isinstance(causal, tuple):
        causal = options.get(causal[0]) == causal[1]
    if causal and cfg.attention_dir != "causal":
        return "it counts the keys that a query can see, but this model's attention is not causal"
    if not measurement.blocks(layout, n_layers):
        assert layout is not None
        if measurement.needs == "path":
            least, n = measurement.least_calls, _last_path(layout)
            what = "iterations" if layout.stacks is None else "states of one stack"
            return f"it needs {least} {what} or more, but there are {n}"
        at_least = max(2, measurement.window)
        return f"it needs {at_least} iterations or more, but n_iterations is {layout.n_iterations}"
    return None


def resolve_options(
    name: str, measurement: Measurement, given: Mapping[str, Any], n_tokens: int, d_model: int
) -> dict[str, Any]:
    """All options of a measurement, defaults included; those given are tried on an example.

    Args:
        name: Of the measurement, for messages.
        measurement: The registry's entry.
        given: Options that differ from the defaults.
        n_tokens: Length of the shortest prompt, which must be able to bear the options.
        d_model: Width of the model.

    Raises:
        ValueError: An option is unknown (near matches are suggested), or its value is wrong, or
            what it gives is not one number per prompt.
    """
    for option in given:
        if option not in measurement.options:
            known = f"its options: {', '.join(measurement.options) or 'none'}"
            hint = did_you_mean(option, measurement.options, known)
            raise ValueError(f"metric {name!r} has no option {option!r}: {hint}")
    options = {**measurement.options, **given}
    if not given:
        return options
    try:
        result = measurement.function(*_example(measurement, n_tokens, d_model), **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"options of metric {name!r}: {error}") from error
    if list(result.shape) != [1]:
        raise ValueError(
            f"options of metric {name!r}: {dict(given)} give {list(result.shape)[1:]} numbers a "
            "prompt, a profile needs one"
        )
    return options


def _example(measurement: Measurement, n_tokens: int, d_model: int) -> list[Tensor]:
    """Arguments for one prompt: uniform attention, or states that turn."""
    if measurement.needs == "series":
        return [torch.tensor([0.5, 1.0]).reshape(2, 1, 1).expand(2, 1, n_tokens)]
    sizes = {"previous": measurement.window, "path": measurement.window, "last": 2}
    n_tensors = sizes.get(measurement.needs, 1)
    if measurement.reads == "pattern":
        visible = torch.ones(1, 1, n_tokens, n_tokens).tril()
        return [visible / visible.sum(-1, keepdim=True)] * n_tensors
    phase = torch.arange(n_tokens).unsqueeze(-1) + torch.arange(d_model)
    states = [(phase + shift).sin().unsqueeze(0) for shift in range(n_tensors)]
    if measurement.needs != "path":
        return states
    assert measurement.per_token is not None
    calls = range(1, n_tensors + 1)
    return [torch.stack([measurement.per_token(states[0], *states[:n]) for n in calls])]


def own_options(function: Callable, fixed: Iterable[str] = ()) -> dict[str, Any]:
    """Names and defaults of a metric's parameters that are a user's to choose.

    Args:
        function: A metric.
        fixed: Names of parameters that the measurement sets itself.
    """
    # A prompt has no padding; patterns are checked once for all metrics; the reference is the last
    # iteration.
    not_ours = {"mask", "validate", "reference", *fixed}
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty and name not in not_ours
    }
