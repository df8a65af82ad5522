"""Two stacks with a state each: the published equations, restarts, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from tests.closeness import assert_close
from tests.equations import attend, causal, rms
from tests.models import STACKS, tiny_config, tiny_model, tiny_tokens
from tl_loops import ConfigError, LoopedSemanticsError, LoopProfile, exit_curve, lens, measure
from tl_loops.model.check import check_model
from tl_loops.model.start import start_run
from tl_loops.patching import activation_patch
from tl_loops.upstream import KeyValueCache

TOKENS = tiny_tokens()
CLOSE = dict(rtol=1e-4, atol=1e-5)
OPTIONAL = ("attn.hook_result", "hook_mlp_in", "hook_attn_in", "_input")
"""How the names of hook points end that fire when they are asked for."""


@pytest.fixture(params=STACKS, scope="module")
def model(request):
    return tiny_model(request.param, initializer_range=0.15)


def stated(model, tokens, prefix=None):
    """The logits by the published equations over the model's own blocks."""
    cfg, blocks = model.cfg, list(model.blocks)
    context = start_run(model, tokens, prefix_mask=prefix).run.context

    def stack(t, x):
        for layer in range(cfg.n_core):
            x = blocks[cfg.n_prelude + t * cfg.n_core + layer](x, context)
        norm = (x.pow(2).mean(-1, keepdim=True) + cfg.eps).rsqrt()
        return x * norm if cfg.norm_between_iterations else x

    e = model.embed(tokens)
    for block in blocks[: cfg.n_prelude]:
        e = block(e, context)
    fast = model.initial_state(e, context.positions)
    slow = e if cfg.slow_initial_state == "embed" else model.slow_initial_state.state.expand_as(e)

    def inject(x):
        return x if cfg.injection is None else model.injection(x, model.injection.prepare(e))

    for t in range(cfg.n_iterations):
        if cfg.stacks[t % len(cfg.stacks)] == cfg.slow_stack:
            slow = stack(t, inject(slow + fast) if cfg.slow_injection else slow + fast)
        else:
            fast = stack(t, inject(fast + slow))
    x = slow
    for block in blocks[model.layout.coda_start :]:
        x = block(x, context)
    x = x if cfg.norm_between_iterations else model.ln_final(x)
    return x @ model.W_U


def test_the_loop_is_the_published_one(model):
    assert_close(model(TOKENS), stated(model, TOKENS), **CLOSE)
    logits, cache = model.run_with_cache(TOKENS)
    assert_close(logits, model(TOKENS), **CLOSE)
    stacks = model.layout.stacks
    for t in range(model.cfg.n_iterations):
        own, other, injected = (cache[name, t] for name in ("state_in", "other_in", "injected"))
        fast = stacks[t] != model.cfg.slow_stack
        expected = own + other
        if model.cfg.injection and (fast or model.cfg.slow_injection):
            prepared = model.injection.prepare(cache["hook_injection"])
            expected = model.injection(expected, prepared)
        assert_close(injected, expected, **CLOSE)
        before = [u for u in range(t) if stacks[u] == stacks[t]]
        if before:
            assert_close(own, cache["state_out", before[-1]])
        before = [u for u in range(t) if stacks[u] != stacks[t]]
        if before:
            assert_close(other, cache["state_out", before[-1]])
    assert_close(cache["state_in", 0], cache["hook_initial_state"])
    slow = stacks.index(model.cfg.slow_stack)
    assert_close(cache["state_in", slow], cache["hook_slow_initial_state"])


