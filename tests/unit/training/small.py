"""A small looped model and a corpus that it can learn."""

from typing import Any

import torch

from tests.models import SIZES
from tl_loops import LoopedTransformer, LoopedTransformerConfig
from tl_loops.training import ConstantIterations, TrainingSettings


def small_model(**fields: Any) -> LoopedTransformer:
    """(1, 2⊗3, 1)_I unless told otherwise."""
    shape = dict(
        n_prelude=1, n_core=2, n_coda=1, n_iterations=3, injection="concat", initial_state="normal"
    )
    return LoopedTransformer(LoopedTransformerConfig(**{**SIZES, **shape, **fields}))


def counting_corpus(n_tokens: int = 600, period: int = 7) -> torch.Tensor:
    """0 1 2 ... 6 0 1 ...: every next token is certain."""
    return torch.arange(n_tokens) % period


def settings(**changes: Any) -> TrainingSettings:
    """A few small steps."""
    few: dict[str, Any] = dict(
        n_steps=4, batch_size=2, n_context=12, iterations=ConstantIterations(3), warmup_steps=1
    )
    return TrainingSettings(**{**few, **changes})
