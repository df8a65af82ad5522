"""What a training run tells: one row per step, and its evaluations by number of iterations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tl_loops.arguments import checked

if TYPE_CHECKING:
    import pandas

COLUMNS = (
    "step",
    "n_iterations",
    "loss",
    "growth",
    "settling",
    "jacobian",
    "gradient_norm",
    "learning_rate",
    "tokens_per_second",
)


@dataclass(eq=False)
class TrainingLog:
    """The numbers of a training run, a resumed one's from its very start.

    Attributes:
        steps: One row per step: the columns of ``COLUMNS``. Losses are in nats, penalties with
            their weights; NaN where a step had none.
        state_gradients: For each step, the norm of the loss's gradient with respect to the state
            that leaves each iteration [iteration], NaN at iterations without gradient.
        evaluations: Pairs of the number of steps done and the loss of the evaluation's contexts
            by number of iterations.
    """

    steps: list[tuple[float, ...]] = field(default_factory=list)
    state_gradients: list[list[float]] = field(default_factory=list)
    evaluations: list[tuple[int, dict[int, float]]] = field(default_factory=list)

    def add(self, row: Mapping[str, float | int], state_gradients: Sequence[float]) -> None:
        """Add a step; columns that are missing become NaN."""
        self.steps.append(tuple(float(row.get(name, math.nan)) for name in COLUMNS))
        self.state_gradients.append(list(state_gradients))

    @checked
    def column(self, name: str) -> list[float]:
        """One column of ``steps``.

        Raises:
            ValueError: There is no such column.
        """
        if name not in COLUMNS:
            raise ValueError(f"there is no column {name!r}; known: {', '.join(COLUMNS)}")
        at = COLUMNS.index(name)
        return [row[at] for row in self.steps]

    def to_frame(self) -> "pandas.DataFrame":
        """The steps as a table with the columns of ``COLUMNS``."""
        import pandas

        table = pandas.DataFrame(self.steps, columns=list(COLUMNS))
        return table.astype({"step": int, "n_iterations": int})

    def evaluation_frame(self) -> "pandas.DataFrame":
        """The evaluations as a table: step, n_iterations, loss."""
        import pandas

        rows = [(step, n, loss) for step, by_n in self.evaluations for n, loss in by_n.items()]
        return pandas.DataFrame(rows, columns=["step", "n_iterations", "loss"])

    def tensors(self) -> dict[str, Tensor]:
        """The log as float64 tensors, for a checkpoint."""
        widest = max((len(row) for row in self.state_gradients), default=0)
        padded = [row + [math.nan] * (widest - len(row)) for row in self.state_gradients]
        evaluated = [(step, n, loss) for step, by_n in self.evaluations for n, loss in by_n.items()]
        return {
            "steps": _table(self.steps, len(COLUMNS)),
            "state_gradients": _table(padded, widest),
            "evaluations": _table(evaluated, 3),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "TrainingLog":
        """The log that :meth:`tensors` wrote."""
        steps = [tuple(row) for row in tensors["steps"].tolist()]
        at = COLUMNS.index("n_iterations")
        gradients = [
            row[: int(step[at])]
            for step, row in zip(steps, tensors["state_gradients"].tolist(), strict=True)
        ]
        evaluations: dict[int, dict[int, float]] = {}
        for step, n, loss in tensors["evaluations"].tolist():
            evaluations.setdefault(int(step), {})[int(n)] = loss
        return cls(steps, gradients, list(evaluations.items()))


def _table(rows: Sequence[Sequence[float | int]], n_columns: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), n_columns)
