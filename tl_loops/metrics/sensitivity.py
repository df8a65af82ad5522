"""How large the Jacobian of a loop map is, and how a fixed point answers to the injection."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.arguments import check_at_least
from tl_loops.metrics.jacobian import Differentiation, Jacobian, LoopMap
from tl_loops.metrics.loop_map import loop_spectrum
from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.precision import full_precision
from tl_loops.printing import prints_short


@prints_short
@dataclass(frozen=True, eq=False)
class JacobianNorm:
    """The Frobenius norm of the Jacobian of a loop map.

    Attributes:
        norm: ||J||_F; the square root of `square`.
        square: ||J||_F^2, without bias where it is estimated.
        standard_error: of `square`; 0 where all directions were taken, NaN for a single probe.
        n_probes: number of products with J.
        n_dimensions: number of dimensions of the state: ||J||_F / sqrt(n_dimensions) is the
            root-mean-square stretch, 1 for the identity.
    """

    norm: float
    square: float
    standard_error: float
    n_probes: int
    n_dimensions: int

    @property
    def norm_error(self) -> float:
        """Standard error of `norm`, to first order; NaN for a single probe or a norm of 0."""
        if self.standard_error == 0:
            return 0.0
        return self.standard_error / (2 * self.norm) if self.norm else math.nan

    @property
    def rms_stretch(self) -> float:
        """||J||_F / sqrt(n_dimensions): how much a random small perturbation is stretched."""
        return self.norm / self.n_dimensions**0.5


@full_precision
def jacobian_norm(
    step: LoopMap,
    state: Float[Tensor, "..."],
    n_probes: int | None = 32,
    generator: torch.Generator | None = None,
    differentiation: Differentiation = "forward",
) -> JacobianNorm:
    """Frobenius norm of the Jacobian of a loop map, by Hutchinson's estimator.

    ||J||_F^2 = E ||J v||^2 with v ~ N(0, I), which is E ||v^T J||^2, the penalty of arXiv
    2605.26733. The estimate of the square has no bias; its standard error is given.

    Args:
        step: the loop map.
        state: where to differentiate, of any shape.
        n_probes: number of random vectors; None: all unit vectors, which is exact and takes as many
            products as the state has dimensions.
        generator: draws the vectors, on the CPU; None: a new one with seed 0.
        differentiation: as in `loop_spectrum`.

    Returns:
        `JacobianNorm`.

    Raises:
        ValueError: If `step` changes the shape or cuts gradients, or `n_probes` is not positive.
        FloatingPointError: If the Jacobian holds NaN or inf.
    """
    jacobian = Jacobian(step, state, differentiation)
    size = jacobian.size
    if n_probes is None:
        total = 0.0
        for i in range(size):
            unit = torch.zeros(size, dtype=statistic_dtype(state), device=state.device)
            unit[i] = 1.0
            total += float(jacobian.jvp(unit).double().square().sum())
        return JacobianNorm(total**0.5, total, 0.0, size, size)
    check_at_least(1, n_probes=n_probes)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    squares = torch.tensor(
        [
            float(jacobian.jvp(jacobian.vector(generator)).double().square().sum())
            for _ in range(n_probes)
        ],
        dtype=torch.float64,
    )
    square = float(squares.mean())
    error = float(squares.std()) / n_probes**0.5 if n_probes > 1 else math.nan
    return JacobianNorm(square**0.5, square, error, n_probes, size)


@prints_short
@dataclass(frozen=True, eq=False)
class FixedPointSensitivity:
    """How a fixed point moves with what is injected: dx*/de v = (I - J_x)^-1 J_e v.

    Attributes:
        response: dx*/de v for each direction v, `[direction, *state]`.
        n_terms: number of terms of the Neumann series that each took.
        residual: ||(I - J_x) response - J_e v|| / ||J_e v|| of each `[direction]`.
        spectral_radius: of J_x, below 1.
        distance: ||step(x, e) - x|| / ||x||, how far the state is from a fixed point.
    """

    response: Float[Tensor, "direction ..."]
    n_terms: int
    residual: Float[Tensor, "direction"]
    spectral_radius: float
    distance: float


@full_precision
def fixed_point_sensitivity(
    step: Callable[[Tensor, Tensor], Tensor],
    state: Float[Tensor, "..."],
    injection: Float[Tensor, "..."],
    directions: Float[Tensor, "direction ..."] | None = None,
    tolerance: float | int = 1e-4,
    max_terms: int = 1000,
    fixed_point_tolerance: float | int = 1e-3,
    krylov_dim: int = 64,
    seed: int = 0,
) -> FixedPointSensitivity:
    """How the fixed point x* = step(x*, e) moves with e: (I - J_x)^-1 J_e by Neumann series.

    Sum of J_x^k J_e v over k = 0, 1, ..., which converges where the spectral radius of J_x is below
    1 (arXiv 2604.15259). Adding terms 0 to n leaves exactly the residual J_x^(n+1) J_e v, so the
    error is known. Elsewhere there is no such derivative, and nothing is returned.

    Args:
        step: `step(state, injection)`, one iteration.
        state: the fixed point, of any shape.
        injection: e, of any shape.
        directions: which changes of e, `[direction, *injection]`; None: every unit vector, in the
            order of the flat injection, which gives the whole matrix.
        tolerance: largest residual.
        max_terms: largest number of terms of the series.
        fixed_point_tolerance: largest ||step(x, e) - x|| / ||x|| that passes as a fixed point.
        krylov_dim: as in `loop_spectrum`, for the spectral radius.
        seed: as in `loop_spectrum`.

    Returns:
        `FixedPointSensitivity`.

    Raises:
        ValueError: If the state is no fixed point, the spectral radius is 1 or more, `directions`
            has another shape, or `step` cuts gradients.
        RuntimeError: If the spectral radius did not converge within `krylov_dim` products, or the
            series not within `max_terms` terms.
        FloatingPointError: If a Jacobian holds NaN or inf.
    """
    check_at_least(1, max_terms=max_terms)
    if directions is None:
        n = injection.numel()
        directions = torch.eye(n, dtype=statistic_dtype(injection), device=injection.device)
        directions = directions.reshape(n, *injection.shape)
    if directions.shape[1:] != injection.shape:
        raise ValueError(
            f"directions has shape {list(directions.shape)}, expected [direction, "
            f"{', '.join(map(str, injection.shape))}], changes of the injection"
        )
    by_state = Jacobian(lambda x: step(x, injection), state, "forward")
    distance = float((by_state.output - state).double().norm() / state.double().norm())
    if not distance <= fixed_point_tolerance:
        raise ValueError(
            f"the state is no fixed point: one iteration moves it by {distance:.3g} of its length, "
            f"more than fixed_point_tolerance={fixed_point_tolerance}; take the state after more "
            "iterations"
        )
    spectrum = loop_spectrum(
        lambda x: step(x, injection), state, 1, krylov_dim=krylov_dim, seed=seed, tolerance=1e-3
    )
    radius = spectrum.spectral_radius
    if radius >= 1:
        raise ValueError(
            f"the spectral radius is {radius:.4g}, which is not below 1: the loop does not "
            "contract there, so that its fixed point has no derivative by the injection"
        )
    if not spectrum.converged:
        raise RuntimeError(
            f"the spectral radius did not converge within {spectrum.krylov_dim} products "
            f"(estimate {radius:.4g}); pass a larger krylov_dim"
        )
    by_injection = Jacobian(lambda e: step(state, e), injection, "forward", same_shape=False)
    responses, residuals, most = [], [], 0
    for direction in directions:
        term = by_injection.jvp(direction.reshape(-1))
        first, total = float(term.norm()), term
        residual = 0.0 if first == 0 else math.inf
        n_terms = 1
        while residual > tolerance:
            term = by_state.jvp(term)
            residual = float(term.norm()) / first
            if residual <= tolerance:
                break
            if n_terms == max_terms:
                raise RuntimeError(
                    f"the residual is {residual:.3g} after {max_terms} terms of the series, at a "
                    f"spectral radius of {radius:.4g}; pass a larger max_terms or tolerance"
                )
            total, n_terms = total + term, n_terms + 1
        responses.append(total.reshape(state.shape))
        residuals.append(residual)
        most = max(most, n_terms)
    if not responses:
        raise ValueError("directions is empty; pass at least one")
    return FixedPointSensitivity(
        torch.stack(responses), most, torch.tensor(residuals), radius, distance
    )