@pytest.mark.parametrize("stacks", [("fast", "slow"), ("fast", "fast", "slow")])
@pytest.mark.parametrize("slow_injection", [False, True])
def test_the_sum_of_the_states_and_e_are_normed_by_hand(stacks, slow_injection):
    model = tiny_model(
        "injected",
        injection="add_normed",
        stacks=stacks,
        n_iterations=3 * len(stacks),
        slow_injection=slow_injection,
        initial_state="learned",
        positional_embedding_type="none",
        n_key_value_heads=None,
        initializer_range=0.3,
        dtype=torch.float64,
    )
    w, eps = model.physical_state_dict(), model.cfg.eps
    exact = dict(rtol=1e-12, atol=1e-12)

    def block(x, name):
        y = rms(x, w[f"{name}.ln1.w"], eps)
        q, k, v = (torch.einsum("bpd,hde->bphe", y, w[f"{name}.attn.W_{n}"]) for n in "QKV")
        z = attend(q, k, v, causal(x.shape[1]))
        x = x + torch.einsum("bphe,hed->bpd", z, w[f"{name}.attn.W_O"])
        y = rms(x, w[f"{name}.ln2.w"], eps)
        inside = F.silu(y @ w[f"{name}.mlp.W_gate"]) * (y @ w[f"{name}.mlp.W_in"])
        return x + inside @ w[f"{name}.mlp.W_out"]

    logits, cache = model.run_with_cache(TOKENS)
    e = block(w["embed.W_E"][TOKENS], "prelude.0")
    fast, slow = (
        w[f"{name}.state"].expand_as(e) for name in ("initial_state", "slow_initial_state")
    )
    normed = []
    for t in range(model.cfg.n_iterations):
        stack, x = stacks[t % len(stacks)], fast + slow
        if stack == "fast" or slow_injection:
            scale = (x.square().mean(-1, keepdim=True) + eps).sqrt()
            assert_close(cache[f"iter.{t}.ln_state.hook_scale"], scale, **exact)
            x = x / scale + rms(e, eps=eps)
            normed.append(t)
        assert_close(cache["injected", t], x, **exact)
        for layer in range(2):
            x = block(x, f"core.{stack}.{layer}")
        fast, slow = (x, slow) if stack == "fast" else (fast, x)
    expected = rms(block(slow, "coda.0"), w["ln_final.w"], eps) @ w["unembed.W_U"]
    assert expected.std() > 0.1
    assert_close(logits, expected, **exact)
    # Where no norm acts there are no hook points of one.
    assert [t for t, hooks in enumerate(model.iter) if hasattr(hooks, "ln_state")] == normed
    assert model.hook_dict.keys() - cache.keys() == {
        name for name in model.hook_dict if name.endswith(OPTIONAL)
    }


@pytest.mark.parametrize("start", [0, 1, 4, 6])
def test_the_norm_of_a_given_e_fires_once(start):
    model = tiny_model("injected", injection="add_normed")
    _, cache = model.run_with_cache(TOKENS)
    fired = []
    hook = ("ln_injection.hook_normalized", lambda x, hook: fired.append(start))
    at = model.layout.coordinate(start)
    other = None if at.iteration is None else cache["other_in", at.iteration]
    model.run_with_hooks(
        model(TOKENS, stop_at_layer=start),
        start_at_layer=start,
        injection=cache["hook_injection"],
        other_state=other,
        fwd_hooks=[hook],
    )
    # Block 6 is in the third of four calls, the last of the fast stack, after its injection.
    assert fired == ([] if start == 6 else [start])


def test_coordinates_and_weights_name_the_stack(model):
    layout, (fast, slow) = model.layout, (model.cfg.stacks[0], model.cfg.slow_stack)
    at = layout.coordinate(layout.index(iteration=-1, layer=1))
    assert (at.phase, at.layer, at.stack) == ("core", 1, slow)
    names = set(model.physical_state_dict())
    assert {f"core.{fast}.1.attn.W_O", f"core.{slow}.0.attn.W_O"} <= names
    first, last = model.blocks[layout.core_start], model.blocks[layout.coda_start - 1]
    assert first.attn.W_Q is not last.attn.W_Q
    again = model.blocks[layout.index(iteration=len(model.cfg.stacks), layer=0)]
    assert again.attn.W_Q is first.attn.W_Q
    assert model.cfg.n_params == sum(p.numel() for p in model.parameters())


