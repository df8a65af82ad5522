"""What an analysis reads of its prompts."""

import pytest
import torch

from tests.unit.upstream.test_inputs import EOS, TEXTS, looped
from tl_loops.attribution import attribution_patch
from tl_loops.patching import activation_patch
from tl_loops.runs.inputs import lens_inputs


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_token_is_read_though_it_has_the_id_of_padding(side):
    inputs = lens_inputs(looped(side), "a b <eos>", "last")
    assert inputs.attention_mask is None
    assert inputs.tokens[0, inputs.positions[0]].tolist() == [EOS]


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_texts_last_real_token_is_read(side):
    inputs = lens_inputs(looped(side), TEXTS, "last")
    read = inputs.tokens.gather(1, inputs.positions)
    assert torch.equal(read, torch.full((2, 1), 4))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_patched_runs_of_text_mask_its_padding_and_nothing_else(side):
    """The padding token is also the end of a text; the second text holds a real one."""
    model = looped(side)
    _, clean = model.run_with_cache(TEXTS, padding_side=side)
    expected = model(TEXTS, padding_side=side)
    seen = []

    def metric(logits):
        seen.append(logits)
        return logits.mean()

    activation_patch(model, TEXTS, clean, metric, "resid_pre", ("block",), progress=False)
    for logits in seen[1:]:  # The first call is on random numbers.
        torch.testing.assert_close(logits, expected)
    effects = attribution_patch(model, TEXTS, clean, lambda logits: logits.mean(), axes=("block",))
    assert effects.abs().max() < 1e-6
