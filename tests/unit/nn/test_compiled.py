"""A forward pass by torch.compile: the same numbers, and none where there are none."""

import jaxtyping
import pytest
import torch

from tests.models import tiny_model


@pytest.fixture(autouse=True)
def shapes_are_not_checked():
    """The tensors of a trace have no shapes that jaxtyping could read."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
    torch._dynamo.reset()


def test_a_compiled_forward_pass_gives_the_same_logits():
    model = tiny_model("ouro")
    tokens = torch.arange(5)[None] % model.cfg.d_vocab
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        plain, fast = model(tokens), compiled(tokens)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_does_not_pass_the_fused_kernel():
    model = tiny_model("ouro")
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        model.blocks[0].attn.W_Q[0, 0, 0] = float("inf")
        plain = model(tokens)
        fast = torch.compile(model, backend="eager")(tokens)
    assert not plain.isfinite().all()
    assert not fast[~plain.isfinite()].isfinite().any()