def test_starting_at_any_block_and_iteration(model):
    logits, cache = model.run_with_cache(TOKENS)
    layout = model.layout
    e = cache["hook_injection"] if model.cfg.injection else None
    for index in range(layout.n_layers + 1):
        resid = model(TOKENS, stop_at_layer=index)
        at = layout.coordinate(index) if index < layout.n_layers else None
        t = at.iteration if at is not None and at.phase == "core" else None
        other = None if t is None else cache["other_in", t]
        again = model(resid, start_at_layer=index, injection=e, other_state=other)
        assert_close(again, logits, **CLOSE)
    for t in range(layout.n_iterations):
        state, other = cache["state_in", t], cache["other_in", t]
        again = model(state, start_at_iteration=t, injection=e, other_state=other)
        assert_close(again, logits, **CLOSE)
    with pytest.raises(ValueError, match="pass other_state="):
        model(cache["state_in", 1], start_at_iteration=1, injection=e)
    with pytest.raises(ValueError, match=r"other_state must be \[batch, pos, d_model\]"):
        model(state, start_at_iteration=t, injection=e, other_state=other[:1])
    with pytest.raises(ValueError, match="models with two stacks"):
        tiny_model("ouro")(TOKENS, other_state=other)


def test_an_edit_of_what_a_call_reads_stays_in_that_call(model):
    _, cache = model.run_with_cache(TOKENS)
    stacks = model.layout.stacks

    def double(state, hook):
        state *= 2

    for point in ("hook_state_in", "hook_other_in"):
        with model.hooks([(f"iter.1.{point}", double)]):
            _, edited = model.run_with_cache(TOKENS)
        assert_close(edited["state_out", 0], cache["state_out", 0])
        assert not torch.allclose(edited["injected", 1], cache["injected", 1])
        # The next call of the other stack reads its own state as it was.
        later = next(t for t in (2, 3) if stacks[t] != stacks[1])
        own = [t for t in range(2) if stacks[t] == stacks[later]]
        known = cache["state_out", own[-1]] if own else cache["state_in", later]
        assert_close(edited["state_in", later], known)


def test_whole_cycles_alone_are_iterations(model):
    cycle = len(model.cfg.stacks)
    with model.iterations(3 * cycle):
        assert len(model.layout.stacks) == 3 * cycle
        assert_close(model(TOKENS), stated(model, TOKENS), **CLOSE)
    assert model(TOKENS, n_iterations=cycle).shape == model(TOKENS).shape
    with pytest.raises(ConfigError, match=f"multiple of {cycle}, the calls of one cycle"):
        model.set_iterations(cycle + 1)


def test_a_prefix_sees_itself_in_both_directions():
    model = tiny_model("hrm_text", initializer_range=0.15)
    prefix = torch.zeros_like(TOKENS)
    prefix[0, :4], prefix[1, :6] = 1, 1
    logits, cache = model.run_with_cache(TOKENS, prefix_mask=prefix)
    assert_close(logits, stated(model, TOKENS, prefix), **CLOSE)
    allowed = torch.ones(9, 9).tril().bool() | (prefix[:, :, None] & prefix[:, None, :]).bool()
    seen = cache["pattern", 0] > 0
    assert torch.equal(seen, allowed[:, None].expand_as(seen))
    assert_close(model(TOKENS, prefix_mask=torch.zeros_like(TOKENS)), model(TOKENS))
    with pytest.raises(ValueError, match=r"prefix_mask must be \[batch, new tokens\]"):
        model(TOKENS, prefix_mask=prefix[:, :5])
    with pytest.raises(ValueError, match="takes no prefix_mask"):
        tiny_model("ouro")(TOKENS, prefix_mask=prefix)


