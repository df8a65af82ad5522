"""What an analysis reads of its prompts."""

import pytest
import torch

from tests.unit.upstream.test_inputs import EOS, TEXTS, looped
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
