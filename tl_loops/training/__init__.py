"""Training of one's own looped models."""

from tl_loops.training.corpus import cut_contexts, draw_contexts
from tl_loops.training.evaluation import evaluate
from tl_loops.training.gradients import iteration_gradients
from tl_loops.training.iteration_draws import (
    ConstantIterations,
    IterationDraw,
    LogNormalPoissonIterations,
    PoissonIterations,
    UniformIterations,
)
from tl_loops.training.log import TrainingLog
from tl_loops.training.losses import step_losses, token_losses
from tl_loops.training.penalties import growth_penalty, jacobian_penalty, settling_penalty
from tl_loops.training.run import NotFiniteError, train
from tl_loops.training.settings import TrainingSettings
from tl_loops.training.trajectory import TrainingPass, exit_logits, training_pass

__all__ = [
    "ConstantIterations",
    "IterationDraw",
    "LogNormalPoissonIterations",
    "NotFiniteError",
    "PoissonIterations",
    "TrainingLog",
    "TrainingPass",
    "TrainingSettings",
    "UniformIterations",
    "cut_contexts",
    "draw_contexts",
    "evaluate",
    "exit_logits",
    "growth_penalty",
    "iteration_gradients",
    "jacobian_penalty",
    "settling_penalty",
    "step_losses",
    "token_losses",
    "train",
    "training_pass",
]
