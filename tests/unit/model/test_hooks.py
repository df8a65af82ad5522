"""Hook points: each has a name by coordinate, fires once, and edits stay where they are made."""

import pytest
import torch

from tests.closeness import assert_close
from tests.models import ARCHITECTURES, tiny_model, tiny_tokens
from tl_loops import HookNameError

TOKENS = tiny_tokens()


@pytest.fixture(params=ARCHITECTURES, scope="module")
def model(request):
    return tiny_model(request.param)


def test_every_hook_point_fires_once(model):
    fired: list[str] = []
    model.run_with_hooks(
        TOKENS, fwd_hooks=[(lambda name: True, lambda x, hook: fired.append(hook.name))]
    )
    assert len(fired) == len(set(fired))
    optional = ("attn.hook_result", "hook_mlp_in", "hook_attn_in", "_input")
    silent = [n for n in model.hook_dict if n not in fired and not n.endswith(optional)]
    assert silent == []


def test_one_tensor_has_one_entry_under_all_its_names(model):
    _, cache = model.run_with_cache(TOKENS)
    layout = model.layout
    for index in range(layout.n_layers):
        for rest in ("hook_resid_pre", "attn.hook_pattern", "mlp.hook_post"):
            canonical = f"blocks.{index}.{rest}"
            assert cache[canonical] is cache[layout.alias(canonical)]
    last = layout.n_iterations - 1
    index = layout.index(iteration=last, layer=1)
    assert cache["pattern", index] is cache[f"iter.{last}.1.attn.hook_pattern"]
    assert cache["pattern", index] is cache["pattern", last, 1]
    assert f"iter.{last}.1.attn.hook_pattern" in cache
    assert f"iter.{last + 1}.1.attn.hook_pattern" not in cache
    assert not any(name.startswith("iter.") and ".attn." in name for name in cache.keys())


def test_hooks_do_not_change_the_numbers(model):
    plain = model(TOKENS)
    cached, _ = model.run_with_cache(TOKENS)
    assert_close(cached, plain, rtol=1e-5, atol=1e-5)


def test_states_meet_at_the_boundaries(model):
    _, cache = model.run_with_cache(TOKENS)
    assert torch.equal(cache["hook_initial_state"], cache["iter.0.hook_state_in"])
    for t in range(model.cfg.n_iterations):
        assert torch.equal(cache[f"iter.{t}.hook_injected"], cache[f"iter.{t}.0.hook_resid_pre"])
        if t:
            assert torch.equal(
                cache[f"iter.{t - 1}.hook_state_out"], cache[f"iter.{t}.hook_state_in"]
            )
        if model.cfg.injection is None:
            assert torch.equal(cache[f"iter.{t}.hook_state_in"], cache[f"iter.{t}.hook_injected"])
        else:
            injected = model.injection(
                cache[f"iter.{t}.hook_state_in"], model.injection.prepare(cache["hook_injection"])
            )
            assert_close(cache[f"iter.{t}.hook_injected"], injected)


def test_an_edit_in_place_of_one_injected_input_stays_in_its_iteration(model):
    def edit(x, hook):
        x[:, 2] = 7.0

    _, clean = model.run_with_cache(TOKENS)
    with model.hooks(fwd_hooks=[("iter.1.hook_injected", edit)]):
        _, edited = model.run_with_cache(TOKENS)
    assert (edited["iter.1.0.hook_resid_pre"][:, 2] == 7.0).all()
    before = model.layout.index(iteration=1, layer=0)
    for name in clean.keys():
        block = int(name.split(".")[1]) if name.startswith("blocks.") else None
        earlier = block is not None and block < before
        if earlier or name in ("hook_embed", "hook_injection", "hook_initial_state"):
            assert torch.equal(edited[name], clean[name]), name
        if name.startswith("iter.0.") or name == "iter.1.hook_state_in":
            assert torch.equal(edited[name], clean[name]), name
    if model.cfg.injection is not None:
        # What later iterations inject is e, untouched: only their states differ.
        term = model.injection.prepare(clean["hook_injection"])
        for t in range(2, model.cfg.n_iterations):
            expected = model.injection(edited[f"iter.{t}.hook_state_in"], term)
            assert_close(edited[f"iter.{t}.hook_injected"], expected)


def test_an_edit_in_place_never_reaches_an_earlier_entry_of_a_cache(model):
    def edit(x, hook):
        x.zero_()

    _, clean = model.run_with_cache(TOKENS)
    for point in ("iter.1.0.hook_resid_pre", "iter.1.hook_state_in", "iter.0.hook_state_out"):
        with model.hooks(fwd_hooks=[(point, edit)]):
            _, edited = model.run_with_cache(TOKENS)
        last = model.layout.index(iteration=0, layer=model.cfg.n_core - 1)
        name = f"blocks.{last}.hook_resid_post"
        assert torch.equal(edited[name], clean[name])


