"""Each iteration's use of the shared weights as a variable of its own, over the same memory.

While :func:`split_weights` is on, a module finds in place of a weight an alias of it: another
tensor over the same storage, one for each iteration. The unrolled blocks are modules of their own,
so each holds the alias of its iteration; a module that all iterations call (an injection, a gate)
is handed over from one to the next as the run comes by. Gradients with respect to the aliases are
then the plain gradient, split by iteration, from one backward pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_loops.attribution.gradients import differentiating
from tl_loops.attribution.split_gradients import IterationGradients
from tl_loops.errors import LoopedSemanticsError, did_you_mean
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.layout.names import spec_of
from tl_loops.layout.of_model import require_layout
from tl_loops.upstream import can_restart

OUTSIDE = None
"""The place of a use that belongs to no iteration: prelude, coda, readout, what is made once."""

Place = int | None
Slot = tuple[nn.Module, str]


class WeightUses:
    """The uses of a model's weights while they are split; made by :func:`split_weights`.

    Attributes:
        n_iterations: Of the model.
    """

    def __init__(self, model: Model, weights: str | Sequence[str]):
        self._model, self._layout = model, require_layout(model)
        self.n_iterations = self._layout.n_iterations
        by_name = _slots(model, self._layout)
        chosen = _chosen(by_name, weights, self._layout)
        self._aliases: dict[tuple[str, Place], Tensor] = {}
        self._fixed: list[tuple[Slot, str, Place]] = []
        self._shared: list[tuple[Slot, str]] = []
        self._originals: dict[str, Tensor] = {}
        for name in chosen:
            for slot, place, fixed in by_name[name]:
                module, attribute = slot
                parameter = module._parameters[attribute]
                assert parameter is not None
                self._originals[name] = parameter
                if fixed:
                    self._fixed.append((slot, name, place))
                else:
                    self._shared.append((slot, name))
        # Until all of these have fired, a run has not left its last iteration.
        self._after = _ends(model, self.n_iterations)
        self._waiting: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """Physical names of the weights that are split."""
        return tuple(self._originals)

    def gradients(
        self, value: Float[Tensor, "..."], keep_graph: bool = False
    ) -> IterationGradients:
        """Gradients of a scalar that was computed inside the block, by one backward pass.

        Args:
            value: The scalar.
            keep_graph: Whether its graph stays, for another backward pass.

        Returns:
            The gradients of every weight, split by iteration.

        Raises:
            ValueError: It is no scalar, or does not depend on the weights by a run in the block.
        """
        if value.numel() != 1 or not value.requires_grad:
            raise ValueError(
                "value must be a scalar tensor that was computed with gradients inside of the "
                f"block, got {'one without a gradient' if value.numel() == 1 else value.shape}"
            )
        keys = list(self._aliases)
        found = torch.autograd.grad(
            value.reshape(()),
            [self._aliases[key] for key in keys],
            retain_graph=keep_graph,
            allow_unused=True,
        )
        pieces = dict(zip(keys, found, strict=True))
        if all(piece is None for piece in found):
            raise ValueError(
                "value depends on none of the weights that are split: run the model inside of the "
                "block"
            )
        if self._waiting:
            raise LoopedSemanticsError(
                f"the run did not come by {sorted(self._waiting)[0]}, so the end of its last "
                "iteration is not known: run the model to its logits"
            )
        by_iteration, outside = {}, {}
        for name, original in self._originals.items():
            rows = [self._piece(pieces, name, t, original) for t in range(self.n_iterations)]
            by_iteration[name] = torch.stack(rows)
            if pieces.get((name, OUTSIDE)) is not None:
                outside[name] = self._piece(pieces, name, OUTSIDE, original)
        return IterationGradients(by_iteration, outside)

    def _piece(
        self, pieces: Mapping[tuple[str, Place], Tensor | None], name: str, at: Place, like: Tensor
    ) -> Tensor:
        piece = pieces.get((name, at))
        return torch.zeros_like(like, requires_grad=False) if piece is None else piece.detach()

    def _alias(self, name: str, place: Place) -> Tensor:
        """The alias of a weight at a place: a leaf over the weight's own memory."""
        key = (name, place)
        if key not in self._aliases:
            self._aliases[key] = self._originals[name].detach().requires_grad_()
        return self._aliases[key]

    # Handing over.

    def _enter(self, place: Place) -> None:
        """Give the modules that several iterations call the aliases of one."""
        for (module, attribute), name in self._shared:
            _put(module, attribute, self._alias(name, place))

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before a run: nothing of it belongs to an iteration yet."""
        n = kwargs.get("n_iterations")
        if self._layout != self._model.layout or n not in (None, self.n_iterations):
            raise ValueError(
                f"the weights are split for {self.n_iterations} iterations: to run another number "
                "call split_weights inside `with model.iterations(n):`"
            )
        self._waiting = set(self._after)
        self._enter(OUTSIDE)

    def _comes_in(self, value: Tensor, hook: Any) -> None:
        # Said here too, since run_with_hooks calls forward itself, past the hook before a run.
        self._waiting = set(self._after)
        self._enter(int(hook.name.split(".")[1]))

    def _goes_out(self, value: Tensor, hook: Any) -> None:
        self._waiting.discard(hook.name)
        if not self._waiting:
            self._enter(OUTSIDE)

    @contextmanager
    def _on(self) -> Iterator[None]:
        """Put the aliases in place of the weights, and take them back."""
        root: Any = self._model
        slots = [slot for slot, *_ in (*self._fixed, *self._shared)]
        before = [module._parameters[attribute] for module, attribute in slots]
        hooks: list[tuple[str, Callable]] = [
            (f"iter.{t}.hook_state_in", self._comes_in) for t in range(self.n_iterations)
        ]
        hooks += [(name, self._goes_out) for name in self._after]
        handle = root.register_forward_pre_hook(self._begin, with_kwargs=True)
        try:
            for (module, attribute), name, place in self._fixed:
                _put(module, attribute, self._alias(name, place))
            self._enter(OUTSIDE)
            with differentiating(), root.hooks(hooks):
                yield
        finally:
            handle.remove()
            for (module, attribute), parameter in zip(slots, before, strict=True):
                module._parameters[attribute] = parameter


@contextmanager
def split_weights(model: Model, weights: str | Sequence[str] = "core") -> Iterator[WeightUses]:
    """A block of code in which each iteration's use of the shared weights is told apart.

    Run the model in the block, any number of times and with gradients on, make a scalar of what it
    gives, and ask for :meth:`WeightUses.gradients`. No weight is copied: what stands in its place
    shares its memory, and goes away with the block, also after an error. Numbers are those of the
    plain run. Frozen weights are split, too. One thread at a time.

    A use belongs to iteration t from ``iter.{t}.hook_state_in`` until the next iteration begins;
    the last one ends with its last hook point. What is made once for all iterations (the injected
    input, a router's choice before them) is outside, or with the iteration that makes it.

    Args:
        model: A looped model that runs its own blocks; of a bridge, ``model.looped()``.
        weights: ``"core"``: those of the core's blocks, which iterations alone use. ``"all"``:
            every weight. Or physical names (``"core.0.attn.W_Q"``, ``"injection.W"``).

    Yields:
        The uses.

    Raises:
        NoLoopError: The model has no loop.
        LoopedSemanticsError: A bridge, whose Hugging Face model has one module for all iterations.
        ValueError: A name is not known (near matches are suggested), or none is given.
    """
    require_layout(model)
    if not can_restart(model):
        raise LoopedSemanticsError(
            "the Hugging Face model behind the bridge has one module for all iterations, so its "
            "weights cannot be told apart by iteration: call model.looped(), a LoopedTransformer "
            "over the same weights"
        )
    uses = WeightUses(model, weights)
    with uses._on():
        yield uses


def _put(module: nn.Module, attribute: str, alias: Tensor) -> None:
    # A module's dictionary of parameters gives what it holds; an alias is no Parameter, so that no
    # optimiser takes it for one.
    parameters: dict[str, Any] = module._parameters
    parameters[attribute] = alias


def _slots(model: Model, layout: LoopLayout) -> dict[str, list[tuple[Slot, Place, bool]]]:
    """Where each weight is held, by physical name: module, place, whether the place is fixed."""
    names: dict[int, str] = {}
    found: dict[str, list[tuple[Slot, Place, bool]]] = {}
    root: Any = model
    for path, module in root.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            place, fixed, physical = _place(path, layout)
            name = f"{physical}.{attribute}" if physical else attribute
            name = names.setdefault(id(parameter), name)
            found.setdefault(name, []).append(((module, attribute), place, fixed))
    return found


def _place(path: str, layout: LoopLayout) -> tuple[Place, bool, str]:
    """The place of a module, whether it has that place alone, and its physical name."""
    kind, _, rest = path.partition(".")
    number, _, inner = rest.partition(".")
    if kind == "blocks" and number:
        index = int(number)
        physical = layout.physical_name(index)
        return (
            layout.coordinate(index).iteration,
            True,
            f"{physical}.{inner}" if inner else physical,
        )
    if kind == "iter" and number:
        return int(number), True, path
    return OUTSIDE, False, path


def _chosen(
    slots: dict[str, list[tuple[Slot, Place, bool]]],
    weights: str | Sequence[str],
    layout: LoopLayout,
) -> tuple[str, ...]:
    """Physical names of the weights that are asked for."""
    if weights == "all":
        return tuple(slots)
    if weights == "core":
        return tuple(
            name
            for name, held in slots.items()
            if all(fixed and place is not OUTSIDE for _, place, fixed in held)
        )
    names = (weights,) if isinstance(weights, str) else tuple(weights)
    if not names:
        raise ValueError("weights is empty: give physical names, 'core' or 'all'")
    for name in names:
        if name not in slots:
            raise ValueError(f"there is no weight {name!r}: {did_you_mean(name, slots)}")
    return tuple(dict.fromkeys(names))


def _ends(model: Model, n_iterations: int) -> tuple[str, ...]:
    """The hook points that a run comes by as it leaves its last iteration."""
    found = []
    for name in model.hook_dict:
        spec = spec_of(name)
        if name.startswith(f"iter.{n_iterations - 1}.hook_") and spec and spec.moment == "after":
            found.append(name)
    return tuple(found)
