"""What a profile was measured on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Provenance:
    """What a profile was measured on.

    Attributes:
        model: ``cfg.model_name``.
        weights: Fingerprint of weights and architecture. It is computed when it is first read,
            compared or saved; ``None`` where the model's weights had changed by then, or a model
            of more than 256 MiB had been deleted.
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
    weights: str | None
    notation: str | None
    n_iterations: int | None
    n_prompts: int
    n_tokens: int
    tl_loops: str
    options: Mapping[str, Mapping[str, Any]]
    bos: str | None = None

    @classmethod
    def pending(cls, weights: Callable[[], str | None], **fields: Any) -> "Provenance":
        """One whose weights are asked for when they are first read.

        Args:
            weights: Gives their fingerprint.
            **fields: All other attributes.
        """
        made = cls(weights=None, **fields)
        made.__dict__["_pending"] = weights
        return made

    def __getattribute__(self, name: str) -> Any:
        if name == "weights":
            pending = self.__dict__.pop("_pending", None)
            if pending is not None:
                self.__dict__["weights"] = pending()
        return super().__getattribute__(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weights": self.weights, "_pending": None}
