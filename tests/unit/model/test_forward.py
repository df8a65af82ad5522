"""The forward pass: restarts, states, masks, caches, gradients, exits."""

import pytest
import torch

from tests.closeness import assert_close
from tests.models import ARCHITECTURES, tiny_model, tiny_tokens
from tl_loops import LoopedSemanticsError
from tl_loops.upstream import KeyValueCache

TOKENS = tiny_tokens()


def close(actual, expected):
    assert_close(actual, expected, rtol=1e-5, atol=2e-5)


@pytest.fixture(params=ARCHITECTURES, scope="module")
def model(request):
    return tiny_model(request.param)


def test_stopping_and_starting_again_is_one_pass(model):
    logits, cache = model.run_with_cache(TOKENS)
    e = cache["hook_injection"] if model.cfg.injection else None
    for index in range(model.cfg.n_layers + 1):
        resid = model(TOKENS, stop_at_layer=index)
        close(model(resid, start_at_layer=index, injection=e, tokens=TOKENS), logits)
        if 0 < index < model.cfg.n_layers:
            close(resid, cache["resid_pre", index])
            start = index - model.cfg.n_layers
            close(model(resid, start_at_layer=start, injection=e, tokens=TOKENS), logits)
    close(model(TOKENS, stop_at_layer=-1), cache["resid_pre", -1])


def test_a_stop_after_the_last_block_is_before_what_ends_the_last_iteration(model):
    n, last = model.cfg.n_layers, model.cfg.n_iterations - 1
    fired = []
    names = [f"iter.{t}.hook_state_out" for t in range(last + 1)]
    with model.hooks([(name, lambda x, hook: fired.append(hook.name)) for name in names]):
        stream = model(TOKENS, stop_at_layer=n)
    assert fired == (names if model.cfg.n_coda else names[:last])
    _, cache = model.run_with_cache(TOKENS)
    close(stream, cache["resid_post", n - 1])


def test_starting_at_an_iteration(model):
    logits, cache = model.run_with_cache(TOKENS)
    e = cache["hook_injection"] if model.cfg.injection else None
    for t in range(model.cfg.n_iterations):
        state = cache[f"iter.{t}.hook_state_in"]
        close(model(state, start_at_iteration=t, injection=e, tokens=TOKENS), logits)


def test_a_start_behind_the_prelude_needs_the_injection(model):
    if model.cfg.injection is None:
        pytest.skip("nothing is injected")
    _, cache = model.run_with_cache(TOKENS)
    state = cache["iter.1.hook_state_in"]
    with pytest.raises(ValueError, match="pass injection="):
        model(state, start_at_iteration=1, tokens=TOKENS)
    with pytest.raises(ValueError, match="pass injection="):
        inside = model.layout.core_start + 1
        model(cache["iter.0.1.hook_resid_pre"], start_at_layer=inside, tokens=TOKENS)
    last = model.layout.index(iteration=-1, layer=1)
    model(cache["resid_pre", last], start_at_layer=last, tokens=TOKENS)  # no iteration follows


def test_the_initial_state_is_used_as_it_is(model):
    state = torch.randn(*TOKENS.shape, model.cfg.d_model)
    logits, cache = model.run_with_cache(TOKENS, initial_state=state)
    assert torch.equal(cache["hook_initial_state"], state)
    assert not torch.allclose(logits, model(TOKENS))
    _, cache = model.run_with_cache(TOKENS)
    close(model(TOKENS, initial_state=cache["hook_initial_state"]), model(TOKENS))
    for wrong in (state[:1], state[:, :4], state[..., :5]):
        with pytest.raises(ValueError, match=r"initial_state must be \[batch, pos, d_model\]"):
            model(TOKENS, initial_state=wrong)


def test_cached_decoding_equals_the_full_pass(model):
    past = KeyValueCache.init_cache(model.cfg, "cpu", TOKENS.shape[0])
    steps = [model(TOKENS[:, :4], past_kv_cache=past), model(TOKENS[:, 4:6], past_kv_cache=past)]
    steps += [model(TOKENS[:, p : p + 1], past_kv_cache=past) for p in range(6, TOKENS.shape[1])]
    close(torch.cat(steps, dim=1), model(TOKENS))
    assert len(past.entries) == model.cfg.n_layers


