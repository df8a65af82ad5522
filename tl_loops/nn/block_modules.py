"""What the mechanisms of a config put into a physical layer."""

import torch
from torch import nn

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.mechanisms import Mechanism

_PARTS = {"": "block_part", "attn": "attention_part", "mlp": "mlp_part"}


def add_block_modules(
    owner: nn.Module,
    cfg: LoopedTransformerConfig,
    number: int,
    device: torch.device | str | None,
    prefix: str,
) -> tuple[Mechanism, ...]:
    """Give a block, its attention or its MLP the modules of the config's mechanisms.

    Args:
        owner: The block, its attention or its MLP.
        cfg: The config.
        number: Of the physical layer, counted through prelude, core and coda.
        device: Where the weights go.
        prefix: What the names of its modules begin with: ``""``, ``"attn"`` or ``"mlp"``.

    Returns:
        The mechanisms that have a part in its calls.
    """
    for mechanism in cfg.mechanisms:
        for name, module in mechanism.block_modules(cfg, number, device).items():
            place, _, leaf = name.rpartition(".")
            if place == prefix:
                setattr(owner, leaf, module)
    method = _PARTS[prefix]
    idle = getattr(Mechanism, method)
    return tuple(m for m in cfg.mechanisms if getattr(type(m), method) is not idle)
