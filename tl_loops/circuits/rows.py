"""Which receivers of a pruned graph can share one copy of the residual stream."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_loops.circuits.circuit import Circuit


@dataclass(frozen=True, eq=False)
class CircuitRows:
    """The copies of the residual stream that a circuit needs.

    Every component sees the outputs of the senders that have an edge to it, and the rest in the
    place of all others. Components that see the same share a copy.

    Attributes:
        sees: Whether the row sees a sender's own output, [row, sender].
        row_of: The row whose stream a receiver reads, [receiver].
    """

    sees: Bool[Tensor, "row sender"]
    row_of: Int[Tensor, "receiver"]

    @property
    def n_rows(self) -> int:
        """Number of copies."""
        return self.sees.shape[0]

    @classmethod
    def of(cls, circuit: Circuit) -> "CircuitRows":
        """As few rows as a first fit finds: receivers of the order of the run, one after another.

        A receiver that cannot reach the logits gets any row: nothing reads what it makes.
        """
        graph = circuit.graph
        _, live = circuit.live()
        n_before = graph.exists.sum(0).tolist()  # senders come in the order of the run
        columns: list[Tensor] = []
        decided: list[int] = []
        row_of = torch.zeros(len(graph.receivers), dtype=torch.int64)
        for r in range(len(graph.receivers)):
            if not live[r]:
                continue
            wanted, n = circuit.kept[:, r], n_before[r]
            for row, column in enumerate(columns):
                if torch.equal(column[: decided[row]], wanted[: decided[row]]):
                    break
            else:
                row = len(columns)
                columns.append(torch.zeros_like(wanted))
                decided.append(0)
            columns[row] = wanted.clone()
            decided[row] = n
            row_of[r] = row
        return cls(torch.stack(columns), row_of)