def test_a_key_value_cache_of_another_depth_is_refused(model):
    past = KeyValueCache.init_cache(model.cfg, "cpu", TOKENS.shape[0])
    with pytest.raises(ValueError, match="make it with the same n_iterations"):
        model(TOKENS, past_kv_cache=past, n_iterations=7)


def test_left_padding_changes_nothing(model):
    n_pad = 3
    padded = torch.cat([torch.full_like(TOKENS[:, :n_pad], 1), TOKENS], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :n_pad] = 0
    expected = model(TOKENS)
    close(model(padded, attention_mask=mask)[:, n_pad:], expected)
    logits, cache = model.run_with_cache(padded, attention_mask=mask)
    close(logits[:, n_pad:], expected)
    assert torch.isfinite(logits).all()
    pattern = cache["iter.1.0.attn.hook_pattern"]
    assert (pattern[:, :, :n_pad] == 0).all()
    assert (pattern[..., :n_pad] == 0).all()
    assert torch.allclose(pattern[:, :, n_pad:].sum(-1), torch.ones(()))


def test_a_row_does_not_depend_on_its_neighbours(model):
    close(model(TOKENS)[1:], model(TOKENS[1:]))
    ragged = torch.cat([TOKENS, TOKENS], dim=0)
    mask = torch.ones_like(ragged)
    mask[0, :4] = 0
    close(model(ragged, attention_mask=mask)[1:2], model(TOKENS[1:2]))


def test_padded_decoding_equals_decoding_without(model):
    padded = torch.cat([torch.full_like(TOKENS[:1, :3], 1), TOKENS[:1]], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    settings = dict(max_new_tokens=6, do_sample=False, stop_at_eos=False, verbose=False)
    plain = model.generate(TOKENS[:1], **settings)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 3:], plain)
    assert torch.equal(model.generate(TOKENS[:1], use_past_kv_cache=False, **settings), plain)
    with model.iterations(5):
        inner = model.generate(TOKENS[:1], **settings)
    assert torch.equal(model.generate(TOKENS[:1], n_iterations=5, **settings), inner)


