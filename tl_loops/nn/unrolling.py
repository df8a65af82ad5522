"""Distinct modules over the same parameters."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.layout.layout import LoopLayout
from tl_loops.mechanisms.norm import Norm
from tl_loops.nn.block import Block
from tl_loops.nn.loop.hooks import IterationHooks
from tl_loops.upstream import AnyHookPoint, HookPoint

Module = TypeVar("Module", bound=nn.Module)

_BOOKKEEPING = frozenset(nn.Module().__dict__) | {"name"}


def tied_copy(module: Module) -> Module:
    """A copy of a module tree with hook points of its own over the very same parameters.

    Tying is by Parameter, never by module instance: ``named_modules`` drops repeated instances,
    and with them the names of their hooks. Hooks of the original are not copied.
    """
    copy = module.__class__.__new__(module.__class__)
    nn.Module.__init__(copy)
    copy.training = module.training
    for key, value in module.__dict__.items():
        if key not in _BOOKKEEPING and key not in module._modules:
            object.__setattr__(copy, key, value)
    copy._parameters.update(module._parameters)
    copy._buffers.update(module._buffers)
    copy._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        if isinstance(child, AnyHookPoint):
            copy.add_module(name, HookPoint())
        else:
            copy.add_module(name, None if child is None else tied_copy(child))
    return copy


AnyBlock = TypeVar("AnyBlock", bound=nn.Module)


def physical_blocks(
    cfg: LoopedTransformerConfig, device: torch.device | str | None = None
) -> dict[str, Block]:
    """One block with weights of its own for every physical layer, by physical name."""
    names = cfg.layout.physical_names()
    return {name: Block(cfg, device, number) for number, name in enumerate(names)}


def unroll(
    layout: LoopLayout,
    physical: Mapping[str, AnyBlock],
    reuse: Sequence[Sequence[AnyBlock]] = (),
) -> list[AnyBlock]:
    """The unrolled blocks: distinct modules whose parameters are those of the physical ones.

    Args:
        layout: What to unroll.
        physical: The physical blocks; each stands at its first place itself.
        reuse: Blocks of iterations 0, 1, ... that exist already and keep their hooks.
    """
    used: set[str] = set()
    blocks: list[AnyBlock] = []
    for index in range(layout.n_layers):
        at, name = layout.coordinate(index), layout.physical_name(index)
        if at.iteration is not None and at.iteration < len(reuse):
            blocks.append(reuse[at.iteration][at.layer])
        else:
            blocks.append(tied_copy(physical[name]) if name in used else physical[name])
        used.add(name)
    return blocks


def iteration_hooks(cfg: LoopedTransformerConfig, ln_final: Norm) -> list[IterationHooks]:
    """The hook points of every iteration, with the norm that ends it where there is one.

    Without a coda the norm that ends the last iteration is the final norm itself.
    """
    readout = cfg.readout

    def norm(name: str | None) -> Norm | None:
        if name in (None, "ln_final"):
            return None
        own = readout.own_norm_between_iterations
        return Norm(cfg, weight=False) if own else tied_copy(ln_final)

    return [
        IterationHooks(cfg, t, norm(readout.iteration_norm(t))) for t in range(cfg.n_iterations)
    ]
