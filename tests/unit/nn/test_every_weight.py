"""Every weight of a model, and every zero that stands for a bias, has its part in the logits."""

import pytest
import torch

from tests.models import ARCHITECTURES, MECHANISMS, STACKS, VARIATIONS, any_model, tiny_tokens

READ_FROM_OUTSIDE = ("exit_gate.", "halt_head.")
"""What only exits read. A loop that halts by its gate reads it in every pass, too."""


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MECHANISMS, *STACKS, *VARIATIONS])
def test_an_edit_in_place_counts(name: str):
    few = {} if name in STACKS else {"n_iterations": 2}  # those of stacks come in cycles
    model = any_model(name, **few)
    tokens = tiny_tokens(batch=1, pos=5)
    halts = getattr(model.cfg, "halting", None) == "act"
    ignored, seen = [], set()
    with torch.no_grad():
        before = model(tokens)
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if id(tensor) in seen or not tensor.is_floating_point():
                continue
            seen.add(id(tensor))
            held = tensor.clone()
            # Every second number: an equal shift of all keys or of a whole row may cancel.
            half = (torch.arange(tensor.numel()) % 2 == 0).view_as(tensor)
            tensor += 0.5 * half
            if torch.equal(model(tokens), before):
                ignored.append(key)
            tensor.copy_(held)
        torch.testing.assert_close(model(tokens), before)
    if not halts:
        ignored = [key for key in ignored if not key.startswith(READ_FROM_OUTSIDE)]
    assert not ignored and len(seen) > 5
