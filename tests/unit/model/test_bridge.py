"""A bridged looped model, unrolled, is the looped model: names, values, edits, gradients."""

import dataclasses
import os
import warnings
from functools import cache

import pytest
import torch
from transformer_lens import patching as upstream_patching

from tests.bridged.models import FIXTURES, bridged, reference
from tests.closeness import assert_close
from tests.feedforward import plain_model
from tests.kills import interrupted_at
from tl_loops import (
    ConfigError,
    HookNameError,
    LoopedSemanticsError,
    LoopedTransformer,
    lens,
    measure,
    unroll,
)
from tl_loops.model.bridged.family import _nothing
from tl_loops.patching import activation_patch

FAMILIES = ("ouro", "huginn", "hrm_text")
CYCLE = {"ouro": 1, "huginn": 1, "hrm_text": 4}
"""Iterations come in whole cycles."""
CLOSE = dict(rtol=1e-4, atol=1e-4)
pytestmark = pytest.mark.filterwarnings("ignore:A forward hook edited", "ignore:Backward hooks on")


@cache
def pair(family):
    """An unrolled bridge and a LoopedTransformer from the same checkpoint."""
    looped = LoopedTransformer.from_pretrained_no_processing(FIXTURES / family, device="cpu")
    return unroll(bridged(family)), looped.eval()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def unrolled(family):
    return pair(family)[0]


@pytest.fixture
def looped(family):
    return pair(family)[1]


@pytest.fixture
def tokens(family):
    return reference(family)["tokens"]


def test_the_local_hugging_face_models_give_the_reference_numbers(family, tokens):
    expected = reference(family)
    arguments = {}
    if family == "huginn":
        arguments["input_states"] = expected["initial_state"]
    with torch.no_grad():
        logits = bridged(family)(tokens, **arguments)
    assert_close(logits, expected["logits"], rtol=1e-4, atol=2e-5)


def test_logits_are_those_of_the_looped_model(family, unrolled, looped, tokens):
    assert_close(unrolled(tokens), looped(tokens), **CLOSE)
    assert_close(unrolled(tokens, return_type="loss"), looped(tokens, return_type="loss"), **CLOSE)
    for n in (CYCLE[family], 3 * CYCLE[family]):
        assert_close(unrolled(tokens, n_iterations=n), looped(tokens, n_iterations=n), **CLOSE)
    assert unrolled.cfg.notation == looped.cfg.notation


def test_the_hugging_face_model_is_what_runs(family, tokens):
    unrolled = unroll(bridged(family))
    before = unrolled(tokens)
    head = unrolled.bridge.original_model.get_output_embeddings()
    handle = head.register_forward_hook(lambda *_: torch.full_like(before, 7.0))
    assert torch.equal(unrolled(tokens), torch.full_like(before, 7.0))
    handle.remove()
    assert torch.equal(unrolled(tokens), before)


def test_every_name_is_given_or_missing_with_a_reason(family, unrolled, looped):
    given, missing = set(unrolled.hook_dict), set(unrolled.missing)
    assert given | missing == set(looped.hook_dict) and not given & missing
    ends = {name.rsplit(".", 1)[-1] for name in missing}
    optional = {f"hook_{x}" for x in ("q_input", "k_input", "v_input", "attn_in", "mlp_in")}
    hidden = {"hook_pattern", "hook_attn_scores", "hook_rot_q", "hook_rot_k"}
    assert ends == optional | {"hook_result"} | (hidden if family == "huginn" else set())
    for name, reason in unrolled.missing.items():
        assert "LoopedTransformer" in reason, name
    name = sorted(missing)[0]
    for ask in (
        lambda: unrolled.run_with_cache(torch.tensor([[1]]), names_filter=name),
        lambda: unrolled.add_hook(unrolled.layout.alias(name), lambda x, hook: None),
    ):
        with pytest.raises(HookNameError, match="a bridge does not give"):
            ask()