def test_generating_from_embeddings(model):
    if model.cfg.positional_embedding_type == "standard":
        pytest.skip("embeddings without positions")
    settings = dict(max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    if model.cfg.value_embeddings:
        with pytest.raises(ValueError, match="read embeddings of the tokens themselves"):
            model.generate(model.embed(TOKENS), return_type="tokens", **settings)
        return
    tokens = model.generate(TOKENS, **settings)
    for use_cache in (True, False):
        new = model.generate(
            model.embed(TOKENS), return_type="tokens", use_past_kv_cache=use_cache, **settings
        )
        assert torch.equal(new, tokens[:, TOKENS.shape[1] :])


def test_gradients_reach_every_weight_through_every_iteration(model):
    model.zero_grad()
    extra = dict(weighted_exit=True) if model.cfg.exit_gate else {}
    loss = model(TOKENS, return_type="loss", **extra)
    loss.backward()
    for name, parameter in model.physical_named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    # One weight's gradient is the sum over its iterations: check it by finite differences.
    weight = model.blocks[model.layout.core_start].mlp.W_out
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    predicted = float((weight.grad * direction).sum())
    step = 1e-3
    with torch.no_grad():
        weight += step * direction
        up = float(model(TOKENS, return_type="loss", **extra))
        weight -= 2 * step * direction
        down = float(model(TOKENS, return_type="loss", **extra))
        weight += step * direction
    assert predicted == pytest.approx((up - down) / (2 * step), rel=0.05, abs=2e-3)
    model.zero_grad()


def test_bidirectional_attention_sees_the_future():
    model = tiny_model("retrofitted", attention_dir="bidirectional")
    changed = TOKENS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50
    assert not torch.allclose(model(TOKENS)[:, 0], model(changed)[:, 0])
    _, cache = model.run_with_cache(TOKENS)
    assert (cache["pattern", 0][:, :, 0, 1:] > 0).all()
    close(model.run_with_cache(TOKENS)[0], model(TOKENS))


def test_causality(model):
    changed = TOKENS.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 50
    close(model(changed)[:, :5], model(TOKENS)[:, :5])


def test_return_types(model):
    logits = model(TOKENS)
    both = model(TOKENS, return_type="both")
    assert torch.equal(both.logits, logits)
    log_probs = logits.log_softmax(-1)[:, :-1]
    picked = log_probs.gather(-1, TOKENS[:, 1:, None]).squeeze(-1)
    assert_close(both.loss, -picked.mean())
    per_token = model(TOKENS, return_type="loss", loss_per_token=True)
    assert_close(per_token, -picked)
    assert model(TOKENS, return_type=None) is None
    with pytest.raises(ValueError, match="return_type must be"):
        model(TOKENS, return_type="logit")


def test_exits_of_a_gated_model():
    model = tiny_model("ouro")
    logits, cache = model.run_with_cache(TOKENS)
    states = [cache[f"iter.{t}.hook_state_out"] for t in range(4)]
    for t in range(4):
        close(model(TOKENS, exit_at=t), model.unembed(states[t]))
        close(model(TOKENS, exit_at=t), model(TOKENS, n_iterations=t + 1))
    gates = torch.stack([cache[f"iter.{t}.hook_exit_gate"] for t in range(4)]).sigmoid()
    stay, weighted = torch.ones_like(gates[0]), torch.zeros_like(logits)
    cumulative, chosen = torch.zeros_like(gates[0]), torch.full_like(gates[0], -1)
    for t in range(4):
        p = stay * gates[t] if t < 3 else stay
        stay, weighted = stay * (1 - gates[t]), weighted + p * model.unembed(states[t])
        cumulative = cumulative + p
        chosen = torch.where((chosen < 0) & ((cumulative >= 0.5) | torch.tensor(t == 3)), t, chosen)
    close(model(TOKENS, weighted_exit=True), weighted)
    assert len(chosen.unique()) > 1  # the test means something
    expected = torch.stack([model.unembed(s) for s in states])
    index = chosen.long()[None].expand(1, -1, -1, expected.shape[-1])
    close(model(TOKENS, exit_threshold=0.5), expected.gather(0, index)[0])
    close(model(TOKENS, exit_threshold=0.0), model(TOKENS, exit_at=0))
    model.cfg.exit_threshold = 0.5
    close(model(TOKENS), model(TOKENS, exit_threshold=0.5))


@pytest.mark.parametrize("changes", [{}, dict(norm_before_coda=True)])
def test_the_exit_at_the_last_iteration_is_the_model(changes):
    model = tiny_model("weightless", normalization_type="RMS", **changes)
    close(model(TOKENS, exit_at=2), model(TOKENS))


def test_a_threshold_of_one_is_the_last_iteration_also_in_bfloat16():
    model = tiny_model("ouro")
    with torch.no_grad():
        model.exit_gate.b.fill_(6.3)  # sigmoid rounds to 1 in bfloat16
    model.to(torch.bfloat16)
    assert torch.equal(model(TOKENS, exit_threshold=1.0), model(TOKENS))


@pytest.mark.parametrize(
    ("architecture", "arguments", "error", "message"),
    [
        ("huginn", dict(exit_at=0), LoopedSemanticsError, "n_iterations=t \\+ 1"),
        ("ouro", dict(exit_at=4), ValueError, "out of range: there are 4"),
        ("ouro", dict(exit_threshold=1.5), ValueError, "is a probability"),
        ("ouro", dict(exit_at=1, weighted_exit=True), ValueError, "not several"),
        ("weightless", dict(weighted_exit=True), ValueError, "with an exit gate"),
        ("ouro", dict(stop_at_layer=99), ValueError, "there are 12 unrolled blocks"),
        ("ouro", dict(attention_mask=torch.ones(2, 4)), ValueError, "attention_mask must be"),
        ("ouro", dict(start_at_layer=2), ValueError, "residual stream"),
        ("ouro", dict(start_at_layer=2, start_at_iteration=1), ValueError, "not both"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(architecture, arguments, error, message):
    model = tiny_model(architecture)
    if "attention_mask" in arguments:
        arguments = {"attention_mask": arguments["attention_mask"].long()}
    with pytest.raises(error, match=message):
        model(TOKENS, **arguments)


def test_an_exit_needs_the_whole_loop():
    model = tiny_model("ouro")
    _, cache = model.run_with_cache(TOKENS)
    with pytest.raises(LoopedSemanticsError, match="every iteration"):
        model(cache["iter.1.hook_state_in"], start_at_iteration=1, weighted_exit=True)


def test_float_input_without_a_start_is_refused(model):
    with pytest.raises(ValueError, match="also give start_at_layer"):
        model(torch.zeros(1, 2, model.cfg.d_model))
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        model.generate("text", stop_at_eos=False)
