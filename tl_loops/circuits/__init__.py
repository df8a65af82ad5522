"""Circuits across iterations: which edges between components of which iterations a task needs.

``score`` the edges, ``prune`` to a circuit, and test it by running it: ``faithfulness``,
``completeness``, ``minimality``. (How weights read as circuits, OV and QK, is the model's matter.)
"""

from tl_loops.circuits.circuit import Circuit
from tl_loops.circuits.comparison import (
    Faithfulness,
    PartEffects,
    completeness,
    faithfulness,
    faithfulness_curve,
    minimality,
)
from tl_loops.circuits.graph import EdgeGraph
from tl_loops.circuits.pruning import prune
from tl_loops.circuits.scores import EdgeScores, score

__all__ = [
    "Circuit",
    "EdgeGraph",
    "EdgeScores",
    "Faithfulness",
    "PartEffects",
    "completeness",
    "faithfulness",
    "faithfulness_curve",
    "minimality",
    "prune",
    "score",
]
