"""A bound on the injection's part for the state: its spectral radius, lowered during training.

The blocks of a pre-norm loop read the state through a norm, so that what they add is bounded. What
is left of the state itself goes through the matrix W_s of the injection, s ← W_s s + W_e e. Where
its spectral radius is above 1, the state grows at that rate however the blocks are trained; below
1 it stays bounded.

Source: Parcae (2604.12946) finds that unstable looped models have injections of a large spectral
norm, and keeps it below 1 by a diagonal injection that decays (``"gated_diagonal"``). Here
the same is asked of a whole matrix.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_loops.arguments import check_at_least, checked
from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.model import Model
from tl_loops.training.settings import TrainingSettings


@checked
@torch.no_grad()
def state_radius(model: Model) -> float:
    """The spectral radius of W_s, the largest modulus of its eigenvalues, in float64.

    Args:
        model: A model with ``injection="concat"`` or ``"concat_injection_first"``.

    Raises:
        LoopedSemanticsError: Its injection has no matrix for the state.
    """
    return float(torch.linalg.eigvals(_state_matrix(model).double()).abs().max())


@checked
@torch.no_grad()
def limit_state_radius(model: Model, most: float) -> None:
    """Scale W_s down, in place, so that its spectral radius is at most a number.

    A matrix with a smaller radius stays as it is, bit for bit.

    Args:
        model: As in :func:`state_radius`.
        most: At least 0.

    Raises:
        LoopedSemanticsError: Its injection has no matrix for the state.
        ValueError: ``most`` is below 0.

    Source: Parcae, 2604.12946, which keeps the norm of this map below 1.
    """
    check_at_least(0, most=most)
    radius = state_radius(model)
    if radius > most:
        _state_matrix(model).mul_(most / radius)


class RadiusRule:
    """The bound of ``settings.state_radius`` for each step of a run.

    It falls in a straight line from the radius at the start, over ``state_radius_share`` of the
    steps, and stays. Where the start is below it already, it is the bound of all steps.

    Args:
        model: At the start of the run.
        settings: Of the run.
        parameters: The weights that are trained, by physical name.

    Raises:
        LoopedSemanticsError: A bound is set and the injection has no matrix for the state.
        ValueError: A bound is set and that matrix is not trained.
    """

    def __init__(
        self, model: Model, settings: TrainingSettings, parameters: Mapping[str, nn.Parameter]
    ):
        self._settings, self._first = settings, 0.0
        if settings.state_radius is None:
            return
        self._first = state_radius(model)
        if not any(model.injection.W is weight for weight in parameters.values()):
            raise ValueError(
                "state_radius scales the injection's matrix, but that is not trained: give "
                "injection.W requires_grad=True, or leave state_radius out"
            )

    def at(self, step: int) -> float:
        """The bound after a step, counted from 0; infinite without a rule."""
        most, n_falling = self._settings.state_radius, self._settings.state_radius_share
        if most is None:
            return float("inf")
        n_falling *= self._settings.n_steps
        left = 1.0 - min(1.0, (step + 1) / n_falling) if n_falling else 0.0
        return most + left * max(self._first - most, 0.0)

    def hold(self, model: Model, step: int) -> None:
        """Bring the model under the bound after a step."""
        if self._settings.state_radius is not None:
            limit_state_radius(model, self.at(step))


def _state_matrix(model: Model) -> Float[Tensor, "d_model d_model"]:
    """W_s, a view of the injection's weight."""
    injection: Any = getattr(model, "injection", None)
    if getattr(injection, "W", None) is None:
        kind = getattr(model.cfg, "injection", None)
        raise LoopedSemanticsError(
            "the rule for the state's radius needs an injection with a matrix for the state, "
            f"injection='concat' or 'concat_injection_first', and this model has {kind!r}: "
            "leave state_radius out ('add' keeps the state whole, 'gated_diagonal' and "
            "'orthogonal' make it smaller by themselves)"
        )
    return injection.W_state