def test_generation_behind_a_prefix():
    model = tiny_model("hrm_text", initializer_range=0.15)
    prefix = torch.zeros_like(TOKENS)
    prefix[0, :4], prefix[1, :6] = 1, 1
    settings = dict(max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    cached, uncached = (
        model.generate(TOKENS, prefix_mask=prefix, use_past_kv_cache=use, **settings)
        for use in (True, False)
    )
    assert torch.equal(cached, uncached)
    tokens = TOKENS
    for _ in range(4):
        shown = torch.nn.functional.pad(prefix, (0, tokens.shape[1] - prefix.shape[1]))
        new = model(tokens, prefix_mask=shown)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, new], dim=1)
    assert torch.equal(cached, tokens)


def test_a_prefix_behind_cached_tokens_is_refused():
    model = tiny_model("hrm_text")
    past = KeyValueCache.init_cache(model.cfg, "cpu", 2)
    model(TOKENS, past_kv_cache=past)
    with pytest.raises(ValueError, match="must be one call"):
        model(TOKENS, past_kv_cache=past, prefix_mask=torch.ones_like(TOKENS))


def test_what_is_a_sum_of_one_stream_is_refused(model):
    _, cache = model.run_with_cache(TOKENS)
    for tool in (
        cache.decompose_resid,
        cache.stack_head_results,
        cache.get_full_resid_decomposition,
        lambda: model.all_composition_scores("Q"),
    ):
        with pytest.raises(LoopedSemanticsError, match="two stacks with a state each"):
            tool()
    with pytest.raises(LoopedSemanticsError, match="calls of two stacks"):
        exit_curve(model, [TOKENS[0]], progress=False)


def test_exits_are_states_of_the_slow_stack():
    model = tiny_model("hrm_text", initializer_range=0.15)
    _, cache = model.run_with_cache(TOKENS)
    assert_close(model(TOKENS, exit_at=2), model(TOKENS, n_iterations=3), **CLOSE)
    with pytest.raises(LoopedSemanticsError, match="iteration 1 is a call of stack L"):
        model(TOKENS, exit_at=1)
    with pytest.raises(LoopedSemanticsError, match="iteration 0 is a call of stack L"):
        lens.exit_lens(model, TOKENS)
    exits = ["iter.2.hook_state_out", "iter.5.hook_state_out"]
    for name, expected in zip(exits, (model(TOKENS, exit_at=2), model(TOKENS)), strict=True):
        read = lens.exit_lens(model, TOKENS, points=name, positions="all", keep_logits=True)
        assert_close(read.logits[0], expected, **CLOSE)
    # What enters a call is a sum of two normed states, which the logit lens norms.
    for name in ("iter.4.hook_injected", "iter.2.hook_state_in"):
        read = lens.logit_lens(model, TOKENS, points=name, positions="all", keep_logits=True)
        assert_close(read.logits[0], model.ln_final(cache[name]) @ model.W_U, **CLOSE)


def test_patching_equals_the_definition(model):
    clean, corrupted = TOKENS, tiny_tokens(seed=5)

    def metric(logits):
        return logits[:, -1, 3].mean()

    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        for activation in ("state_out", "other_in", "injected"):
            found = activation_patch(
                model, corrupted, cache, metric, activation, ("iteration",), progress=False
            )
            for t in range(model.cfg.n_iterations):
                name = f"iter.{t}.hook_{activation}"
                hook = (name, lambda x, hook: cache[hook.name])
                expected = metric(model.run_with_hooks(corrupted, fwd_hooks=[hook]))
                assert_close(found[t], expected, **CLOSE)


def test_profiles_keep_the_states_of_the_stacks_apart(model):
    profile = measure(model, [TOKENS[0], TOKENS[1]], progress=False)
    assert not profile.to_frame().empty
    assert profile.layout.stacks == model.layout.stacks


