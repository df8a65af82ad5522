"""Calls that people make and that used to end inside: one sentence each, or the right number."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.models import tiny_config, tiny_model, tiny_tokens
from tests.unit.loading.files_of import FIXTURES
from tl_loops import HookedTransformer, LoopedTransformer

TINY = "tl-loops-tiny"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(torch_dtype=torch.float16), r"'torch_dtype': pass dtype="),
        (dict(trust_remote_code=True), "no remote code runs"),
        (dict(iterations=3), "n_iterations"),
        (dict(device_map="auto"), "device="),
        (dict(n_iteration=3), "did you mean n_iterations"),
    ],
)
@pytest.mark.parametrize("cls", [LoopedTransformer, HookedTransformer])
def test_arguments_of_other_libraries_are_named(cls, arguments, says):
    with pytest.raises(TypeError, match=says):
        cls.from_pretrained(TINY, **arguments)


@pytest.mark.parametrize("bad", [2.5, "4", True, 0, -1])
def test_numbers_of_iterations_that_are_none(bad):
    model, tokens = tiny_model("ouro"), tiny_tokens()
    # With run-time type checks the annotation speaks first, and names the argument, too.
    says = r"n_iterations must be (an integer|an integer of at least 1|at least 1), got"
    says += r"|parameter '?n_iterations"
    with pytest.raises((ValueError, TypeError), match=says):
        model(tokens, n_iterations=bad)
    with pytest.raises((ValueError, TypeError), match=says):
        LoopedTransformer.from_pretrained(TINY, n_iterations=bad)


@pytest.mark.parametrize("bad", ["0.5", True, 1.5, float("nan")])
def test_thresholds_that_are_none(bad):
    model, tokens = tiny_model("ouro"), tiny_tokens()
    says = "exit_threshold is a probability|parameter '?exit_threshold"
    with pytest.raises((ValueError, TypeError), match=says):
        model(tokens, exit_threshold=bad)


def test_a_cache_key_that_is_none_is_answered_in_a_sentence():
    model, tokens = tiny_model("ouro"), tiny_tokens()
    _, cache = model.run_with_cache(tokens)
    with pytest.raises(KeyError, match="did you mean state_"):
        cache["state", 2]
    t, layer = np.unravel_index(3, (3, 2))
    assert torch.equal(cache["pattern", t, layer], cache[f"iter.{t}.{layer}.attn.hook_pattern"])


def test_empty_tokens_are_named():
    model = tiny_model("ouro")
    for empty in (torch.zeros(0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match="no tokens"):
            model(empty)


def test_the_loss_of_new_tokens_takes_their_part_of_the_full_mask():
    model, tokens = tiny_model("ouro"), tiny_tokens()
    past = model.make_kv_cache(tokens.shape[0])
    with torch.no_grad():
        model(tokens[:, :4], past_kv_cache=past)
        loss = model(
            tokens[:, 4:],
            return_type="loss",
            past_kv_cache=past,
            attention_mask=torch.ones_like(tokens),
        )
        logits = model(tokens)[:, 4:]
        expected = model.loss_fn(logits, tokens[:, 4:])
    assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_generate_takes_what_holds_for_every_step():
    model, tokens = tiny_model("ouro"), tiny_tokens()
    with pytest.raises(ValueError, match="cannot pass 'initial_state' to every step"):
        model.generate(tokens, 3, stop_at_eos=False, initial_state=torch.zeros(2, 9, 48))


def test_a_penalty_on_frequent_tokens_does_not_count_padding():
    model = tiny_model("ouro")
    tokens = tiny_tokens(1)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens], 1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(tokens)], 1)
    options = dict(stop_at_eos=False, freq_penalty=50.0, temperature=1e-3, verbose=False)
    plain = model.generate(tokens, 6, **options)
    with_pads = model.generate(padded, 6, attention_mask=mask, **options)
    assert plain[0, 9:].tolist() == with_pads[0, 14:].tolist()


def test_embeddings_and_learned_positions_add_up_to_the_stream():
    model, tokens = tiny_model("layer_norm"), tiny_tokens()
    if model.cfg.positional_embedding_type != "standard":
        model = tiny_model("weightless", positional_embedding_type="standard")
    _, cache = model.run_with_cache(tokens)
    stream = cache["embed"] + cache["pos_embed"]
    assert torch.equal(model.embed(tokens) + model.pos_embed(tokens), stream)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    assert torch.equal(model.pos_embed(tokens, 0, mask), cache["pos_embed"])


@pytest.mark.parametrize("name", ["huginn", "universal", "learned_steps"])
def test_torchs_defaults_do_not_move_a_draw(name):
    tokens = tiny_tokens()
    cfg = tiny_config(name, initial_state="normal", initial_state_std=0.7)
    with torch.no_grad():
        expected = LoopedTransformer(cfg)(tokens)
        torch.set_default_dtype(torch.float64)
        try:
            found = LoopedTransformer(cfg)(tokens)
        finally:
            torch.set_default_dtype(torch.float32)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_torchs_defaults_do_not_move_a_loaded_model():
    def load():
        return LoopedTransformer.from_pretrained_no_processing(FIXTURES / "huginn", device="cpu")

    tokens = tiny_tokens()
    with torch.no_grad(), pytest.warns(UserWarning, match="no tokenizer files"):
        expected = load()(tokens)
        torch.set_default_dtype(torch.float64)
        try:
            found = load()(tokens)
        finally:
            torch.set_default_dtype(torch.float32)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_a_loaded_model_is_in_evaluation_mode():
    assert not LoopedTransformer.from_pretrained(TINY).training


WAYS_TO_CACHE = {
    "run_with_cache": lambda model, x: model.run_with_cache(x, remove_batch_dim=True)[1],
    "without an object": lambda model, x: model.run_with_cache(
        x, remove_batch_dim=True, return_cache_object=False
    )[1],
    "by keyword": lambda model, x: model.run_with_cache(input=x, remove_batch_dim=True)[1],
    "caching hooks": lambda model, x: _run_with(
        model, x, *model.get_caching_hooks(remove_batch_dim=True)
    ),
    "a position": lambda model, x: model.run_with_cache(x, remove_batch_dim=True, pos_slice=-1)[1],
    "added hooks": lambda model, x: _run_added(model, x),
}


def _run_with(model, tokens, cache, forward, backward):
    model.run_with_hooks(tokens, fwd_hooks=forward, bwd_hooks=backward)
    return cache


def _run_added(model, tokens):
    cache = model.add_caching_hooks("iter.0.0.hook_resid_pre", remove_batch_dim=True)
    try:
        model(tokens)
    finally:
        model.reset_hooks()
    return cache


@pytest.mark.parametrize("way", WAYS_TO_CACHE)
def test_a_batch_axis_of_several_prompts_is_not_removed(way):
    model = tiny_model("ouro")
    tokens = torch.tensor([[3, 4, 5], [6, 7, 8]])
    with pytest.raises(ValueError, match=r"keeps one prompt, but .* holds 2"):
        WAYS_TO_CACHE[way](model, tokens)
    assert not any(model.list_hooks().values())
    name = model.hook_name("iter.0.0.hook_resid_pre")
    expected = model.run_with_cache(tokens[:1])[1][name][0]
    found = WAYS_TO_CACHE[way](model, tokens[:1])[name]
    assert torch.equal(found, expected[-1:] if way == "a position" else expected)
