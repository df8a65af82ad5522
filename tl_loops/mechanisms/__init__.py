"""The mechanisms of loops: one file each, and the list that everything else goes over.

To add one, write a module like those beside this one and put its object into :data:`MECHANISMS`.
"""

from tl_loops.layout.names import declare
from tl_loops.mechanisms.attention_gate import ATTENTION_GATE
from tl_loops.mechanisms.coda_input import CODA_INPUT
from tl_loops.mechanisms.exit_gate import EXIT_GATE
from tl_loops.mechanisms.first_pass import FIRST_PASS
from tl_loops.mechanisms.halting import HALTING
from tl_loops.mechanisms.hyper_connections import HYPER_CONNECTIONS
from tl_loops.mechanisms.initial_state import INITIAL_STATE
from tl_loops.mechanisms.injection import INJECTION
from tl_loops.mechanisms.inner_norms import INNER_NORMS
from tl_loops.mechanisms.inputs import EXTRA_TOKENS, PREFIX_MASK
from tl_loops.mechanisms.kv_sharing import KV_SHARING
from tl_loops.mechanisms.mechanism import Mechanism
from tl_loops.mechanisms.residual_rate import RESIDUAL_RATE
from tl_loops.mechanisms.router import ROUTER
from tl_loops.mechanisms.scales import SCALES
from tl_loops.mechanisms.stacks import STACKS
from tl_loops.mechanisms.state_gate import STATE_GATE
from tl_loops.mechanisms.step_embedding import STEP_EMBEDDING
from tl_loops.mechanisms.time_conditioning import TIME_CONDITIONING
from tl_loops.mechanisms.value_embeddings import VALUE_EMBEDDINGS
from tl_loops.mechanisms.windows import WINDOWS

MECHANISMS: tuple[Mechanism, ...] = (
    EXTRA_TOKENS,
    INITIAL_STATE,
    INJECTION,
    STACKS,
    STEP_EMBEDDING,
    ROUTER,
    HYPER_CONNECTIONS,
    TIME_CONDITIONING,
    STATE_GATE,
    CODA_INPUT,
    EXIT_GATE,
    HALTING,
    FIRST_PASS,
    RESIDUAL_RATE,
    SCALES,
    ATTENTION_GATE,
    INNER_NORMS,
    WINDOWS,
    VALUE_EMBEDDINGS,
    PREFIX_MASK,
    KV_SHARING,
)
"""All mechanisms, from the core outwards.

A run begins and enters an iteration in reverse order and leaves it in this order. It is the order
of the weights, too.
"""

for _mechanism in MECHANISMS:
    declare(*_mechanism.points)

__all__ = ["MECHANISMS", "Mechanism"]