def test_aliases_work_everywhere(model):
    name, canonical = "iter.1.0.attn.hook_z", f"blocks.{model.layout.index(iteration=1, layer=0)}"
    canonical += ".attn.hook_z"
    seen: list[str] = []

    def note(x, hook):
        seen.append(hook.name)

    model.run_with_hooks(TOKENS, fwd_hooks=[(name, note)])
    with model.hooks(fwd_hooks=[(name, note)]):
        model(TOKENS)
    model.add_hook(name, note)
    model(TOKENS)
    model.reset_hooks()
    model(TOKENS)
    assert seen == [canonical] * 3
    _, cache = model.run_with_cache(TOKENS, names_filter=name)
    assert list(cache.keys()) == [canonical]
    _, cache = model.run_with_cache(TOKENS, names_filter=[name, "iter.1.hook_state_out"])
    assert set(cache.keys()) == {canonical, "iter.1.hook_state_out"}
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda n: n == canonical)
    assert list(cache.keys()) == [canonical]


def test_backward_hooks_reach_every_iteration(model):
    names = [f"iter.{t}.hook_state_out" for t in range(model.cfg.n_iterations)]
    gradients: dict[str, float] = {}

    def note(gradient, hook):
        gradients[hook.name] = float(gradient.abs().sum())

    with model.hooks(bwd_hooks=[(name, note) for name in names]):
        model(TOKENS, return_type="loss").backward()
    assert list(gradients) == names[::-1]
    assert all(total > 0 for total in gradients.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("iter.9.0.hook_resid_pre", "no iteration 9"),
        ("iter.0.7.hook_resid_pre", "no layer of the core 7"),
        ("iter.0.0.hook_resid_pr", "did you mean 'iter.0.0.hook_resid_pre'"),
        ("blocks.0.attn.hook_patern", "did you mean 'blocks.0.attn.hook_pattern'"),
        ("blocks.0.attn.hook_result", "set_use_attn_result"),
        ("blocks.0.hook_mlp_in", "set_use_hook_mlp_in"),
    ],
)
def test_a_name_that_matches_nothing_is_refused(model, name, message):
    for call in (
        lambda: model.run_with_hooks(TOKENS, fwd_hooks=[(name, lambda x, hook: x)]),
        lambda: model.run_with_cache(TOKENS, names_filter=name),
        lambda: model.run_with_cache(TOKENS, names_filter=[name]),
        lambda: model.add_hook(name, lambda x, hook: x),
    ):
        with pytest.raises(HookNameError, match=message):
            call()
    assert not any(point.fwd_hooks for point in model.hook_points())


def test_a_run_that_stops_before_what_it_is_asked_for(model):
    """Tools read the first number of a hook name as a layer and stop after it."""
    layout, last = model.layout, model.cfg.n_iterations - 1
    block = layout.index(iteration=last, layer=0)
    name, canonical = f"iter.{last}.0.hook_resid_post", f"blocks.{block}.hook_resid_post"
    for asked in (name, [name], [name, "blocks.0.hook_resid_post"]):
        with pytest.raises(ValueError, match=canonical):
            model.run_with_cache(TOKENS, names_filter=asked, stop_at_layer=min(last + 1, block))
    # Names of TransformerLens that are not reached are left out, as there.
    asked = ["ln_final.hook_scale", canonical, "blocks.0.hook_resid_post"]
    _, cache = model.run_with_cache(TOKENS, names_filter=asked, stop_at_layer=1)
    assert list(cache) == ["blocks.0.hook_resid_post"]
    # What is reached is there, under either name, and with the numbers of a whole run.
    _, whole = model.run_with_cache(TOKENS, names_filter=[name])
    for asked in (name, canonical, [canonical, f"iter.{last}.hook_state_in"]):
        _, cache = model.run_with_cache(TOKENS, names_filter=asked, stop_at_layer=block + 1)
        assert torch.equal(cache[canonical], whole[canonical])
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda n: n == canonical, stop_at_layer=1)
    assert canonical not in cache


def test_optional_hook_points_fire_when_asked_for(model):
    plain = model(TOKENS)
    model.set_use_attn_result(True)
    model.set_use_hook_mlp_in(True)
    model.set_use_split_qkv_input(True)
    try:
        logits, cache = model.run_with_cache(TOKENS)
        result = cache["iter.1.0.attn.hook_result"]
        block = model.blocks[model.layout.index(iteration=1, layer=0)]
        z = cache["iter.1.0.attn.hook_z"]
        assert_close(result, torch.einsum("bphe,hed->bphd", z, block.attn.W_O))
        assert "iter.1.0.hook_q_input" in cache
        assert "iter.1.0.hook_mlp_in" in cache
    finally:
        model.set_use_attn_result(False)
        model.set_use_hook_mlp_in(False)
        model.set_use_split_qkv_input(False)
    assert_close(logits, plain, rtol=1e-5, atol=1e-5)


def test_grouped_keys_can_be_seen_once_a_query_head():
    model = tiny_model("olmo_grouped")
    plain, cache = model.run_with_cache(TOKENS)
    assert cache["k", 1].shape[2] == 2
    model.set_ungroup_grouped_query_attention(True)
    logits, cache = model.run_with_cache(TOKENS)
    assert cache["k", 1].shape[2] == 4
    assert_close(logits, plain, rtol=1e-5, atol=1e-5)
