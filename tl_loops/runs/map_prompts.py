"""Any function of a prompt over many prompts: in shards, kept in a file, resumed."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.layout.model import Model
from tl_loops.runs.identity import identity_of, tensors_fingerprint
from tl_loops.runs.in_batches import Batch, Run, Split, run_in_batches
from tl_loops.runs.shards import Shards
from tl_loops.upstream import Prompts, left_as_it_was

_RESULT = "result"


@checked
@left_as_it_was
def map_prompts(
    model: Model,
    function: Callable[[Any], Tensor],
    prompts: Prompts,
    what: str,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    shard: Shards = None,
    progress: bool = True,
) -> list[Tensor | None]:
    """What a function gives for each prompt (or pair of prompts), such as a grid or an attribution.

    Args:
        model: What the function runs.
        function: Of one prompt; gives a tensor. Nothing of its graph is kept.
        prompts: Texts, tensors, or tuples, lists and dictionaries of these and of numbers.
        what: Names the function and its options. A file is known by it, since it cannot know the
            function itself: give another name when you change the function.
        checkpoint: A file to which every result is added once it is there, as for
            :func:`tl_loops.measure`.
        shard: Which prompts are done here, as for :func:`tl_loops.measure`;
            :func:`tl_loops.merge_shards` puts the checkpoints of all shards together.
        progress: Whether to show a progress bar.

    Returns:
        One tensor a prompt, in their order; ``None`` for prompts of other shards.

    Raises:
        TypeError: The function gives no tensor, or a prompt is of another type.
        ValueError: There is no prompt, the shard does not exist, or no file keeps it.
        CheckpointError: The checkpoint is damaged or of another run, or the run can be neither
            resumed nor cut into shards.
    """
    items = list(prompts)
    if not items:
        raise ValueError("prompts is empty: there is nothing to run")
    split = Split(shard, checkpoint)
    split.check(model)
    device = next(model.parameters()).device
    results: list[Tensor | None] = [None] * len(items)

    def compute(number: int) -> Batch:
        result = function(items[number])
        if not isinstance(result, Tensor):
            raise TypeError(
                f"the function must give a tensor, got {type(result).__name__} for prompt {number}"
            )
        return {_RESULT: result.detach()}

    def take(number: int, batch: Batch) -> None:
        results[number] = batch[_RESULT].to(device)

    def identify() -> dict[str, Any]:
        digest = hashlib.blake2b(digest_size=16)
        for number, item in enumerate(items):
            _add(digest, item, f"prompt {number}")
        return identity_of(model, prompts=digest.hexdigest(), what=what)

    run_in_batches(Run("map", [1] * len(items), identify), compute, take, split, progress)
    return results


def _add(digest: Any, item: Any, where: str) -> None:
    """Add a prompt to a hash, with its type and the lengths of what it holds."""
    if isinstance(item, Tensor):
        digest.update(f"tensor {tensors_fingerprint([item])}".encode())
    elif item is None or isinstance(item, (str, bool, int, float)):
        digest.update(f"{type(item).__name__} {item!r};".encode())
    elif isinstance(item, Mapping):
        digest.update(f"mapping {len(item)};".encode())
        for name, value in item.items():
            _add(digest, name, where)
            _add(digest, value, where)
    elif isinstance(item, Sequence):
        digest.update(f"sequence {len(item)};".encode())
        for value in item:
            _add(digest, value, where)
    else:
        raise TypeError(
            f"{where} is or holds a {type(item).__name__}, expected text, tensors and numbers, or "
            "tuples, lists and dictionaries of these"
        )