def test_a_saved_model_loads_and_keeps_its_promises(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="tokenizer"):
        again = type(model).from_pretrained_no_processing(tmp_path, device="cpu")
    assert again.cfg.stacks == model.cfg.stacks
    assert_close(again(TOKENS), model(TOKENS))
    findings = {finding.name: finding for finding in check_model(again)}
    failed = [f for f in findings.values() if f.status == "failed"]
    assert not failed, failed


def test_layers_that_a_call_runs_twice_are_one_set_of_weights(tmp_path):
    twice = tiny_model("repeated", initializer_range=0.15)
    layout = twice.layout
    assert layout.n_physical_layers == 6 and twice.cfg.notation == "(1, (2⊗2)⊗4, 1)_I"
    for layer in range(4):
        index = layout.index(iteration=2, layer=layer)
        assert layout.physical_name(index) == f"core.L.{layer % 2}"
        assert twice.hook_name(f"iter.2.{layer}.hook_mlp_out") == f"blocks.{index}.hook_mlp_out"
        owner = twice.blocks[layout.index(iteration=0, layer=layer % 2)]
        assert twice.blocks[index].attn.W_Q is owner.attn.W_Q
    # The same as four layers of which the last two have the weights of the first two.
    four = tiny_model("repeated", layer_repeats=1)
    weights = dict(twice.physical_state_dict())
    for name in four.physical_state_dict():
        kind, _, rest = name.partition(".")
        stack, _, inner = rest.partition(".")
        if kind == "core":
            layer, _, leaf = inner.partition(".")
            weights[name] = weights[f"core.{stack}.{int(layer) % 2}.{leaf}"]
    four.load_physical_state_dict(weights)
    assert_close(twice(TOKENS), four(TOKENS), rtol=1e-6, atol=1e-6)
    twice(TOKENS, return_type="loss").backward()
    four(TOKENS, return_type="loss").backward()
    theirs = {name: p.grad for name, p in four.physical_named_parameters()}
    for name, parameter in twice.physical_named_parameters():
        expected = theirs[name]
        if name.startswith("core."):
            kind, stack, layer, leaf = name.split(".", 3)
            expected = expected + theirs[f"core.{stack}.{int(layer) + 2}.{leaf}"]
        assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    profile = measure(twice, [TOKENS[0], TOKENS[1]], progress=False)
    for ending in ("json", "csv", "parquet"):
        profile.save(tmp_path / f"profile.{ending}")
        again = LoopProfile.load(tmp_path / f"profile.{ending}")
        assert again.layout == layout != four.layout


def test_describe_names_both_states():
    text = tiny_config("hrm_text").describe()
    assert "zL = learned vector, zH = e" in text
    assert "2 x [ calls of L L H ]" in text
    assert "x = zL + zH; 2 x block; zL = ln_final(x)" in text and "logits = zH W_U" in text
    text = tiny_config("injected").describe()
    assert "x = zfast + zslow + e; 2 x block" in text and "coda     x = zslow; 1 x block" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(stacks=("L",)), "must name two stacks"),
        (dict(stacks=("L", "H", "L")), "the slow one once and last"),
        (dict(stacks=("L", "M", "H")), "must name two stacks"),
        (dict(stacks=("L", "H", "H")), "the slow one once and last"),
        (dict(stacks=("L 1", "H")), "must name two stacks"),
        (dict(n_iterations=4), "multiple of 3, the calls of one cycle L L H"),
        (dict(slow_injection=True), "slow_injection needs an injection"),
        (dict(layer_repeats=2, stacks=None), "layer_repeats=2 needs stacks"),
        (dict(layer_repeats=3), "n_core=2 is no multiple of layer_repeats=3"),
        (dict(layer_repeats=0), "layer_repeats must be at least 1"),
        (dict(exit_gate=True), "exit_gate is not supported with stacks"),
        (dict(stacks=None, slow_initial_state="learned"), "slow_injection need stacks"),
        (dict(attention_dir="bidirectional"), "prefix_mask needs attention_dir='causal'"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config("hrm_text", **changes)
