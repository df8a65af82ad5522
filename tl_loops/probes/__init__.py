"""What can be read from the states at which iteration: linear probes for a label, directions.

:func:`gather_states` runs the model once over prompts. Probes and directions are fitted to what it
gives, for any number of labels, and tested on prompts that they have not seen.
"""

from tl_loops.probes.directions import ConceptDirections, concept_directions
from tl_loops.probes.pairs import FlipTest, PairProbes, flip_test, pair_probes
from tl_loops.probes.states import PromptStates, gather_states
from tl_loops.probes.task import TaskProbes, task_probes

__all__ = [
    "ConceptDirections",
    "FlipTest",
    "PairProbes",
    "PromptStates",
    "TaskProbes",
    "concept_directions",
    "flip_test",
    "gather_states",
    "pair_probes",
    "task_probes",
]
