"""Weights with a row of their own for every iteration: how many rows, and what they limit."""

from collections.abc import Iterable

from tl_loops.errors import ConfigError
from tl_loops.mechanisms.mechanism import Config, Mechanism, Setting

MAX_ITERATIONS = Setting(
    "max_iterations",
    int | None,
    None,
    "Iterations that learned step embeddings, the router and the hyper-connections have weights "
    "for; ``None``: ``n_iterations``.",
    at_least=1,
)


def n_rows(cfg: Config) -> int:
    """The number of rows of weights that have one for every iteration."""
    return cfg.max_iterations or cfg.n_iterations


def check_rows(cfg: Config, active: Iterable[Mechanism], n_iterations: int) -> None:
    """Raise on a number of iterations that the weights of single iterations do not cover.

    Raises:
        ConfigError: There are more iterations than weights.
    """
    limit = cfg.max_iterations
    if limit is None:
        return
    if limit < 1:
        raise ConfigError(f"max_iterations must be at least 1, got {limit}")
    if n_iterations > limit and any(mechanism.has_rows(cfg) for mechanism in active):
        raise ConfigError(
            f"n_iterations={n_iterations} is more than the max_iterations={limit} that this model "
            "has weights for"
        )
