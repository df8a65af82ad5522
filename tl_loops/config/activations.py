"""Activation functions of the MLP by name."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from tl_loops.upstream import SUPPORTED_ACTIVATIONS


def half_relu2(x: Tensor) -> Tensor:
    """``0.5 · relu(x)²`` (Parcae)."""
    return 0.5 * F.relu(x).square()


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {**SUPPORTED_ACTIVATIONS, "half_relu2": half_relu2}
"""TransformerLens's activation functions, and those of looped families."""
