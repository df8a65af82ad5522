"""Where each sampled token left the loop, by generate and by generate_stream."""

import inspect

import pytest
import torch

from tests.models import tiny_model, tiny_tokens
from tl_loops import LoopedSemanticsError
from tl_loops.upstream import HookedTransformer

torch.set_num_threads(1)
TOKENS = tiny_tokens(3, 6)
OPTIONS = dict(max_new_tokens=7, do_sample=False, stop_at_eos=False, verbose=False)


@pytest.fixture(scope="module")
def model():
    return tiny_model("ouro", initializer_range=0.15)


@pytest.mark.parametrize("cached", [True, False])
def test_exits_are_those_whose_logits_gave_the_token(model, cached):
    options = dict(OPTIONS, exit_threshold=0.8, use_past_kv_cache=cached)
    tokens, exits = model.generate(TOKENS, return_type="tokens", return_exits=True, **options)
    assert torch.equal(tokens, model.generate(TOKENS, return_type="tokens", **options))
    assert exits.shape == (3, 7) and len(exits.unique()) > 1
    for step in range(7):
        seen = tokens[:, : 6 + step]
        for row in range(3):
            logits = model(seen[row : row + 1], exit_at=int(exits[row, step]))
            again = model(seen[row : row + 1], exit_threshold=0.8)
            torch.testing.assert_close(logits[:, -1], again[:, -1], rtol=1e-4, atol=1e-4)
            assert logits[0, -1].argmax() == tokens[row, 6 + step]


def test_streamed_exits_are_those_of_generate(model):
    options = dict(OPTIONS, exit_threshold=0.8, return_exits=True)
    tokens, exits = model.generate(TOKENS, return_type="tokens", **options)
    pieces = list(model.generate_stream(TOKENS, max_tokens_per_yield=4, **options))
    assert torch.equal(torch.cat([piece for piece, _ in pieces], 1), tokens)
    left = torch.cat([left for _, left in pieces], 1)
    assert (left[:, :6] == -1).all() and torch.equal(left[:, 6:], exits)


def test_without_a_threshold_it_is_one_iteration(model):
    _, exits = model.generate(TOKENS, return_exits=True, **OPTIONS)
    assert (exits == 3).all()
    _, exits = model.generate(TOKENS, return_exits=True, n_iterations=2, **OPTIONS)
    assert (exits == 1).all()
    _, exits = model.generate(TOKENS, return_exits=True, exit_at=1, **OPTIONS)
    assert (exits == 1).all()


def test_sequences_that_have_ended_have_no_exit(model):
    expected = model.generate(TOKENS, return_type="tokens", **OPTIONS)
    end = int(expected[0, 7])
    options = dict(OPTIONS, stop_at_eos=True, eos_token_id=end)
    tokens, exits = model.generate(TOKENS, return_type="tokens", return_exits=True, **options)
    first = (tokens[0, 6:] == end).int().argmax()
    assert (exits[0, : first + 1] == 3).all() and (exits[0, first + 1 :] == -1).all()


def test_no_one_iteration(model):
    with pytest.raises(LoopedSemanticsError, match="read from all states"):
        model.generate(TOKENS, return_exits=True, weighted_exit=True, **OPTIONS)
    halting = tiny_model("act")
    with pytest.raises(LoopedSemanticsError, match="halting='act'"):
        halting.generate(TOKENS, return_exits=True, **OPTIONS)


def test_the_arguments_of_transformer_lens_keep_their_places(model):
    for name in ("generate", "generate_stream"):
        parameters = inspect.signature(getattr(type(model), name)).parameters
        theirs = [
            parameter.name
            for parameter in inspect.signature(getattr(HookedTransformer, name)).parameters.values()
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        ]
        assert list(parameters)[: len(theirs)] == theirs
        assert parameters["return_exits"].kind is inspect.Parameter.KEYWORD_ONLY
