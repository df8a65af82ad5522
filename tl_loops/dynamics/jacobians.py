"""Spectrum, size and exponents of the Jacobians of a model's iterations, on one prompt."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_loops.arguments import checked
from tl_loops.dynamics.iteration_map import ModelLoopMap, loop_map, loop_maps
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout
from tl_loops.layout.selection import Selection, distinct_indices
from tl_loops.metrics import (
    FixedPointSensitivity,
    JacobianNorm,
    LoopSpectrum,
    LyapunovExponents,
    fixed_point_sensitivity,
    jacobian_norm,
    loop_spectrum,
    lyapunov_exponents,
)
from tl_loops.metrics.jacobian import Differentiation
from tl_loops.upstream import left_as_it_was

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class IterationJacobians:
    """The Jacobian of every chosen iteration, at the states of one run.

    Attributes:
        iterations: The iterations, in order.
        spectra: Leading eigenvalues of each; look at ``converged``.
        norms: Frobenius norm of each, with its standard error.
        n_dimensions: Number of entries of the state.
    """

    iterations: tuple[int, ...]
    spectra: tuple[LoopSpectrum, ...]
    norms: tuple[JacobianNorm, ...]
    n_dimensions: int

    @property
    def spectral_radius(self) -> Float[Tensor, "iteration"]:
        """Largest magnitude of an eigenvalue at each iteration; NaN where it did not converge."""
        return torch.tensor([s.spectral_radius if s.converged else np.nan for s in self.spectra])

    @property
    def frobenius_norm(self) -> Float[Tensor, "iteration"]:
        """‖J‖_F at each iteration."""
        return torch.tensor([norm.norm for norm in self.norms])

    def to_frame(self) -> "pandas.DataFrame":
        """One row per iteration: radius, period of the leading pair, norms and their errors."""
        import pandas

        return pandas.DataFrame(
            {
                "iteration": self.iterations,
                "spectral_radius": [s.spectral_radius for s in self.spectra],
                "converged": [s.converged for s in self.spectra],
                "rotation_period": [float(s.rotation_period[0]) for s in self.spectra],
                "frobenius_norm": [norm.norm for norm in self.norms],
                "frobenius_error": [norm.norm_error for norm in self.norms],
                "rms_stretch": [norm.rms_stretch for norm in self.norms],
            }
        )

    def __repr__(self) -> str:
        return (
            f"IterationJacobians of {self.n_dimensions} dimensions\n"
            f"{self.to_frame().to_string(index=False, float_format='{:.4g}'.format)}"
        )


@checked
@left_as_it_was
def iteration_jacobians(
    model: Model,
    prompt: str | Int[Tensor, "pos"],
    iterations: Selection | None = None,
    *,
    pos: Selection | None = None,
    n_eigenvalues: int = 1,
    krylov_dim: int = 64,
    tolerance: float | int = 1e-3,
    n_probes: int | None = 32,
    generator: torch.Generator | None = None,
    initial_state: Float[Tensor, "pos d_model"] | None = None,
    differentiation: Differentiation = "double_backward",
    progress: bool = False,
) -> IterationJacobians:
    """Spectral radius and Frobenius norm of the Jacobian of iterations, along one run.

    Costs about ``krylov_dim + n_probes`` passes of one iteration for each iteration. The radius is
    a rate of convergence at a fixed point alone; elsewhere it says how an iteration acts on small
    changes there.

    Args:
        model: As for :func:`loop_map`.
        prompt: One text, or the tokens of one.
        iterations: Which; ``None``: all.
        pos: Positions whose state is varied, the others held; ``None``: all of them.
        n_eigenvalues: How many leading eigenvalues.
        krylov_dim: Most products with a Jacobian for its eigenvalues.
        tolerance: Relative residual of the eigenvalues.
        n_probes: Random vectors for the Frobenius norm; ``None``: all unit vectors, exactly.
        generator: Draws them, on the CPU; ``None``: a new one with seed 0.
        initial_state: The state before iteration 0; ``None``: the model's rule.
        differentiation: ``"double_backward"``: keeps the graph of an iteration, and a product is a
            backward pass through it. ``"forward"``: keeps no graph, and takes longer.
        progress: Whether to show a progress bar.

    Raises:
        NoLoopError: The model has no loop.
        LoopedSemanticsError: The loop carries more than its state.
        ValueError: The prompt cannot be fed, or a count is not positive.
        IndexError: There is no such iteration or position.
        FloatingPointError: A Jacobian holds NaN or inf.

    Source: the penalty on ‖J‖_F is that of 2605.26733; the rest is standard numerical linear
    algebra.
    """
    n_iterations = require_layout(model).n_iterations
    chosen = distinct_indices("iteration", n_iterations, iterations)
    maps = loop_maps(model, prompt, pos=pos, initial_state=initial_state)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    spectra, norms = [], []
    for t in tqdm(chosen, desc="Jacobians", disable=not progress):
        step = maps[t]
        spectra.append(
            loop_spectrum(
                step,
                step.state,
                n_eigenvalues,
                krylov_dim,
                tolerance=tolerance,
                differentiation=differentiation,
            )
        )
        norms.append(jacobian_norm(step, step.state, n_probes, generator, differentiation))
    return IterationJacobians(chosen, tuple(spectra), tuple(norms), maps[0].n_dimensions)


@checked
@left_as_it_was
def run_exponents(
    model: Model,
    prompt: str | Int[Tensor, "pos"],
    n_exponents: int = 1,
    *,
    skip: int = 0,
    seed: int = 0,
    initial_state: Float[Tensor, "pos d_model"] | None = None,
) -> LyapunovExponents:
    """Finite-time Lyapunov exponents of a model's run, with QR after every iteration.

    Each iteration is a map of its own (with two stacks, a call is a sub-update of the joint state).
    Costs ``n_exponents`` passes of one iteration for each iteration.

    Args:
        model: As for :func:`loop_map`.
        prompt: One text, or the tokens of one.
        n_exponents: How many directions.
        skip: Leading iterations that turn the directions but are not averaged.
        seed: Of the directions at the beginning.
        initial_state: The state before iteration 0; ``None``: the model's rule.

    Returns:
        Exponents in nats per iteration; its ``final_state`` is what leaves the last iteration.

    Raises:
        NoLoopError: The model has no loop.
        LoopedSemanticsError: The loop carries more than its state.
        ValueError: The prompt cannot be fed, a count does not fit.
        FloatingPointError: A Jacobian holds NaN or inf.

    Source: Benettin et al. 1980.
    """
    maps = loop_maps(model, prompt, initial_state=initial_state)
    return lyapunov_exponents(maps, maps[0].state, None, n_exponents, skip, seed)


@checked
@left_as_it_was
def injection_sensitivity(
    model: Model,
    prompt: str | Int[Tensor, "pos"],
    directions: Float[Tensor, "direction pos d_model"],
    iteration: int = -1,
    *,
    span: int | None = None,
    **options: Any,
) -> FixedPointSensitivity:
    """How the fixed point of a model's loop moves with the injection: (I - J_x)⁻¹ J_e v.

    Args:
        model: As for :func:`loop_map`, with an injection, and contracting on the prompt.
        prompt: One text, or the tokens of one.
        directions: Changes v of the injection.
        iteration: The iteration whose state is taken for the fixed point. A late one: run the model
            longer with ``model.iterations(n)``.
        span: As for :func:`loop_map`; ``None``: with two stacks a whole cycle, which begins at
            ``iteration`` (by default the last one), else one iteration.
        **options: ``tolerance``, ``max_terms``, ``fixed_point_tolerance``, ``krylov_dim`` and
            ``seed`` of :func:`tl_loops.metrics.fixed_point_sensitivity`.

    Raises:
        NoLoopError: The model has no loop.
        LoopedSemanticsError: The loop injects nothing, or carries more than its state.
        ValueError: The state is no fixed point, the spectral radius is 1 or more, or an argument
            does not fit.
        RuntimeError: The radius or the series did not converge.

    Source: 2604.15259.
    """
    stacks = getattr(model.cfg, "stacks", None)
    if span is None and stacks:
        span = len(stacks)
        iteration = -span if iteration == -1 else iteration
    step: ModelLoopMap = loop_map(model, prompt, iteration, span=span)
    if step.injection is None:
        raise LoopedSemanticsError(
            "this loop injects nothing, so its fixed point depends on the prompt through the "
            "initial state alone: compare runs from several (tl_loops.metrics.path_independence)"
        )
    return fixed_point_sensitivity(step, step.state, step.injection, directions, **options)
