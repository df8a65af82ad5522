"""Transplants of single sites: across iterations, between runs, between models."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.bridged.models import FIXTURES, bridged
from tests.closeness import assert_close
from tests.feedforward import plain_model
from tests.models import SIZES, tiny_model, tiny_tokens
from tl_loops import LoopedSemanticsError, LoopedTransformer, unroll
from tl_loops.layout.selection import paired_parts
from tl_loops.patching import (
    Site,
    activation_patch,
    transplant_hooks,
    transplant_sites,
    transplant_states,
)

torch.set_num_threads(1)
NAMES = ("ouro", "huginn", "olmo_grouped", "retrofitted")
SITES = "q k v z rot_q rot_k pattern attn_scores attn_out mlp_out resid_pre state_out".split()


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: tiny_model(name, n_iterations=3) for name in NAMES}


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -2, 5]).mean()


def close(found: Tensor, expected: Tensor) -> None:
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


def run(model: Any, tokens: Tensor, *hooks: list) -> Tensor:
    return model.run_with_hooks(tokens, fwd_hooks=[pair for some in hooks for pair in some])


# Identities.


@torch.no_grad()
@pytest.mark.parametrize("activation", SITES)
@pytest.mark.parametrize("name", ["ouro", "olmo_grouped"])
def test_a_runs_own_value_changes_no_bit(models, name, activation):
    model, tokens = models[name], tiny_tokens(2, 5)
    kept = activation if activation != "state_out" else "hook_state_out"
    logits, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith(kept))
    hooks = transplant_hooks(model, cache, Site(activation))
    assert torch.equal(run(model, tokens, hooks), logits)
    found = transplant_sites(model, tokens, cache, metric, [Site(activation)], progress=False)
    close(found[0, 0], metric(logits))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_all_that_is_added_and_the_first_stream_are_the_other_run(models, name):
    model = models[name]
    theirs, cache = model.run_with_cache(tiny_tokens(2, 5))
    tokens = tiny_tokens(2, 5, seed=9)
    sites = [Site("z"), Site("mlp_out"), Site("resid_pre", block=0)]
    close(run(model, tokens, transplant_hooks(model, cache, sites)), theirs)
    found = transplant_sites(model, tokens, cache, metric, [sites], progress=False)
    close(found[0, 0], metric(theirs))
    without = run(model, tokens, transplant_hooks(model, cache, sites[:2]))
    assert (without - theirs).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("source", "target"), [(2, 2), (0, 2), (2, 0)])
def test_queries_and_keys_together_are_the_pattern(models, name, source, target):
    model, tokens = models[name], tiny_tokens(2, 5, seed=9)
    _, cache = model.run_with_cache(tiny_tokens(2, 5))

    def hooks(*activations: str) -> list:
        here, there = ([Site(a, t, 1) for a in activations] for t in (source, target))
        return transplant_hooks(model, cache, here, there)

    expected = run(model, tokens, hooks("pattern"))
    close(run(model, tokens, hooks("q", "k")), expected)
    assert (run(model, tokens, hooks("q")) - expected).abs().max() > 1e-4
    # With the values, too, it is the attention's output; which z alone says, before W_O.
    close(run(model, tokens, hooks("q", "k", "v")), run(model, tokens, hooks("z")))
    close(run(model, tokens, hooks("z")), run(model, tokens, hooks("attn_out")))


@torch.no_grad()
def test_the_diagonal_of_sites_is_activation_patching(models):
    model, tokens = models["huginn"], tiny_tokens(2, 5, seed=9)
    _, cache = model.run_with_cache(tiny_tokens(2, 5))
    for activation in ("q", "pattern", "mlp_out"):
        sites = [Site(activation, t, 1) for t in range(3)]
        found = transplant_sites(model, tokens, cache, metric, sites, progress=False)
        expected = activation_patch(
            model, tokens, cache, metric, activation, ("iteration",), progress=False,
            where={"layer": 1},
        )  # fmt: skip
        close(found.diagonal(), expected)
    sites = [Site("state_out", t) for t in range(3)]
    found = transplant_sites(model, tokens, cache, metric, sites, progress=False)
    states = transplant_states(model, tokens, cache, metric, progress=False)
    assert torch.equal(found, states)


# Against hooks by hand.


@torch.no_grad()
@pytest.mark.parametrize("activation", ["q", "z", "mlp_out", "pattern"])
def test_chosen_places_pair_up_in_their_order(models, activation):
    model, tokens = models["huginn"], tiny_tokens(2, 6, seed=9)
    _, cache = model.run_with_cache(tiny_tokens(2, 6))
    heads = ([2, 0], [1, 3]) if activation != "mlp_out" else (None, None)
    source = Site(activation, 0, 1, head=heads[0], pos=[1, 0, 3])
    target = Site(activation, 2, 0, head=heads[1], pos=[2, 1, 5])
    value = cache[activation, 0, 1]

    def by_hand(rows: Tensor, hook: Any) -> Tensor:
        rows = rows.clone()
        for a, b in zip([1, 0, 3], [2, 1, 5], strict=True):
            if heads[0] is None:
                rows[:, b] = value[:, a]
                continue
            for h, g in zip(*heads, strict=True):
                if activation == "pattern":
                    rows[:, g, b] = value[:, h, a]
                else:
                    rows[:, b, g] = value[:, a, h]
        return rows

    expected = run(
        model, tokens, [(model.layout.hook_name(activation, iteration=2, layer=0), by_hand)]
    )
    found = run(model, tokens, transplant_hooks(model, cache, source, target))
    assert torch.equal(found, expected)
    assert (found - model(tokens)).abs().max() > 1e-4
    grid = transplant_sites(model, tokens, cache, metric, [source], [target], progress=False)
    close(grid[0, 0], metric(expected))


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, None])
def test_every_cell_is_the_run_with_its_hooks(models, batch_size):
    model, tokens = models["olmo_grouped"], tiny_tokens(2, 6, seed=9)
    _, cache = model.run_with_cache(tiny_tokens(1, 6))
    sources = [Site("k", 0, 1, pos=2), Site("k", 1, 0, pos=-1), [Site("k", 2, 0, pos=3)]]
    targets = [Site("k", 2, 0, pos=[1, 4]), Site("k", 0, 0, pos=5)]
    found = transplant_sites(
        model, tokens, cache, metric, sources, targets, batch_size=batch_size, progress=False
    )
    for i, source in enumerate(sources):
        for j, target in enumerate(targets):
            hooks = transplant_hooks(model, cache, source, target)
            close(found[i, j], metric(run(model, tokens, hooks)))
    assert len({round(float(x), 5) for x in found.flatten()}) == 6


@torch.no_grad()
def test_one_source_serves_several_targets(models):
    model, tokens = models["ouro"], tiny_tokens(2, 5)
    _, cache = model.run_with_cache(tokens)
    one = Site("z", 1, 2, head=3)
    every = transplant_hooks(model, cache, one, Site("z", [0, 2], 1, head=[0, 1]))
    each = [
        transplant_hooks(model, cache, one, Site("z", t, 1, head=h)) for t in (0, 2) for h in (0, 1)
    ]
    assert torch.equal(run(model, tokens, every), run(model, tokens, *each))


@torch.no_grad()
def test_a_longer_run_and_a_mapping_give_values_too(models):
    model, tokens = models["ouro"], tiny_tokens(2, 5, seed=9)
    _, longer = model.run_with_cache(tiny_tokens(2, 5), n_iterations=6)
    source, target = Site("v", -1, 0), Site("v", 1, 2)
    found = run(model, tokens, transplant_hooks(model, longer, source, target))
    value = longer["blocks.15.attn.hook_v"]
    name = "blocks.5.attn.hook_v"
    assert torch.equal(found, run(model, tokens, [(name, lambda v, hook: value.clone())]))
    hooks = transplant_hooks(model, {"blocks.1.attn.hook_v": value}, Site("v", 0, 1), target)
    assert torch.equal(run(model, tokens, hooks), found)


def test_gradients_reach_the_source(models):
    model, tokens = models["retrofitted"], tiny_tokens(1, 4, seed=9)
    with torch.no_grad():
        _, cache = model.run_with_cache(tiny_tokens(1, 4))
    given = {"blocks.1.attn.hook_q": cache["blocks.1.attn.hook_q"].clone().requires_grad_()}
    sites = [Site("q", block=1)], [Site("q", block=3)]
    transplant_sites(
        model, tokens, given, metric, *sites, progress=False, gradients=True
    ).sum().backward()
    gradient = given["blocks.1.attn.hook_q"].grad
    step = 1e-2 * torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ends = [
            transplant_sites(
                model, tokens, {k: v + sign * step for k, v in given.items()}, metric, *sites,
                progress=False,
            )
            for sign in (1, -1)
        ]  # fmt: skip
    assert_close((gradient * step).sum(), (ends[0] - ends[1]).sum() / 2, atol=1e-5, rtol=1e-2)
    model.zero_grad()


# Between models.


@torch.no_grad()
def test_a_model_of_equal_weights_gives_what_the_model_itself_gives(models):
    model, twin, tokens = models["ouro"], tiny_model("ouro", n_iterations=5), tiny_tokens(2, 5, 9)
    own, other = (m.run_with_cache(tiny_tokens(2, 5))[1] for m in (model, twin))
    for activation in ("q", "k", "v", "z", "pattern", "mlp_out", "state_out"):
        layer = None if activation == "state_out" else 1
        source, target = Site(activation, 2, layer), Site(activation, 1, layer)
        ours, theirs = (
            run(model, tokens, transplant_hooks(model, cache, source, target))
            for cache in (own, other)
        )
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_another_model_of_equal_width_has_coordinates_of_its_own(models):
    model, other, tokens = models["ouro"], models["huginn"], tiny_tokens(2, 5)
    _, cache = other.run_with_cache(tokens)
    found = run(model, tokens, transplant_hooks(model, cache, Site("q", 2, 1), Site("q", 0, 1)))
    value = cache["blocks.7.attn.hook_q"]  # two prelude layers, two layers an iteration
    expected = [("blocks.1.attn.hook_q", lambda q, hook: value.clone())]
    assert torch.equal(found, run(model, tokens, expected))
    assert (found - model(tokens)).abs().max() > 1e-4


@torch.no_grad()
def test_a_feedforward_model_gives_by_block(models):
    model, tokens = models["ouro"], tiny_tokens(2, 5)
    plain = plain_model(
        n_layers=3, d_model=32, d_head=8, n_heads=4, d_mlp=48, d_vocab=50, n_ctx=64, seed=0,
        act_fn="gelu", normalization_type="LN", device="cpu",
    )  # fmt: skip
    _, cache = plain.run_with_cache(tokens)
    hooks = transplant_hooks(model, cache, Site("z", block=2), Site("z", 1, 0))
    value = cache["blocks.2.attn.hook_z"]
    expected = [("blocks.3.attn.hook_z", lambda z, hook: value.reshape(z.shape).clone())]
    assert torch.equal(run(model, tokens, hooks), run(model, tokens, expected))
    with pytest.raises(ValueError, match="no iterations"):
        transplant_hooks(model, cache, Site("z", 0, 0))
    # The other way round: a looped model gives, a feedforward model takes.
    _, looped = model.run_with_cache(tokens)
    found = run(plain, tokens, transplant_hooks(plain, looped, Site("z", 2, 0), Site("z", block=1)))
    value = looped["z", 2, 0]
    put = [("blocks.1.attn.hook_z", lambda z, hook: value.reshape(z.shape).clone())]
    assert torch.equal(found, run(plain, tokens, put))
    # Its patterns are bounded, too, also where it shows no scores before them.
    own = transplant_hooks(plain, cache, Site("pattern"))
    assert_close(run(plain, tokens, own), plain(tokens), atol=1e-5, rtol=1e-5)
    ahead = Site("pattern", block=0, pos=3), Site("pattern", block=0, pos=1)
    hooks = transplant_hooks(plain, cache, *ahead)
    for _ in range(2):
        with pytest.raises(ValueError, match="does not see"):
            run(plain, tokens, hooks)
    with pytest.raises(ValueError, match="does not see"):
        transplant_sites(plain, tokens, cache, metric, [ahead[0]], [ahead[1]], progress=False)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:A forward hook edited")
def test_an_unrolled_bridge_takes_and_gives():
    bridge = unroll(bridged("ouro"))
    looped = LoopedTransformer.from_pretrained_no_processing(FIXTURES / "ouro", device="cpu")
    tokens = torch.randint(0, 50, (2, 2, 5), generator=torch.Generator().manual_seed(0))
    caches = [model.run_with_cache(tokens[0])[1] for model in (bridge, looped)]
    for activation in ("q", "v", "z", "pattern", "mlp_out"):
        sites = Site(activation, 2, 1), Site(activation, 0, 1)
        found = [
            run(model, tokens[1], transplant_hooks(model, cache, *sites))
            for model in (bridge, looped)
            for cache in caches
        ]
        for other in found[1:]:
            assert_close(other, found[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="does not see"):
        sites = Site("pattern", 0, 0, pos=3), Site("pattern", 0, 0, pos=1)
        run(bridge, tokens[1], transplant_hooks(bridge, caches[0], *sites))


# What cannot be moved.


@torch.no_grad()
def test_a_pattern_stays_causal(models):
    model, tokens = models["ouro"], tiny_tokens(2, 5)
    _, cache = model.run_with_cache(tokens)
    for activation in ("pattern", "attn_scores"):
        later, earlier = Site(activation, 0, 0, pos=3), Site(activation, 1, 0, pos=1)
        with pytest.raises(ValueError, match="position 3 is on position 2, which position 1"):
            run(model, tokens, transplant_hooks(model, cache, later, earlier))
        with pytest.raises(ValueError, match="position 3 is on position 2, which position 1"):
            transplant_sites(model, tokens, cache, metric, [later], [earlier], progress=False)
    found = run(model, tokens, transplant_hooks(model, cache, Site("pattern", 0, 0, pos=1),
                                                Site("pattern", 1, 0, pos=3)))  # fmt: skip
    assert found.isfinite().all()


@torch.no_grad()
def test_a_pattern_does_not_look_at_padding(models):
    model, tokens = models["ouro"], tiny_tokens(1, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    _, whole = model.run_with_cache(tokens)
    _, padded = model.run_with_cache(tokens, attention_mask=mask)
    site = [Site("pattern", 1, 0, pos=-1)]
    with pytest.raises(ValueError, match="position 4 is on position 0"):
        transplant_sites(model, tokens, whole, metric, site, attention_mask=mask, progress=False)
    hooks = transplant_hooks(model, whole, site)
    with pytest.raises(ValueError, match="padding"):
        model.run_with_hooks(tokens, fwd_hooks=hooks, attention_mask=mask)
    own = transplant_sites(model, tokens, padded, metric, site, attention_mask=mask, progress=False)
    close(own[0, 0], metric(model(tokens, attention_mask=mask)))
    # A prompt that sees less is no problem for one that sees more.
    transplant_sites(model, tokens, padded, metric, site, progress=False)


@torch.no_grad()
def test_shapes_that_differ_are_refused(models):
    model, grouped, tokens = models["ouro"], models["olmo_grouped"], tiny_tokens(2, 5)
    _, cache = model.run_with_cache(tokens)
    _, other = grouped.run_with_cache(tokens)

    def refused(match: str, *sites: Site, cache: Any = cache, tokens: Tensor = tokens) -> None:
        with pytest.raises(ValueError, match=match):
            transplant_sites(model, tokens, cache, metric, [sites[0]], [sites[-1]], progress=False)
        with pytest.raises(ValueError, match=match):
            run(model, tokens, transplant_hooks(model, cache, *sites))

    for width, site in (("d_model", "mlp_out"), ("d_head", "q"), ("d_mlp", "post")):
        wide = tiny_model("ouro", n_iterations=2, **{width: 2 * SIZES[width]})
        _, of_wide = wide.run_with_cache(tokens)
        refused(f"equal {width}", Site(site, 0, 0), cache=of_wide)
    refused("gives 2 heads and the target .* takes 4", Site("k", 0, 0), cache=other)
    refused("gives 2 heads .* takes 1", Site("q", 0, 0, head=[0, 1]), Site("q", 0, 0, head=2))
    refused("gives 4 positions .* takes 5", Site("q", 0, 0), tokens=tiny_tokens(2, 5),
            cache=model.run_with_cache(tiny_tokens(2, 4))[1])  # fmt: skip
    refused("same number of tokens", Site("pattern", 0, 0, pos=1),
            cache=model.run_with_cache(tiny_tokens(2, 4))[1])  # fmt: skip
    refused("batch size 3", Site("q", 0, 0), cache=model.run_with_cache(tiny_tokens(3, 5))[1])
    refused("same activation", Site("q", 0, 0), Site("mlp_out", 0, 0))
    refused("same activation", Site("pattern", 0, 0), Site("attn_scores", 0, 0))
    refused("6 hook points|names 9 hook points", Site("q"), Site("q", 0, [0, 1]))
    refused("lacks", Site("q", 0, 0), cache={"hook_embed": cache["hook_embed"]})
    refused("no activation", Site("injection"))
    refused("must be what run_with_cache", Site("q"), cache=5)
    # One head of a grouped model goes into one head of another.
    hooks = transplant_hooks(model, other, Site("k", 0, 0, head=1), Site("k", 0, 0, head=3))
    assert run(model, tokens, hooks).isfinite().all()


@torch.no_grad()
def test_places_that_there_are_not(models):
    model, tokens = models["ouro"], tiny_tokens(2, 5)
    _, cache = model.run_with_cache(tokens)
    _, grouped = models["olmo_grouped"].run_with_cache(tokens)
    with pytest.raises(IndexError, match="no iteration 3"):
        transplant_hooks(model, cache, Site("q", 3, 0))
    with pytest.raises(IndexError, match="no head 2"):
        transplant_hooks(model, grouped, Site("k", 0, 0, head=2), Site("k", 0, 0, head=3))
    with pytest.raises(IndexError, match="no pos 7"):
        transplant_sites(model, tokens, cache, metric, [Site("q", 0, 0, pos=7)], progress=False)
    with pytest.raises(ValueError, match="at least one source"):
        transplant_sites(model, tokens, cache, metric, [])
    with pytest.raises(ValueError, match="1 source sites meet 2"):
        transplant_hooks(model, cache, Site("q"), [Site("q"), Site("k")])


@torch.no_grad()
def test_keys_of_iterations_that_share_them_stay(models):
    model, tokens = tiny_model("retrofitted", kv_sharing="first"), tiny_tokens(2, 5)
    _, cache = model.run_with_cache(tokens)
    for activation in ("k", "v", "rot_k"):
        with pytest.raises(LoopedSemanticsError, match="share keys and values"):
            transplant_hooks(model, cache, Site(activation, 0, 0))
        with pytest.raises(LoopedSemanticsError, match="share keys and values"):
            transplant_hooks(models["ouro"], cache, Site(activation, 0, 0))
        with pytest.raises(LoopedSemanticsError, match="share keys and values"):
            activation_patch(model, tokens, cache, metric, activation, progress=False)
    hooks = transplant_hooks(model, cache, [Site("z", 1, 0), Site("pattern", 1, 0)])
    close(run(model, tokens, hooks), model(tokens))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None)
def test_parts_are_the_pairs_in_their_order(pairs):
    parts = paired_parts(*zip(*pairs, strict=True))
    found = [
        pair
        for a, b in parts
        for pair in zip(range(a.start, a.stop), range(b.start, b.stop), strict=True)
    ]
    assert found == pairs
    jumps = sum(x[0] + 1 != y[0] or x[1] + 1 != y[1] for x, y in pairwise(pairs))
    assert len(parts) == jumps + 1
