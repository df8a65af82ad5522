"""What a training run tells: one row per step, and its evaluations by number of iterations."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.training.evaluation import Evaluation

if TYPE_CHECKING:
    import pandas

COLUMNS = (
    "step",
    "n_iterations",
    "loss",
    "accuracy",
    "growth",
    "settling",
    "jacobian",
    "gradient_norm",
    "learning_rate",
    "tokens_per_second",
)
_EVALUATED = ("step", "n_iterations", "loss", "accuracy")


@dataclass(eq=False)
class TrainingLog:
    """The numbers of a training run, a resumed one's from its very start.

    Attributes:
        steps: One row per step: the columns of ``COLUMNS``. Losses are in nats, penalties with
            their weights; NaN where a step had none. The accuracy is the share of the trained
            positions whose likeliest token after the last iteration is the target.
        state_gradients: For each step, the norm of the loss's gradient with respect to the state
            that leaves each iteration [iteration], NaN at iterations without gradient.
        evaluations: Pairs of the number of steps done and the loss of the evaluation's batches
            by number of iterations.
        accuracies: As ``evaluations``, of their accuracy, from 0 to 1.
        looks: Pairs of the number of steps done and what ``look`` gave there, in JSON's types.
    """

    steps: list[tuple[float, ...]] = field(default_factory=list)
    state_gradients: list[list[float]] = field(default_factory=list)
    evaluations: list[tuple[int, dict[int, float]]] = field(default_factory=list)
    accuracies: list[tuple[int, dict[int, float]]] = field(default_factory=list)
    looks: list[tuple[int, Any]] = field(default_factory=list)

    def add_evaluation(self, step: int, found: Mapping[int, Evaluation]) -> None:
        """Add an evaluation, after so many steps."""
        self.evaluations.append((step, {n: of.loss for n, of in found.items()}))
        self.accuracies.append((step, {n: of.accuracy for n, of in found.items()}))

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
        """The evaluations as a table: step, n_iterations, loss, accuracy."""
        import pandas

        return pandas.DataFrame(self._evaluated(), columns=list(_EVALUATED)).astype(
            {"step": int, "n_iterations": int}
        )

    def tensors(self) -> dict[str, Tensor]:
        """The log without its looks as float64 tensors, for a checkpoint."""
        widest = max((len(row) for row in self.state_gradients), default=0)
        padded = [row + [math.nan] * (widest - len(row)) for row in self.state_gradients]
        return {
            "steps": _table(self.steps, len(COLUMNS)),
            "state_gradients": _table(padded, widest),
            "evaluations": _table(self._evaluated(), len(_EVALUATED)),
        }

    def _evaluated(self) -> list[tuple[int | float, ...]]:
        """A row for each evaluation and number of iterations."""
        pairs = zip(self.evaluations, self.accuracies, strict=True)
        return [
            (step, n, loss, accuracy[n])
            for (step, by_n), (_, accuracy) in pairs
            for n, loss in by_n.items()
        ]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "TrainingLog":
        """The log that :meth:`tensors` wrote."""
        steps = [tuple(row) for row in tensors["steps"].tolist()]
        at = COLUMNS.index("n_iterations")
        gradients = [
            row[: int(step[at])]
            for step, row in zip(steps, tensors["state_gradients"].tolist(), strict=True)
        ]
        losses: dict[int, dict[int, float]] = {}
        accuracies: dict[int, dict[int, float]] = {}
        for step, n, loss, accuracy in tensors["evaluations"].tolist():
            losses.setdefault(int(step), {})[int(n)] = loss
            accuracies.setdefault(int(step), {})[int(n)] = accuracy
        return cls(steps, gradients, list(losses.items()), list(accuracies.items()))


def _table(rows: Sequence[Sequence[float | int]], n_columns: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), n_columns)