def test_every_cached_tensor_is_that_of_the_looped_model(unrolled, looped, tokens):
    with torch.no_grad():
        _, cache = unrolled.run_with_cache(tokens)
        _, expected = looped.run_with_cache(tokens)
    assert set(cache.keys()) == set(unrolled.hook_dict)
    for name in cache.keys():
        found, value = cache[name], expected[name]
        if name.endswith("hook_attn_scores"):  # What the causal mask hides is -inf here only.
            found, value = found.where(value.isfinite(), 0.0), value.where(value.isfinite(), 0.0)
        assert_close(found, value, **CLOSE, msg=name)


def test_one_tensor_under_all_its_names(unrolled, tokens):
    _, cache = unrolled.run_with_cache(tokens)
    i = unrolled.layout.index(iteration=1, layer=1)
    for key in (("z", i), f"blocks.{i}.attn.hook_z", "iter.1.1.attn.hook_z", ("z", 1, 1)):
        assert cache[key] is cache["z", i]
    assert cache["state_out", 1] is cache["iter.1.hook_state_out"]
    only = unrolled.run_with_cache(tokens, names_filter="iter.1.1.attn.hook_z")[1]
    assert list(only.keys()) == [f"blocks.{i}.attn.hook_z"]


def places(model):
    """Hook points of one layer at iteration 1, of the last block, and all outside of blocks."""
    blocks = {model.layout.index(iteration=1, layer=0), model.layout.n_layers - 1}
    for name in model.hook_dict:
        if model.layout.stacks and name.endswith(("hook_scale", "hook_normalized")):
            continue  # See test_norms_without_weights_can_only_be_read.
        if not name.startswith("blocks.") or int(name.split(".")[1]) in blocks:
            yield name


def edit(x, hook):
    if hook.name.endswith("hook_gate"):
        return 0.7 * x  # Stays between 0 and 1.
    if hook.name.endswith(("hook_pattern", "hook_attn_scores")):
        return x.flip(-3)  # Stays a pattern.
    x = x.clone()
    x[:, 2:4] = 1.3 * x[:, 2:4] + 0.1
    return x


def edit_in_place(x, hook):
    x[:, 1] *= 0.8


@pytest.mark.parametrize("hook", [edit, edit_in_place])
def test_an_edit_at_one_iteration_is_the_looped_models(unrolled, looped, tokens, hook):
    changed = 0
    with torch.no_grad():
        before = unrolled(tokens)
        for name in places(unrolled):
            found = unrolled.run_with_hooks(tokens, fwd_hooks=[(name, hook)])
            expected = looped.run_with_hooks(tokens, fwd_hooks=[(name, hook)])
            assert_close(found, expected, **CLOSE, msg=name)
            changed += not torch.allclose(found, before, atol=1e-5)
        assert_close(unrolled(tokens), before)
    assert changed > 0.8 * len(list(places(unrolled)))


def test_an_edit_in_place_does_not_reach_what_was_cached(unrolled, looped, tokens):
    for model in (unrolled, looped):
        with model.hooks(fwd_hooks=[("iter.1.hook_injected", edit_in_place)]):
            _, cache = model.run_with_cache(tokens)
        plain = model.run_with_cache(tokens)[1]
        assert_close(cache["iter.0.hook_state_out"], plain["iter.0.hook_state_out"])
        assert not torch.allclose(cache["iter.1.hook_injected"], plain["iter.1.hook_injected"])


def test_gradients_at_one_iteration_are_the_looped_models(unrolled, looped, tokens):
    names = ["iter.1.0.hook_resid_pre", "iter.1.0.attn.hook_z", "iter.0.hook_state_out"]
    gradients = []
    for model in (unrolled, looped):
        # The bridge's parameters carry gradients also where ours do not.
        found = {}

        def keep(grad, hook, found=found):
            found[hook.name] = grad.detach().clone()

        with model.hooks(bwd_hooks=[(name, keep) for name in names]):
            model(tokens)[:, -1].pow(2).sum().backward()
        gradients.append(found)
    assert len(gradients[0]) == 3
    for name, grad in gradients[0].items():
        assert grad.abs().max() > 0
        scale = float(gradients[1][name].abs().max())
        assert_close(grad / scale, gradients[1][name] / scale, **CLOSE, msg=name)


