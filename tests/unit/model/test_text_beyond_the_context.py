"""Text and tokens beyond the context: one rule, everywhere alike."""

import pytest
import torch

import tl_loops
from tests.models import tiny_config
from tests.unit.upstream.test_inputs import tokenizer
from tl_loops import LoopedTransformer, attribution, patching
from tl_loops.lens import coda_lens, logit_lens


def as_list(x):
    return [x] if isinstance(x, str) else list(x)


LONG = "a b c d e f " * 3
CALLS = {
    "forward": lambda m, x: m(x),
    "run_with_cache": lambda m, x: m.run_with_cache(x),
    "generate": lambda m, x: m.generate(x, 2, verbose=False),
    "coda_lens": lambda m, x: coda_lens(m, x),
    "logit_lens": lambda m, x: logit_lens(m, x),
    "measure": lambda m, x: tl_loops.measure(
        m, [x] if isinstance(x, str) else list(x), ["residual_norm"]
    ),
    "activation_patch": lambda m, x: patching.activation_patch(
        m, x, x, lambda logits: logits.sum()
    ),
    "attribution_patch": lambda m, x: attribution.attribution_patch(
        m, x, x, lambda logits: logits.sum()
    ),
}


@pytest.fixture(scope="module", params=["layer_norm", "ouro"])
def model(request):
    return LoopedTransformer(tiny_config(request.param, n_ctx=8), tokenizer=tokenizer()).eval()


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_what_does_not_fit_the_context_is_refused(model, call, tokens):
    given = model.to_tokens(LONG, truncate=False) if tokens else LONG
    with pytest.raises(ValueError, match=r"context .*n_ctx=8"):
        CALLS[call](model, given)


def test_the_first_part_is_had_by_asking_for_it(model):
    assert model(model.to_tokens(LONG)).shape[1] == 8


def test_a_key_value_cache_counts(model):
    tokens = model.to_tokens(LONG)
    past = model.make_kv_cache()
    model(tokens[:, :6], past_kv_cache=past)
    with pytest.raises(ValueError, match="3 tokens after 6 do not fit"):
        model(tokens[:, 5:], past_kv_cache=past)


def test_generation_says_so_before_it_starts(model):
    tokens = model.to_tokens("a b c")
    settings = dict(do_sample=False, stop_at_eos=False, verbose=False)
    assert model.generate(tokens, max_new_tokens=5, **settings).shape == torch.Size([1, 9])
    with pytest.raises(ValueError, match="do not fit the context"):
        model.generate(tokens, max_new_tokens=6, **settings)
