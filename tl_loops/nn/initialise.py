"""Random weights of a new model."""

from collections.abc import Iterable

import torch
from torch import nn


def initialise(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    std: float,
    generator: torch.Generator | None,
) -> None:
    """Draw all weights from N(0, std²); gains are 1, biases and gating constants 0.

    Args:
        named_parameters: Physical parameters, each once.
        std: Standard deviation.
        generator: Source of the draw; ``None``: torch's default generator.
    """
    with torch.no_grad():
        for name, parameter in named_parameters:
            leaf = name.rsplit(".", 1)[-1]
            if leaf == "w":
                parameter.fill_(1.0)
            elif leaf.lstrip("_").startswith("W_") or leaf in ("W", "state"):
                draw = torch.randn(
                    parameter.shape, generator=generator, dtype=torch.float32, device="cpu"
                )
                parameter.copy_(draw * std)
            else:
                parameter.zero_()