def test_gradients_gather_in_the_hugging_face_model(family, tokens):
    unrolled = unroll(bridged(family))
    assert not any(parameter.requires_grad for parameter in unrolled.parameters())
    unrolled(tokens, return_type="loss").backward()
    weights = dict(unrolled.bridge.original_model.named_parameters())
    core = [w for name, w in weights.items() if "layers.1" in name or "core_block.1" in name]
    assert core and all(w.grad is not None and w.grad.abs().max() > 0 for w in core)


def test_decompositions_sum_to_the_stream(unrolled, looped, tokens):
    with torch.no_grad():
        _, cache = unrolled.run_with_cache(tokens)
        _, expected = looped.run_with_cache(tokens)
    if unrolled.layout.stacks:
        with pytest.raises(LoopedSemanticsError, match="two stacks"):
            cache.decompose_resid()
        return
    stack, labels = cache.decompose_resid(return_labels=True)
    assert_close(stack.sum(0), cache["resid_post", -1], rtol=1e-3, atol=1e-3)
    theirs, same = expected.decompose_resid(return_labels=True)
    assert labels == same
    assert_close(stack, theirs, rtol=1e-3, atol=1e-3)
    heads = cache.stack_head_results(iterations=1)
    assert_close(heads, expected.stack_head_results(iterations=1), rtol=1e-3, atol=1e-3)
    attributions = cache.logit_attrs(stack, tokens).sum(0)
    logits = unrolled(tokens).gather(-1, tokens[..., None])[..., 0]
    assert_close(attributions, logits, rtol=1e-3, atol=1e-3)


def test_iterations_change_and_come_back(family, unrolled, tokens):
    n = 6 if CYCLE[family] == 1 else 12
    before, names = unrolled(tokens), set(unrolled.hook_dict)
    seen = []
    with unrolled.iterations(n):
        name = f"iter.{n - 1}.hook_state_out"
        assert name in unrolled.hook_dict
        with unrolled.hooks(fwd_hooks=[(name, lambda x, hook: seen.append(1))]):
            unrolled(tokens)
    assert seen == [1] and set(unrolled.hook_dict) == names
    assert torch.equal(unrolled(tokens), before)


def test_stopping_before_a_block(unrolled, looped, tokens):
    depth = unrolled.cfg.n_layers
    for stop in (0, 1, unrolled.layout.index(iteration=1, layer=0), depth - 1, depth):
        found, expected = (model(tokens, stop_at_layer=stop) for model in (unrolled, looped))
        assert_close(found, expected, **CLOSE)
    assert not [point for point in unrolled.bridge.hook_dict.values() if point.fwd_hooks]


def test_the_bridge_stays_as_it_is(unrolled, tokens):
    bridge = unrolled.bridge
    state = {} if unrolled.cfg.injection is None else {"num_steps": (0, unrolled.cfg.n_iterations)}
    torch.manual_seed(0)
    before = bridge(tokens, **state)
    layer = next(name for name in bridge.hook_dict if name.endswith(".1.hook_out"))
    layer = layer.replace("prelude", "core_block").replace("coda", "core_block")
    stacks = unrolled.layout.stacks
    n_calls = unrolled.cfg.n_iterations if stacks is None else stacks.count(layer[0])
    fires = []
    bridge.add_hook(layer, lambda x, hook: fires.append(1))
    unrolled.run_with_cache(tokens)
    assert len(fires) == n_calls
    bridge.reset_hooks()

    def fail(x, hook):
        raise RuntimeError("of the user's own")

    with pytest.raises(RuntimeError, match="of the user's own"):
        unrolled.run_with_hooks(tokens, fwd_hooks=[("iter.1.0.hook_resid_post", fail)])
    assert not [name for name, point in bridge.hook_dict.items() if point.fwd_hooks]
    modules = bridge.original_model.modules()
    assert not any(type(m).__name__ == "Linear" and m._forward_hooks for m in modules)
    torch.manual_seed(0)
    assert torch.equal(bridge(tokens, **state), before)


