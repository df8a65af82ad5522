"""Optimisers and helpers of torch that take every parameter for contiguous."""

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from tests.models import tiny_model, tiny_tokens
from tl_loops.model.ties import check_ties

FAMILIES = ["huginn", "ouro", "retrofitted"]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_laid_out_anew_are_the_same_model(family):
    model, tokens = tiny_model(family), tiny_tokens()
    before = list(model.parameters())
    expected = model.double()(tokens)
    assert model.make_contiguous() is model
    assert all(x is y for x, y in zip(model.parameters(), before, strict=True))
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    check_ties(model)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-12, atol=1e-12)
    vector = parameters_to_vector(model.parameters())
    vector_to_parameters(1.5 * vector, model.parameters())
    assert torch.equal(parameters_to_vector(model.parameters()), 1.5 * vector)
    check_ties(model)


def test_lbfgs_trains_a_looped_model():
    model, tokens = tiny_model("huginn").make_contiguous(), tiny_tokens()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn="strong_wolfe")
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = model(tokens, return_type="loss")
        loss.backward()
        losses.append(float(loss))
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        after = float(model(tokens, return_type="loss"))
    assert after < 0.9 * losses[0]
    check_ties(model)
