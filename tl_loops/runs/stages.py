"""Where in the unrolled stack a hook point fires, when the stack is run block by block.

A stage of a run goes from one block to another. What lies between two blocks (the end of an
iteration, the norm and the injection that begin the next one, the norm before the coda) belongs to
the stage of the block before it; what precedes block 0 to the stage of block 0.
"""

from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.names import spec_of


def stage_of(name: str, layout: LoopLayout | None, n_layers: int) -> int:
    """The block at which a run must start, at the latest, so that a hook point fires.

    Args:
        name: Canonical hook name.
        layout: Of the model; ``None`` for a plain HookedTransformer.
        n_layers: Unrolled depth.
    """
    kind, _, rest = name.partition(".")
    if kind == "blocks":
        return int(rest.split(".")[0])
    spec = spec_of(name)
    moment = "end" if spec is None else spec.moment
    if moment == "start" or name == "hook_tokens":
        return 0
    if layout is None:
        return n_layers - 1
    if kind == "iter":
        blocks = layout.iteration_blocks(int(rest.split(".")[0]))
        first = {"before": max(blocks[0] - 1, 0), "first": blocks[0]}
        return first.get(moment, blocks[-1])
    if moment == "loop":
        return crossing_block(layout)
    return layout.coda_start - 1 if moment == "coda" else n_layers - 1


def crossing_block(layout: LoopLayout | None) -> int:
    """The block in whose stage the loop begins: from its end on, e and the state are fixed."""
    return max(layout.core_start - 1, 0) if layout is not None else 0
