"""Products with the Jacobian of a loop map, which is never formed.

A loop map is a callable `step(state) -> state`. Products have the precision of the map itself.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tl_loops.metrics.padding import statistic_dtype

LoopMap = Callable[[Tensor], Tensor]
Differentiation = Literal["forward", "double_backward"]


def differentiable_attention() -> AbstractContextManager[object]:
    """Attention from plain products: the fused kernels have no forward or second derivative."""
    return sdpa_kernel(SDPBackend.MATH)


class Jacobian:
    """Products with the Jacobian of `step` at `state`, on flat vectors of at least float32.

    Args:
        step: the map.
        state: where to differentiate, of any shape.
        differentiation: `"forward"`, one pass a product, or `"double_backward"`, which keeps the
            graph of one pass and also gives products J^T w.
        same_shape: whether `step` must give what has the state's shape.

    Raises:
        ValueError: If `step` changes the shape, cuts gradients, or `differentiation` is unknown.
        FloatingPointError: If a product holds NaN or inf.
    """

    def __init__(
        self,
        step: LoopMap,
        state: Tensor,
        differentiation: Differentiation,
        same_shape: bool = True,
    ) -> None:
        if differentiation not in ("forward", "double_backward"):
            raise ValueError(
                f'got differentiation={differentiation!r}, expected "forward" or "double_backward"'
            )
        with torch.inference_mode(False):  # Tensors made in inference mode have no derivatives.
            self._step, self._state = step, state.detach().clone()
        self._dtype = statistic_dtype(state)
        self.size = state.numel()
        if not self.size:
            raise ValueError(f"state of shape {list(state.shape)} has no entries to vary")
        self._graph: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None
        self._seen_product = False
        if differentiation == "forward":
            with torch.no_grad():
                output = step(self._state)
        else:
            with torch.inference_mode(False), torch.enable_grad(), differentiable_attention():
                x = self._state.clone().requires_grad_()
                output = step(x)
        if same_shape and output.shape != state.shape:
            raise ValueError(
                f"step maps shape {list(state.shape)} to {list(output.shape)}; "
                "a loop map returns a state of the same shape"
            )
        self.output = output.detach()
        if differentiation == "double_backward":
            with torch.inference_mode(False), torch.enable_grad():
                # J^T u is linear in u, so its derivative with respect to u along v is J v.
                u = torch.zeros_like(output, requires_grad=True)
                pullback = None
                if output.requires_grad:
                    (pullback,) = torch.autograd.grad(
                        output, x, u, create_graph=True, allow_unused=True
                    )
            self._graph = (x, output, u, pullback)

    def vector(self, generator: torch.Generator) -> Tensor:
        """Random direction."""
        drawn = torch.randn(self.size, generator=generator, dtype=torch.float32)
        return drawn.to(self._state.device, self._dtype)

    def jvp(self, v: Tensor) -> Tensor:
        """J v."""
        tangent = v.reshape(self._state.shape).to(self._state.dtype)
        if self._graph is None:
            with differentiable_attention(), torch.inference_mode(False), torch.no_grad():
                product = torch.func.jvp(self._step, (self._state,), (tangent.clone(),))[1]
        else:
            _, _, u, pullback = self._graph
            product = None
            if pullback is not None and pullback.requires_grad:
                (product,) = torch.autograd.grad(
                    pullback, u, tangent, retain_graph=True, allow_unused=True
                )
        product = self._checked(product, self.output.numel())
        if not self._seen_product:
            self._seen_product = True
            if not product.any():
                self._refuse_cut_gradient(tangent)
        return product

    def vjp(self, w: Tensor) -> Tensor:
        """J^T w, for `double_backward`."""
        assert self._graph is not None
        x, output, _, _ = self._graph
        product = None
        if output.requires_grad:
            cotangent = w.reshape(output.shape).to(output.dtype)
            (product,) = torch.autograd.grad(
                output, x, cotangent, retain_graph=True, allow_unused=True
            )
        return self._checked(product, self.size)

    def _refuse_cut_gradient(self, tangent: Tensor) -> None:
        """Raise if the map moves along a tangent where its derivative is exactly zero."""
        size = torch.finfo(tangent.dtype).eps ** 0.5 * max(1.0, float(self._state.norm()))
        with torch.no_grad():
            moved = self._step(self._state + size * tangent / tangent.norm())
        if not torch.equal(moved, self.output):
            raise ValueError(
                "the derivative of step is exactly zero, yet its output changes with the state; "
                "step cuts gradients (torch.no_grad, detach) or rounds: pass a differentiable map"
            )

    def _checked(self, product: Tensor | None, size: int) -> Tensor:
        if product is None:  # The output does not depend on the state.
            return torch.zeros(size, dtype=self._dtype, device=self._state.device)
        product = product.detach().reshape(-1).to(self._dtype)
        if not product.isfinite().all():
            raise FloatingPointError(
                "the Jacobian of the loop map has NaN or inf at this state; check that the map is "
                "differentiable there and does not overflow in its dtype"
            )
        return product


def orthogonalise(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, float]:
    """Split `vector` into its coefficients in the basis `[vector, size]` and the rest.

    Returns:
        The rest as a unit vector, the coefficients, and the length of the rest, which is 0 where
        only rounding is left.
    """
    coefficients = basis @ vector
    rest = vector - coefficients @ basis
    again = basis @ rest  # Once more: one pass of Gram-Schmidt loses orthogonality.
    rest = rest - again @ basis
    beta = float(rest.norm())
    if beta <= 10 * torch.finfo(vector.dtype).eps * float(vector.norm()):
        beta = 0.0
    return rest / (beta if beta > 0 else 1.0), coefficients + again, beta
