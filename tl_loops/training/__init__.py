"""Training of one's own looped models."""

from tl_loops.training.corpus import Corpus, cut_contexts, draw_contexts
from tl_loops.training.data import UNTRAINED, AdaptiveData, TrainingBatch, TrainingData
from tl_loops.training.evaluation import Evaluation, evaluate, evaluate_batches
from tl_loops.training.gradients import iteration_gradients
from tl_loops.training.iteration_draws import (
    ConstantIterations,
    IterationDraw,
    LogNormalPoissonIterations,
    MixedIterations,
    PoissonIterations,
    UniformIterations,
)
from tl_loops.training.log import TrainingLog
from tl_loops.training.losses import step_losses, target_losses, token_losses
from tl_loops.training.penalties import growth_penalty, jacobian_penalty, settling_penalty
from tl_loops.training.radius import limit_state_radius, state_radius
from tl_loops.training.run import NotFiniteError, train
from tl_loops.training.settings import TrainingSettings
from tl_loops.training.trajectory import TrainingPass, exit_logits, training_pass

__all__ = [
    "UNTRAINED",
    "AdaptiveData",
    "ConstantIterations",
    "Corpus",
    "Evaluation",
    "IterationDraw",
    "LogNormalPoissonIterations",
    "MixedIterations",
    "NotFiniteError",
    "PoissonIterations",
    "TrainingBatch",
    "TrainingData",
    "TrainingLog",
    "TrainingPass",
    "TrainingSettings",
    "UniformIterations",
    "cut_contexts",
    "draw_contexts",
    "evaluate",
    "evaluate_batches",
    "exit_logits",
    "growth_penalty",
    "iteration_gradients",
    "jacobian_penalty",
    "limit_state_radius",
    "settling_penalty",
    "state_radius",
    "step_losses",
    "target_losses",
    "token_losses",
    "train",
    "training_pass",
]
