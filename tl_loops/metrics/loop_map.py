"""The loop as a dynamical system: spectrum, norm and Lyapunov exponents of its Jacobian.

A loop map is a callable `step(state) -> state` of one iteration. Its Jacobian J is only touched by
products J v and J^T w, so the state may be a whole residual stream. States of a batch do not
influence each other: pass one prompt at a time, or the numbers are those of the worst one. To
study one position, let `step` hold the others fixed.

The products have the precision of the map itself; vectors are orthogonalised in float32 or better.
Gradients that are cut inside `step` (`.detach()`; `torch.no_grad()` for products J^T w) are
missing from J: a Jacobian that vanishes although the map moves raises, but a part that is cut
cannot be seen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from tl_loops.arguments import check_at_least
from tl_loops.metrics.jacobian import (
    Differentiation,
    Jacobian,
    LoopMap,
    orthogonalise,
)
from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.precision import full_precision
from tl_loops.printing import prints_short

_MIN_KRYLOV_DIM = 20


@prints_short
@dataclass(frozen=True, eq=False)
class LoopSpectrum:
    """Leading eigenvalues of the Jacobian of a loop map.

    Attributes:
        eigenvalues: complex `[eigenvalue]`, largest magnitude first; of a conjugate pair the one
            with positive imaginary part comes first, and the pair may be cut at the end of the
            list.
        residual: ||J v - lambda v|| for the unit eigenvector of each `[eigenvalue]`. For a
            Jacobian far from normal a small residual alone does not guarantee an accurate
            eigenvalue.
        converged: whether all residuals are within the tolerance.
        krylov_dim: dimension of the subspace that was built, the number of products J v.
    """

    eigenvalues: Complex[Tensor, "eigenvalue"]
    residual: Float[Tensor, "eigenvalue"]
    converged: bool
    krylov_dim: int

    @property
    def spectral_radius(self) -> float:
        """Largest magnitude of an eigenvalue; below 1 the states near a fixed point converge."""
        return float(self.eigenvalues[0].abs())

    @property
    def rotation_period(self) -> Float[Tensor, "eigenvalue"]:
        """Iterations per turn, 2 pi / |arg lambda|; inf for a positive eigenvalue."""
        return 2 * math.pi / self.eigenvalues.angle().abs()


@prints_short
@dataclass(frozen=True, eq=False)
class LyapunovExponents:
    """Finite-time Lyapunov exponents along one trajectory.

    Attributes:
        exponents: mean growth per iteration `[exponent]`, natural log; negative is contraction.
        growth: log |diag R| at each iteration `[iteration, exponent]`, the skipped ones left out.
        final_state: the state after the last iteration.
    """

    exponents: Float[Tensor, "exponent"]
    growth: Float[Tensor, "iteration exponent"]
    final_state: Float[Tensor, "..."]


@full_precision
def loop_spectrum(
    step: LoopMap,
    state: Float[Tensor, "..."],
    n_eigenvalues: int = 1,
    krylov_dim: int = 64,
    tolerance: float | int = 1e-4,
    seed: int = 0,
    differentiation: Differentiation = "forward",
) -> LoopSpectrum:
    """Leading eigenvalues of the Jacobian of a loop map, by Arnoldi iteration.

    The complex leading pair r exp(+-i theta) is a spiral that shrinks by r and turns by theta per
    iteration; it is measured at a state that need not be a fixed point, but only there it is the
    rate of convergence. Where the subspace fills the space the result is exact. An eigenvalue that
    is repeated exactly may appear once.

    Args:
        step: the loop map.
        state: where to differentiate, of any shape.
        n_eigenvalues: how many eigenvalues.
        krylov_dim: largest dimension of the subspace, the number of products; memory is that many
            states.
        tolerance: residual of each eigenvalue over the largest magnitude, at which the iteration
            stops.
        seed: seed of the start vector.
        differentiation: `"forward"`: `torch.func.jvp`, one forward pass a product.
            `"double_backward"`: for maps with an operation that has no forward derivative; keeps
            the graph of one pass. Fused attention is computed unfused in both.

    Returns:
        `LoopSpectrum`; check `converged`. Fewer eigenvalues than asked for if the state has fewer
        dimensions.

    Raises:
        ValueError: If `step` changes the shape or cuts gradients, or the counts are not positive.
        FloatingPointError: If the Jacobian holds NaN or inf.
    """
    check_at_least(1, n_eigenvalues=n_eigenvalues, krylov_dim=krylov_dim)
    jacobian = Jacobian(step, state, differentiation)
    size = jacobian.size
    n_eigenvalues = min(n_eigenvalues, size)
    limit = min(size, max(krylov_dim, n_eigenvalues))
    generator = torch.Generator().manual_seed(seed)
    basis = jacobian.vector(generator)[None] / size**0.5
    basis = basis / basis.norm()
    hessenberg = torch.zeros(limit + 1, limit, dtype=torch.float64)
    for m in range(1, limit + 1):
        product = jacobian.jvp(basis[-1])
        following, coefficients, beta = orthogonalise(product, basis)
        hessenberg[:m, m - 1] = coefficients.double().cpu()
        hessenberg[m, m - 1] = beta
        values, residual = _ritz(hessenberg[: m + 1, :m], n_eigenvalues, exact=m == size)
        enough = m >= max(n_eigenvalues, min(_MIN_KRYLOV_DIM, limit))
        converged = bool((residual <= tolerance * values[0].abs()).all()) and m >= n_eigenvalues
        if m == limit or (enough and converged):
            return LoopSpectrum(values, residual, converged, m)
        if beta == 0:  # An invariant subspace: go on outside of it.
            following, _, _ = orthogonalise(jacobian.vector(generator), basis)
        basis = torch.cat([basis, following[None]])
    raise AssertionError("the last round returns")


@full_precision
def operator_norm(
    step: LoopMap,
    state: Float[Tensor, "..."],
    krylov_dim: int = 64,
    tolerance: float | int = 1e-4,
    seed: int = 0,
) -> float:
    """Spectral norm of the Jacobian of a loop map, its largest singular value.

    The largest stretch of a small perturbation in one iteration. At least the spectral radius; far
    above it, a perturbation can grow before it decays. Lanczos iteration on J^T J.

    Args:
        step: the loop map.
        state: where to differentiate, of any shape.
        krylov_dim: largest number of products J^T J v.
        tolerance: relative error at which the iteration stops.
        seed: seed of the start vector.

    Returns:
        The largest singular value of J.

    Raises:
        ValueError: If `step` changes the shape or cuts gradients, or `krylov_dim` is not positive.
        RuntimeError: If the tolerance is not reached within `krylov_dim` products.
        FloatingPointError: If the Jacobian holds NaN or inf.
    """
    check_at_least(1, krylov_dim=krylov_dim)
    jacobian = Jacobian(step, state, "double_backward")
    limit = min(jacobian.size, krylov_dim)
    basis = jacobian.vector(torch.Generator().manual_seed(seed))[None]
    basis = basis / basis.norm()
    projected = torch.zeros(limit, limit, dtype=torch.float64)
    error = math.inf
    for m in range(1, limit + 1):
        product = jacobian.vjp(jacobian.jvp(basis[-1]))
        following, coefficients, beta = orthogonalise(product, basis)
        projected[:m, m - 1] = projected[m - 1, :m] = coefficients.double().cpu()
        values, vectors = torch.linalg.eigh(projected[:m, :m])
        squared = max(float(values[-1]), 0.0)
        # J^T J is symmetric: an eigenvalue lies within `error` of `squared`.
        error = 0.0 if m == jacobian.size else beta * float(vectors[-1, -1].abs())
        enough = m >= min(_MIN_KRYLOV_DIM, limit) or beta == 0
        if enough and error <= 2 * tolerance * squared:
            return squared**0.5
        basis = torch.cat([basis, following[None]])
    raise RuntimeError(
        f"the norm did not settle within {limit} products: its square is {squared:.6g} within "
        f"{error:.3g}; pass a larger krylov_dim or tolerance"
    )


@full_precision
def lyapunov_exponents(
    step: LoopMap | Sequence[LoopMap],
    state: Float[Tensor, "..."],
    n_iterations: int | None = None,
    n_exponents: int = 1,
    skip: int = 0,
    seed: int = 0,
    differentiation: Differentiation = "forward",
) -> LyapunovExponents:
    """Finite-time Lyapunov exponents of a loop map along its trajectory, by JVP and QR.

    Orthonormal tangent vectors are carried along and re-orthonormalised at every iteration; the
    exponents are the mean of log |diag R| (Benettin et al. 1980). With as many exponents as
    dimensions their sum is the mean log |det J|. Where iterations differ (calls of two stacks, step
    embeddings), give one map for each: every sub-update then has its QR.

    Args:
        step: the loop map, or one for each iteration.
        state: the state before the first iteration, of any shape.
        n_iterations: how many iterations to follow; None: as many as there are maps.
        n_exponents: how many tangent vectors.
        skip: leading iterations that turn the tangent vectors but are not averaged.
        seed: seed of the tangent vectors.
        differentiation: as in `loop_spectrum`.

    Returns:
        `LyapunovExponents`; an exponent is -inf where the map collapses a direction.

    Raises:
        ValueError: If `step` changes the shape or cuts gradients, a count is not positive, the
            number of iterations is missing or is not that of the maps, there are more exponents
            than dimensions, or `skip` leaves no iteration.
        FloatingPointError: If the Jacobian holds NaN or inf.
    """
    if callable(step):
        if n_iterations is None:
            raise ValueError("n_iterations is missing: one loop map can be followed for any number")
        check_at_least(1, n_iterations=n_iterations)
        steps = [step] * n_iterations
    else:
        steps = list(step)
        if n_iterations not in (None, len(steps)):
            raise ValueError(f"n_iterations={n_iterations}, but there are {len(steps)} loop maps")
        n_iterations = len(steps)
    check_at_least(1, n_iterations=n_iterations, n_exponents=n_exponents)
    if n_exponents > state.numel():
        raise ValueError(
            f"n_exponents={n_exponents} exceeds the {state.numel()} dimensions of the state"
        )
    if not 0 <= skip < n_iterations:
        raise ValueError(f"skip={skip} leaves none of {n_iterations} iterations; expected less")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(
        state.numel(), n_exponents, generator=generator, dtype=torch.float32
    )  # As every draw: one seed is one draw, whatever the dtype of the states.
    tangents = torch.linalg.qr(start.to(state.device, statistic_dtype(state))).Q
    growth = []
    for one in steps:
        jacobian = Jacobian(one, state, differentiation)
        moved = torch.stack([jacobian.jvp(v) for v in tangents.unbind(-1)], dim=-1)
        tangents, r = torch.linalg.qr(moved)
        growth.append(r.diagonal().abs().log())
        state = jacobian.output
    kept = torch.stack(growth[skip:])
    return LyapunovExponents(kept.mean(0), kept, state)


def _ritz(hessenberg: Tensor, n_eigenvalues: int, exact: bool) -> tuple[Tensor, Tensor]:
    """Leading eigenvalues of the projected map `[m+1, m]` and their residuals."""
    values, vectors = torch.linalg.eig(hessenberg[:-1])
    # Magnitude first; the sign of the imaginary part decides within a conjugate pair.
    order = sorted(
        range(len(values)),
        key=lambda i: (-round(float(values[i].abs()), 12), -float(values[i].imag)),
    )[:n_eigenvalues]
    beta = 0.0 if exact else float(hessenberg[-1, -1])
    return values[order], beta * vectors[-1, order].abs()
