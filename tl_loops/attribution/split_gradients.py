"""Gradients with respect to shared weights, split by iteration: norms, cosines, Gram matrices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from tl_loops.errors import did_you_mean
from tl_loops.metrics.padding import statistic_dtype

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class IterationGradients:
    """The gradient of one scalar with respect to weights, through each iteration alone.

    Attributes:
        by_iteration: φ_t by physical name, [iteration, *weight].
        outside: What a weight gets from uses outside of the iterations, for those that have such.
    """

    by_iteration: dict[str, Tensor]
    outside: dict[str, Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        """Physical names of the weights."""
        return tuple(self.by_iteration)

    @property
    def n_iterations(self) -> int:
        """Number of iterations."""
        return next(iter(self.by_iteration.values())).shape[0]

    def total(self) -> dict[str, Tensor]:
        """The plain gradient of each weight: the sum over iterations, and what is outside."""
        return {
            name: rows.sum(0) + self.outside[name] if name in self.outside else rows.sum(0)
            for name, rows in self.by_iteration.items()
        }

    def gram(self, weights: Sequence[str] | None = None) -> Float[Tensor, "iteration iteration"]:
        """⟨φ_s, φ_t⟩ for all pairs of iterations, summed over weights.

        Args:
            weights: Physical names; ``None``: all.

        Returns:
            In float32, float64 where the gradients are. Its sum is the squared length of the part
            of the plain gradient that the iterations give.

        Raises:
            ValueError: A name is not known.
        """
        rows = [_flat(self.by_iteration[name]) for name in self._named(weights)]
        return torch.stack([x @ x.T for x in rows]).sum(0)

    def norms(self, weights: Sequence[str] | None = None) -> Float[Tensor, "iteration"]:
        """‖φ_t‖ of each iteration, over all weights or some; as :meth:`gram`."""
        return self.gram(weights).diagonal().sqrt()

    def cosines(self, weights: Sequence[str] | None = None) -> Float[Tensor, "iteration iteration"]:
        """Cosine of φ_s and φ_t for all pairs of iterations; NaN where one is zero.

        Near 1: the iterations pull the weights the same way. Below 0: they pull against each
        other. As :meth:`gram`.
        """
        gram = self.gram(weights)
        length = gram.diagonal().sqrt()
        return (gram / (length[:, None] * length)).clamp(-1.0, 1.0)

    def to_frame(self) -> "pandas.DataFrame":
        """One row a weight and iteration: ‖φ_t‖, and its cosine to the sum over iterations."""
        import pandas

        rows = []
        for name in self.names:
            gram = self.gram([name])
            norm, along = gram.diagonal().sqrt(), gram.sum(-1)
            cosine = along / (norm * gram.sum().sqrt())
            for t in range(self.n_iterations):
                rows.append((name, t, float(norm[t]), float(cosine[t])))
        return pandas.DataFrame(rows, columns=["weight", "iteration", "norm", "cosine_to_sum"])

    def _named(self, weights: Sequence[str] | None) -> tuple[str, ...]:
        if weights is None:
            return self.names
        for name in weights:
            if name not in self.by_iteration:
                raise ValueError(f"no weight {name!r} is here: {did_you_mean(name, self.names)}")
        return tuple(weights)

    def __repr__(self) -> str:
        norms = ", ".join(f"{norm:.3g}" for norm in self.norms().tolist())
        return f"IterationGradients({len(self.names)} weights; norms by iteration {norms})"


def _flat(rows: Tensor) -> Float[Tensor, "iteration entry"]:
    return rows.flatten(1).to(statistic_dtype(rows))
