"""Weights that blocks share: seen to be one object, and made so again where torch took them apart.

Tying is by Parameter. What assigns new Parameters module by module (``load_state_dict`` with
``assign=True``, a conversion that overwrites) would leave every iteration with its own.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from tl_loops.errors import LoopedSemanticsError


def tied_modules(model: Any) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Every module that shares its weights with an earlier one: its name, it, and the owner."""
    physical, layout = model.physical_blocks(), model.layout
    for index, block in enumerate(model.blocks):
        owner = physical[layout.physical_name(index)]
        if block is not owner:
            yield f"blocks.{index}", block, owner
    own = model.cfg.own_norm_between_iterations
    between = () if own else enumerate(model.iter)
    norms = [(f"iter.{t}.norm", getattr(hooks, "norm", None)) for t, hooks in between]
    for name, norm in (*norms, ("ln_coda", getattr(model, "ln_coda", None))):
        if norm is not None:
            yield name, norm, model.ln_final


def tie(model: Any) -> None:
    """Make the weights that blocks share one object again: those of the first block."""
    for _, module, owner in tied_modules(model):
        for part, first in zip(module.modules(), owner.modules(), strict=True):
            part._parameters.update(first._parameters)
            part._buffers.update(first._buffers)


def check_ties(model: Any) -> None:
    """Raise on a model whose iterations no longer share their weights.

    Raises:
        LoopedSemanticsError: A block has a weight of its own; the message names it.
    """
    for name, module, owner in tied_modules(model):
        own, first = dict(module.named_parameters()), dict(owner.named_parameters())
        for leaf in own.keys() | first.keys():
            if own.get(leaf) is not first.get(leaf):
                raise LoopedSemanticsError(
                    f"{name}.{leaf} is a weight of its own, but the iterations of this model share "
                    "their weights, and a checkpoint has each once: set the weight of the first "
                    "block in place (model.load_physical_state_dict does it by name)"
                )
