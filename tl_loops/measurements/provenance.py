"""What a profile was measured on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Provenance:
    """What a profile was measured on.

    Attributes:
        model: ``cfg.model_name``.
        weights: Fingerprint of weights and architecture.
        notation: ``(p, k⊗t, c)`` as in arXiv 2604.11791; ``None`` for a feedforward model.
        n_iterations: ``None`` for a feedforward model.
        n_prompts: Number of prompts.
        n_tokens: Number of their tokens.
        tl_loops: Version that measured.
        options: All options of each metric.
        bos: How the prompts began: ``"prepended"`` (text, BOS by the model's rule), ``"none"``
            (text, without) or ``"given"`` (tokens, as they were); ``None``: not recorded.
    """

    model: str
    weights: str
    notation: str | None
    n_iterations: int | None
    n_prompts: int
    n_tokens: int
    tl_loops: str
    options: Mapping[str, Mapping[str, Any]]
    bos: str | None = None
