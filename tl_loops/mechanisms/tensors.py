"""Weights as data: shape and storage, said once, from which parameters are made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Storage = Literal["plain", "transposed", "heads_in", "heads_out"]

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The stored types that weights may have."""

_ORDER: dict[str, tuple[int, ...]] = {
    "transposed": (1, 0),
    "heads_in": (0, 2, 1),
    "heads_out": (2, 0, 1),
}
"""The order in which the axes are stored, where it is not the plain one."""


@dataclass(frozen=True)
class PhysicalTensor:
    """Shape of a physical weight, and how the model wants it stored.

    Attributes:
        shape: In TransformerLens's orientation, ``x @ W``.
        storage: ``"plain"``: row-major. The others are views of a row-major ``[out, in]`` matrix,
            so that ``F.linear`` takes the weight without a copy: ``"transposed"`` of ``[in, out]``,
            ``"heads_in"`` of ``[head, d_model, d_head]``, ``"heads_out"`` of
            ``[head, d_head, d_model]``.
    """

    shape: tuple[int, ...]
    storage: Storage = "plain"

    def empty(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Tensor:
        """Uninitialised memory of this shape and storage."""
        return empty_as(self.shape, self.storage, dtype, device)


Tensors = dict[str, PhysicalTensor]
"""Weights by name."""


def matrix(n_in: int, n_out: int) -> PhysicalTensor:
    """An ``[n_in, n_out]`` weight with the storage that ``F.linear`` wants."""
    return PhysicalTensor((n_in, n_out), "transposed")


def vector(length: int) -> PhysicalTensor:
    """A weight of one axis."""
    return PhysicalTensor((length,))


def empty_as(
    shape: tuple[int, ...],
    storage: Storage,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """An uninitialised weight with the strides that ``storage`` asks for."""
    order = _ORDER.get(storage, tuple(range(len(shape))))
    stored = torch.empty([shape[axis] for axis in order], dtype=dtype, device=device)
    return stored.permute([order.index(axis) for axis in range(len(shape))])


def add_parameters(
    module: nn.Module,
    tensors: Mapping[str, PhysicalTensor],
    prefix: str,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> None:
    """Give a module the parameters of a table whose names begin with ``prefix`` and a dot.

    Biases begin at zero, all others uninitialised. Names with further dots belong to modules
    inside this one, which make their own.
    """
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if owner == prefix:
            memory = tensor.empty(dtype, device)
            if leaf.lstrip("_").startswith("b"):
                memory.zero_()
            module.register_parameter(leaf, nn.Parameter(memory))


class Scale(nn.Module):
    """``c · w``: a weight that is trained in units of its own.

    Args:
        weight: The shape of w.
        factor: c.
        dtype: Of w.
        device: Where w goes.
    """

    def __init__(
        self,
        weight: PhysicalTensor,
        factor: float,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.factor = factor
        self.w = nn.Parameter(weight.empty(dtype, device))

    def forward(self) -> Float[Tensor, "..."]:
        return self.w * self.factor


def project_in(
    x: Float[Tensor, "batch pos *head_or_not d_model"],
    W: Float[Tensor, "head d_model d_head"],
    b: Float[Tensor, "head d_head"] | None = None,
) -> Float[Tensor, "batch pos head d_head"]:
    """Project the residual stream to every head; an input with a head axis goes head by head."""
    if x.ndim == 4:
        projected = torch.einsum("bphd,hde->bphe", x, W)
        return projected if b is None else projected + b
    heads, _, d_head = W.shape
    bias = None if b is None else b.flatten()
    return F.linear(x, W.mT.flatten(0, 1), bias).view(*x.shape[:-1], heads, d_head)
