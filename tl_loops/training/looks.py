"""What a script looks at while a model trains, kept in the log and in the checkpoint."""

import json
from collections.abc import Callable
from typing import Any

import torch

from tl_loops.layout.model import Model
from tl_loops.training.evaluation import as_evaluated
from tl_loops.training.log import TrainingLog


@torch.no_grad()
def look_at(model: Model, look: Callable[[int], Any], n_done: int, log: TrainingLog) -> None:
    """Call a script's look after a step, and add what it gives to the log.

    It is kept as JSON gives it back, so that a run that was stopped has the log of one that was
    not. The random numbers of a look depend on the step alone and leave torch's as they were.

    Raises:
        TypeError: It gives what JSON has no type for.
    """
    device = next(model.parameters()).device
    with as_evaluated(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(n_done)
        found = look(n_done)
    if found is None:
        return
    try:
        log.looks.append((n_done, json.loads(json.dumps(found))))
    except TypeError as error:
        raise TypeError(
            f"look gave {type(found).__name__} after step {n_done} that no checkpoint holds "
            f"({error}): give numbers, text, lists and dicts of them, or None"
        ) from error
