"""Truncated backpropagation: the numbers of the run stay, the gradients are those of a cut."""

import pytest
import torch

from tests.closeness import assert_close
from tests.unit.training.small import counting_corpus, small_model
from tl_loops import LoopedSemanticsError
from tl_loops.model.start import start_run
from tl_loops.training import exit_logits, iteration_gradients, token_losses, training_pass

TOKENS = counting_corpus(24).view(2, 12)


def gradients(model, loss):
    named = dict(model.physical_named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("n_gradient", [None, 1, 2, 3, 9])
def test_the_output_is_the_models_own(n_gradient):
    model = small_model()
    run = training_pass(model, TOKENS, 3, n_gradient)
    assert torch.equal(run.logits, model(TOKENS))
    assert run.first == max(0, 3 - (n_gradient or 3))
    assert len(run.states) == 3 - run.first
    assert torch.is_grad_enabled()


def test_without_a_cut_the_gradient_is_the_whole_one():
    model = small_model()
    run = training_pass(model, TOKENS, 3)
    expected = gradients(model, token_losses(model(TOKENS), TOKENS).mean())
    found = gradients(model, token_losses(run.logits, TOKENS).mean())
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def test_a_cut_is_a_start_from_a_detached_state():
    model = small_model()
    with torch.no_grad():
        _, cache = model.run_with_cache(TOKENS)
    prelude = model.blocks[0](model.embed(TOKENS), _context(model))
    resid = model(cache["iter.2.hook_state_in"].clone(), start_at_iteration=2, injection=prelude)
    expected = gradients(model, token_losses(resid, TOKENS).mean())
    run = training_pass(model, TOKENS, 3, n_gradient=1)
    found = gradients(model, token_losses(run.logits, TOKENS).mean())
    assert found["prelude.0.attn.W_Q"] is not None, "the prelude is trained through the injection"
    for name, gradient in found.items():
        assert_close(gradient, expected[name])


def _context(model):
    return start_run(model, TOKENS).run.context


def test_exits_are_what_fewer_iterations_give():
    model = small_model()
    run = training_pass(model, TOKENS, 3)
    for t, logits in enumerate(exit_logits(model, TOKENS, run)):
        assert_close(logits, model(TOKENS, n_iterations=t + 1))


def test_iteration_gradients_sum_to_the_gradient_of_training():
    model = small_model()
    found = iteration_gradients(model, TOKENS)
    total = gradients(model, token_losses(model(TOKENS), TOKENS).mean())
    core = [
        total[f"core.{layer}.{name}"].flatten()
        for layer in range(2)
        for name, _ in model.blocks[1 + layer].named_parameters()
    ]
    assert found.shape[0] == 3
    assert_close(found.sum(0), torch.cat(core))
    assert all(p.grad is None for p in model.parameters())


def test_iteration_gradients_are_those_of_weights_of_their_own():
    """Against a finite difference of the weights of one pass alone."""
    model = small_model().double()
    found = iteration_gradients(model, TOKENS)
    step = torch.randn(found.shape[1], generator=torch.Generator().manual_seed(1)).double()

    def loss(size):
        names = [
            (f"blocks.{index}.{name}", p)
            for index in model.layout.iteration_blocks(1)
            for name, p in model.blocks[index].named_parameters()
        ]
        moved, at = {}, 0
        for name, p in names:
            moved[name] = p + size * step[at : at + p.numel()].view_as(p)
            at += p.numel()
        logits = torch.func.functional_call(model, moved, (TOKENS,), tie_weights=False)
        return token_losses(logits, TOKENS).mean()

    with torch.no_grad():
        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert float(found[1] @ step) == pytest.approx(float(slope), rel=1e-5)


def test_a_loop_that_carries_more_than_its_state_is_not_cut():
    model = small_model(halting="act", exit_gate=True, injection=None, initial_state="embed")
    assert not model.cfg.state_is_whole
    with pytest.raises(LoopedSemanticsError, match="carries more than its state"):
        training_pass(model, TOKENS, 3, n_gradient=1)
    assert torch.equal(training_pass(model, TOKENS, 3).logits, model(TOKENS))