ROUTES = (os.path.join("bridged", "routing.py"),)
COUNTS = tuple(os.path.join("bridged", name) for name in ("ouro.py", "hrm_text.py", "unrolled.py"))
# What sets nothing in the bridge. What is raised as a generator expression is closed is swallowed.
SPARED = ("<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>", "setup", "_taps", "_source")
SPARED += ("_entry", "source", "fire", "end", "hook", "call", "check")


@pytest.mark.parametrize("files", [ROUTES, COUNTS], ids=["routes", "counts"])
def test_an_interrupt_leaves_the_bridge_as_it_was(family, unrolled, tokens, files):
    if files is COUNTS and not unrolled.counts_of_a_run():
        pytest.skip("the number of iterations is an argument of its call")
    n = unrolled.cfg.n_iterations * 2 if files is COUNTS else None
    tokens = tokens[:1, :3]

    def use():
        return unrolled(tokens, n_iterations=n)

    def condition():
        modules = [*unrolled.bridge.modules(), *unrolled.hook_dict.values()]
        holders = ("_forward_hooks", "_forward_pre_hooks", "fwd_hooks")
        hooks = [[len(vars(m).get(name, ())) for name in holders] for m in modules]
        counts = [getattr(held, name) for held, name in unrolled.counts_of_a_run()]
        return hooks, counts, unrolled.cfg.n_iterations, torch.is_grad_enabled()

    # A hook of the user's own: what nobody listens to is not routed.
    with unrolled.hooks([("iter.1.0.hook_resid_post", lambda x, hook: 2 * x)]):
        logits, longer, before = unrolled(tokens), use(), condition()
        n_lines = interrupted_at(None, use, SPARED, files)
        spread = range(0, n_lines, 1 + n_lines // (60 if files is ROUTES else 8))
        for moment in sorted({*spread, *range(n_lines - 4, n_lines)}):
            assert interrupted_at(moment, use, SPARED, files) is None, moment
            assert condition() == before, moment
        assert torch.equal(unrolled(tokens), logits) and torch.equal(use(), longer)


def test_weights_are_seen_and_not_copied(family, tokens):
    unrolled = unroll(bridged(family))
    looped = unrolled.looped()
    assert_close(looped(tokens), unrolled(tokens), **CLOSE)
    before = unrolled(tokens)
    with torch.no_grad():
        for name, weight in unrolled.bridge.original_model.named_parameters():
            if "down_proj" in name or "mlp" in name:
                weight.mul_(1.5)
    assert not torch.allclose(unrolled(tokens), before)
    assert_close(looped(tokens), unrolled(tokens), **CLOSE)


def metric(logits):
    return (logits[:, -1, 5] - logits[:, -1, 8]).sum()


def test_patching_is_that_of_the_looped_model(unrolled, looped, tokens):
    clean, corrupted = tokens[:1, :4], tokens[1:, :4]
    grids = []
    for model in (unrolled, looped):
        with torch.no_grad():
            _, cache = model.run_with_cache(clean)
            grids.append(
                (
                    activation_patch(
                        model, corrupted, cache, metric, "z", ("iteration", "head"), progress=False
                    ),
                    activation_patch(
                        model, corrupted, cache, metric, "resid_mid", ("block",), progress=False
                    ),
                    upstream_patching.get_act_patch_resid_pre(model, corrupted, cache, metric),
                )
            )
    for found, expected in zip(*grids, strict=True):
        assert found.shape == expected.shape
        assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_measurements_are_those_of_the_looped_model(unrolled, looped, tokens):
    metrics = ("residual_norm", "successive_difference", "fixed_point_distance")
    profiles = [
        measure(model, list(tokens), metrics, progress=False) for model in (unrolled, looped)
    ]
    for name in profiles[0].metrics:
        found, expected = (profile.mean(name) for profile in profiles)
        assert_close(found, expected, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_the_logit_lens_is_that_of_the_looped_model(unrolled, looped, tokens):
    with torch.no_grad():
        found, expected = (
            lens.logit_lens(model, tokens, points="states") for model in (unrolled, looped)
        )
    assert torch.equal(found.predictions, expected.predictions)
    for statistic in ("top_probabilities", "entropy", "kl_to_final"):
        assert_close(getattr(found, statistic), getattr(expected, statistic), rtol=1e-3, atol=1e-4)


def test_generation_without_a_key_value_cache(unrolled, looped, tokens):
    options = dict(do_sample=False, stop_at_eos=False, verbose=False, max_new_tokens=3)
    found = unrolled.generate(tokens, use_past_kv_cache=False, **options)
    assert torch.equal(found, looped.generate(tokens, **options))
    with pytest.raises(LoopedSemanticsError, match="use_past_kv_cache=False"):
        unrolled.generate(tokens, **options)


# What is refused.


@pytest.mark.parametrize(
    "arguments",
    [{"start_at_layer": 1}, {"exit_at": 0}, {"start_at_iteration": 1}, {"weighted_exit": True}],
)
def test_what_needs_blocks_one_by_one_is_refused(unrolled, tokens, arguments):
    with pytest.raises(LoopedSemanticsError, match=r"model\.looped\(\)"):
        unrolled(tokens, **arguments)


def test_an_initial_state_where_the_architecture_draws_one():
    unrolled, looped = pair("huginn")
    expected = reference("huginn")
    state = expected["initial_state"]
    tokens = expected["tokens"]
    assert_close(unrolled(tokens, initial_state=state), expected["logits"], **CLOSE)
    assert_close(
        unrolled(tokens, initial_state=state), looped(tokens, initial_state=state), **CLOSE
    )
    with pytest.raises(ValueError, match=r"initial_state must be \[batch, pos, d_model\]"):
        unrolled(tokens, initial_state=state[:, :1])
    unrolled, _ = pair("ouro")
    with pytest.raises(LoopedSemanticsError, match="edit hook_initial_state"):
        unrolled(tokens, initial_state=state)


def test_padding_is_honoured_or_refused():
    unrolled, _ = pair("ouro")
    tokens = reference("ouro")["tokens"]
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    found = unrolled(tokens, attention_mask=mask)
    assert not torch.allclose(found[1, 3:], unrolled(tokens)[1, 3:])
    assert_close(found[0], unrolled(tokens)[0])
    huginn, _ = pair("huginn")
    assert_close(huginn(tokens, attention_mask=torch.ones_like(tokens)), huginn(tokens))
    with pytest.raises(LoopedSemanticsError, match="ignores the attention mask"):
        huginn(tokens, attention_mask=mask)


def test_processed_weights_are_refused():
    tokens = reference("ouro")["tokens"]
    bridge = bridged("ouro")
    unrolled = unroll(bridge)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
        assert_close(unrolled(tokens), pair("ouro")[1](tokens), **CLOSE)
        bridge.enable_compatibility_mode(disable_warnings=True)
    for use in (lambda: unrolled(tokens), lambda: unroll(bridge)):
        with pytest.raises(LoopedSemanticsError, match="no_processing=True"):
            use()


def test_another_number_of_firings_is_refused(family, tokens):
    unrolled = unroll(bridged(family))
    loose = dataclasses.replace(unrolled._bridged, iterations=_nothing, arguments=lambda *_: {})
    object.__setattr__(unrolled, "_bridged", loose)
    # Of two stacks, the one whose calls are fewer or more is the one to complain.
    unrolled.set_iterations(unrolled.cfg.n_iterations - CYCLE[family])
    with pytest.raises(LoopedSemanticsError, match="fired more than"):
        unrolled.run_with_cache(tokens)
    unrolled.set_iterations(unrolled.cfg.n_iterations + 2 * CYCLE[family])
    with pytest.raises(LoopedSemanticsError, match="cannot be told apart"):
        unrolled.run_with_cache(tokens)


def test_what_is_no_looped_bridge_is_refused():
    with pytest.raises(LoopedSemanticsError, match=r"ouro, huginn, hrm-text.*LoopedTransformer"):
        unroll(pair("ouro")[1])
    plain = plain_model(n_layers=1, d_model=8, d_head=4, n_ctx=8, d_vocab=9, act_fn="gelu", seed=0)
    with pytest.raises(LoopedSemanticsError, match="needs no unrolling"):
        unroll(plain)


def test_a_variant_that_is_not_known_is_refused():
    bridge = bridged("ouro")
    bridge.original_model.config.attention_bias = True
    with pytest.raises(LoopedSemanticsError, match="attention_bias"):
        unroll(bridge)
    bridge.original_model.config.attention_bias = False
    bridge.original_model.config.intermediate_size = 40
    with pytest.raises(LoopedSemanticsError, match=r"expected shape \(40, 48\)"):
        unroll(bridge)


def test_hrm_text_takes_a_prefix_and_whole_cycles():
    unrolled, looped = pair("hrm_text")
    expected = reference("hrm_text")
    tokens, prefix = expected["tokens"], expected["token_type_ids"]
    assert_close(unrolled(tokens, prefix_mask=prefix), expected["logits_prefix"], **CLOSE)
    assert_close(looped(tokens, prefix_mask=prefix), expected["logits_prefix"], **CLOSE)
    assert not torch.allclose(expected["logits_prefix"], expected["logits"], atol=1e-2)
    with pytest.raises(ConfigError, match="multiple of 4"):
        unrolled(tokens, n_iterations=6)
    with pytest.raises(LoopedSemanticsError, match="edit hook_initial_state"):
        unrolled(tokens, initial_state=torch.zeros(*tokens.shape, 48))
    with pytest.raises(ValueError, match="prefix_mask=True"):
        pair("ouro")[0](tokens, prefix_mask=prefix)


def test_norms_without_weights_can_only_be_read():
    unrolled, looped = pair("hrm_text")
    tokens = reference("hrm_text")["tokens"]
    name, seen = "iter.1.0.ln1.hook_scale", []
    unrolled.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: seen.append(x.clone()))])
    assert_close(seen[0], looped.run_with_cache(tokens)[1][name], **CLOSE)
    with pytest.raises(LoopedSemanticsError, match="or a gradient inside a norm"):
        with unrolled.hooks(bwd_hooks=[(name, lambda x, hook: None)]):
            unrolled(tokens)
    for point, hook in ((name, edit), ("blocks.0.attn.hook_gate", lambda x, hook: 2.0 * x + 1.0)):
        with pytest.raises(LoopedSemanticsError, match=r"norm that has no weight|outside 0 to 1"):
            unrolled.run_with_hooks(tokens, fwd_hooks=[(point, hook)])


@pytest.mark.parametrize("call", ["to", "process_weights_"])
def test_the_weights_belong_to_the_bridge(unrolled, call):
    with pytest.raises(LoopedSemanticsError, match="belong to the bridge"):
        getattr(unrolled, call)(*([torch.float64] if call == "to" else []))


def test_mode_is_that_of_the_bridge(family):
    unrolled = unroll(bridged(family))
    unrolled.train()
    assert unrolled.bridge.training and unrolled.bridge.original_model.training
    unrolled.eval()
    assert not unrolled.bridge.original_model.training
