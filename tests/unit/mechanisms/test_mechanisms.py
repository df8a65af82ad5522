"""Step embeddings, halting, routing and hyper-connections against plain statements of them."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.closeness import assert_close
from tests.models import MECHANISMS, tiny_config, tiny_model, tiny_tokens
from tl_loops import ConfigError, LoopedSemanticsError, LoopedTransformer, lens
from tl_loops.loop_losses import (
    act_ponder_cost,
    geometric_prior,
    ponder_loss,
    ponder_training_loss,
    routing_balance_loss,
)
from tl_loops.model.check import check_model

ALL = tuple(MECHANISMS)
MIXED = [name for name in ALL if name not in ("universal", "ponder", "learned_steps")]
"""Loops that carry more than their state."""


def drawn(name: str, **changes: Any) -> LoopedTransformer:
    """A model whose mechanisms act strongly: all weights drawn wide."""
    model = tiny_model(name, **changes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, weight in model.physical_named_parameters():
            if not key.endswith((".w", ".b")) or "gate" in key:
                weight.copy_(0.25 * torch.randn(weight.shape, generator=generator))
    return model


# A plain transformer, written from the equations.


def norm(x, w, prefix, eps=1e-6):
    if f"{prefix}.b" in w:
        return F.layer_norm(x, x.shape[-1:], w[f"{prefix}.w"], w[f"{prefix}.b"], eps)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w[f"{prefix}.w"]


def rotate(x):
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[1]), 10000.0 ** -(torch.arange(half) / half))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(x, w, prefix, rotary, allowed):
    q, k, v = (
        torch.einsum("bpd,hde->bphe", x, w[f"{prefix}.W_{n}"]) + w.get(f"{prefix}.b_{n}", 0)
        for n in "QKV"
    )
    q, k = (rotate(q), rotate(k)) if rotary else (q, k)
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(q.shape[-1])
    pattern = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    z = torch.einsum("bhqk,bkhe->bqhe", pattern, v)
    return torch.einsum("bqhe,hed->bqd", z, w[f"{prefix}.W_O"]) + w.get(f"{prefix}.b_O", 0)


def llama_block(x, w, name, allowed=None):
    if allowed is None:
        allowed = torch.ones(x.shape[1], x.shape[1]).tril().bool()
    x = x + attention(norm(x, w, f"{name}.ln1"), w, f"{name}.attn", True, allowed)
    y = norm(x, w, f"{name}.ln2")
    hidden = F.silu(y @ w[f"{name}.mlp.W_gate"]) * (y @ w[f"{name}.mlp.W_in"])
    return x + hidden @ w[f"{name}.mlp.W_out"]


def core(x, w, cfg, allowed=None):
    for layer in range(cfg.n_core):
        x = llama_block(x, w, f"core.{layer}", allowed)
    return x


def ends(model, tokens):
    """The state before the loop, and the function from what leaves the loop to the logits."""
    w, cfg = model.physical_state_dict(), model.cfg
    x = w["embed.W_E"][tokens]
    for layer in range(cfg.n_prelude):
        x = llama_block(x, w, f"prelude.{layer}")

    def read_out(s):
        for layer in range(cfg.n_coda):
            s = llama_block(s, w, f"coda.{layer}")
        return norm(s, w, "ln_final") @ w["unembed.W_U"]

    return x, read_out, w, cfg


def assert_logits(model, tokens, expected):
    with torch.no_grad():
        found = model(tokens)
    assert expected.std() > 0.05
    assert_close(found, expected, rtol=2e-4, atol=2e-4)


# Universal Transformer.


@pytest.mark.parametrize("step", [None, "sinusoidal", "position_and_step"])
def test_universal_transformer(step):
    model, tokens = drawn("universal", step_embedding=step), tiny_tokens()
    w, d = model.physical_state_dict(), model.cfg.d_model
    h = w["embed.W_E"][tokens]
    allowed = torch.ones(9, 9).tril().bool()
    for t in range(1, 5):
        P = torch.zeros(9, d)
        for i in range(9):
            for j in range(d // 2):
                scale = 10000 ** (2 * j / d)
                place = 1.0 if step == "position_and_step" else 0.0
                P[i, 2 * j] = place * math.sin(i / scale) + math.sin(t / scale)
                P[i, 2 * j + 1] = place * math.cos(i / scale) + math.cos(t / scale)
        h = h + P if step is not None else h
        a = norm(h + attention(h, w, "core.0.attn", False, allowed), w, "core.0.ln1_post")
        hidden = F.relu(a @ w["core.0.mlp.W_in"] + w["core.0.mlp.b_in"])
        transition = hidden @ w["core.0.mlp.W_out"] + w["core.0.mlp.b_out"]
        h = norm(a + transition, w, "core.0.ln2_post")
        if step is not None:
            _, cache = model.run_with_cache(tokens)
            assert_close(cache["step_embedding", t - 1], P.expand(2, 9, d))
    assert_logits(model, tokens, norm(h, w, "ln_final") @ w["unembed.W_U"])


def test_the_step_embedding_counts_iterations():
    model, tokens = drawn("learned_steps"), tiny_tokens()
    _, cache = model.run_with_cache(tokens, n_iterations=5)
    for t in range(5):
        expected = model.step_embedding.W_E[t].expand(2, 9, -1)
        assert torch.equal(cache[f"iter.{t}.hook_step_embedding"], expected)
    with pytest.raises(ConfigError, match="max_iterations=5"):
        model.set_iterations(6)
    x, read_out, w, cfg = ends(model, tokens)
    for t in range(3):
        x = core(x + w["step_embedding.W_E"][t], w, cfg)
    assert_logits(model, tokens, read_out(x))


# Adaptive computation time.


@pytest.mark.parametrize("epsilon", [0.01, 0.4])
def test_act(epsilon):
    model, tokens = drawn("act", act_epsilon=epsilon), tiny_tokens()
    x, read_out, w, cfg = ends(model, tokens)
    states, rates = [], []
    for _ in range(4):
        x = core(x, w, cfg)
        states.append(x)
        rates.append(torch.sigmoid(x @ w["exit_gate.W"] + w["exit_gate.b"])[..., 0])
    p = torch.zeros(4, 2, 9)
    cost = torch.zeros(2, 9)
    for b in range(2):
        for i in range(9):
            total = 0.0
            for t in range(4):
                rate = float(rates[t][b, i])
                if t == 3 or total + rate >= 1 - epsilon:
                    p[t, b, i] = 1 - total
                    cost[b, i] = t + 1 + p[t, b, i]
                    break
                p[t, b, i], total = rate, total + rate
    assert len(p.argmin(0).unique()) > 1  # positions halt at different iterations
    state = sum(p[t][..., None] * states[t] for t in range(4))
    assert_logits(model, tokens, read_out(state))
    _, cache = model.run_with_cache(tokens)
    halting = cache.stack_activation("halting")[..., 0]
    assert_close(halting, p)
    assert_close(halting.sum(0), torch.ones(2, 9))
    assert_close(cache["hook_halted_state"], state, rtol=1e-4, atol=1e-5)
    assert_close(act_ponder_cost(halting), cost)


def test_the_remainder_carries_the_gradient_of_the_ponder_cost():
    model, tokens = drawn("act", act_epsilon=0.4), tiny_tokens()
    kept = []
    with model.hooks([(lambda n: n.endswith("hook_halting"), lambda x, hook: kept.append(x))]):
        model(tokens)
    act_ponder_cost(torch.stack(kept)).mean().backward()
    assert model.exit_gate.W.grad.abs().sum() > 0


def test_an_edit_of_the_halting_probability_counts():
    model, tokens = drawn("act"), tiny_tokens()

    def only(t):
        def edit(x, hook):
            return torch.full_like(x, float(hook.name.startswith(f"iter.{t}.")))

        return edit

    points = [f"iter.{t}.hook_halting" for t in range(4)]
    found = model.run_with_hooks(tokens, fwd_hooks=[(name, only(1)) for name in points])
    # All weight on iteration 1: the loop ends there.
    plain = drawn("act", halting=None, exit_gate=True)
    assert_close(found, plain(tokens, n_iterations=2), rtol=1e-4, atol=1e-5)


def test_exits_of_a_sum_of_states_are_refused():
    model = drawn("act", n_coda=0)
    for arguments in (dict(exit_at=1), dict(exit_threshold=0.5), dict(weighted_exit=True)):
        with pytest.raises(LoopedSemanticsError, match="the sum of all states"):
            model(tiny_tokens(), **arguments)


def test_lenses_of_single_states_are_refused_where_their_sum_is_read():
    model, tokens = drawn("act"), tiny_tokens()
    with pytest.raises(LoopedSemanticsError, match="no single state is read out"):
        lens.coda_lens(model, tokens)
    with pytest.raises(LoopedSemanticsError, match="no single state is read out"):
        lens.exit_lens(drawn("act", n_coda=0), tokens)
    lens.logit_lens(model, tokens)
    coda = lens.coda_lens(model, tokens, points=["coda.0.hook_resid_post"], keep_logits=True)
    assert_close(coda.logits[0], model(tokens), rtol=1e-4, atol=1e-4)
    for name in ("hyperloop", "recursions", "universal"):
        other = drawn(name)
        found = lens.coda_lens(other, tokens, keep_logits=True).logits
        assert_close(found[-1], other(tokens), rtol=1e-4, atol=1e-4)


# PonderNet.


def test_ponder():
    model, tokens = drawn("ponder"), tiny_tokens()
    e, read_out, w, cfg = ends(model, tokens)
    s, left, p, losses = e, torch.ones(2, 9), [], []
    for t in range(4):
        s = core(s + e, w, cfg)
        rate = torch.sigmoid(s @ w["exit_gate.W"] + w["exit_gate.b"])[..., 0]
        p.append(left if t == 3 else left * rate)
        left = left * (1 - rate)
        logits = read_out(s)[:, :-1]
        losses.append(F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none"))
    assert_logits(model, tokens, read_out(s))
    _, cache = model.run_with_cache(tokens)
    halting = cache.stack_activation("halting")[..., 0]
    assert_close(halting, torch.stack(p), rtol=1e-4, atol=1e-6)
    p, losses = torch.stack(p)[..., :-1], torch.stack(losses)
    prior = torch.tensor([0.3 * 0.7**n for n in range(4)])
    prior = prior / prior.sum()
    divergence = (p * (p / prior[:, None, None]).log()).sum(0)
    expected = ((p * losses).sum(0) + 0.1 * divergence).mean()
    assert_close(ponder_training_loss(model, tokens, 0.3, 0.1), expected)
    assert_close(ponder_loss(losses, p, 0.3, 0.1), expected)
    assert_close(model.state_logits(cache["state_out", 1]), model(tokens, exit_at=1))


def test_the_prior_itself_has_no_divergence():
    prior = geometric_prior(5, 0.4)
    losses = torch.rand(5, 3)
    found = ponder_loss(losses, prior[:, None].expand(5, 3), 0.4, beta=100.0)
    assert_close(found, (prior[:, None] * losses).sum(0).mean())
    assert geometric_prior(3, 1.0).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="above 0"):
        geometric_prior(3, 0.0)
    with pytest.raises(LoopedSemanticsError, match="halting='ponder'"):
        ponder_training_loss(drawn("act"), tiny_tokens())


# Mixture-of-Recursions.


@pytest.mark.parametrize(
    ("name", "gates"),
    [("recursions", "every"), ("recursions", "last"), ("recursions_sigmoid", "last")],
)
def test_token_choice_routing(name, gates):
    model, tokens = drawn(name, router_gates=gates), tiny_tokens()
    e, read_out, w, cfg = ends(model, tokens)
    scores = e @ w["router.W"]
    g = scores.softmax(-1) if name == "recursions" else 0.5 * scores.sigmoid()
    depth = g.argmax(-1)
    assert len(depth.unique()) > 1
    state = e.clone()
    for t in range(cfg.n_iterations):
        new = state.clone()
        for b in range(2):
            # Only the tokens that are still in the loop, as a shorter sequence of their own.
            active = [i for i in range(9) if depth[b, i] >= t]
            if not active:
                continue
            keys = torch.zeros(9, 9, dtype=torch.bool)
            for i in range(9):
                keys[i, i] = True
                for j in range(i + 1):
                    keys[i, j] |= i in active and j in active
            x = state[b : b + 1] + (e[b : b + 1] if cfg.injection else 0)
            out = core(x, w, cfg, keys)[0]
            for i in active:
                if depth[b, i] == t:
                    new[b, i] = g[b, i, t] * out[i] + e[b, i]
                else:
                    new[b, i] = g[b, i, t] * out[i] if gates == "every" else out[i]
        state = new
    assert_logits(model, tokens, read_out(state))
    _, cache = model.run_with_cache(tokens)
    assert_close(cache["hook_router_weights"], g, rtol=1e-4, atol=1e-6)
    weight = cache["router_weight", 1][..., 0]
    assert torch.equal(weight == 0, depth < 1)
    last = cfg.n_iterations - 1
    assert_close(cache["state_out", last], state, rtol=1e-4, atol=1e-4)


def test_an_edit_of_the_router_changes_the_depth():
    model, tokens = drawn("recursions"), tiny_tokens()

    def at_once(x, hook):
        return torch.nn.functional.one_hot(torch.zeros(x.shape[:-1], dtype=torch.long), 3).to(x)

    _, cache = model.run_with_cache(tokens)
    with model.hooks([("hook_router_weights", at_once)]):
        _, edited = model.run_with_cache(tokens)
    assert torch.equal(edited["state_out", 0], edited["state_out", 1])
    assert not torch.equal(cache["state_out", 0], cache["state_out", 1])


def test_balance_is_1_when_depths_are_even_and_n_when_all_choose_one():
    even = torch.eye(4).repeat(3, 1)
    assert float(routing_balance_loss(even)) == 1.0
    one = torch.eye(4)[torch.zeros(12, dtype=torch.long)]
    assert float(routing_balance_loss(one)) == 4.0


# Hyper-connections.


@pytest.mark.parametrize("n_streams", [2, 3])
def test_hyper_connections(n_streams):
    model, tokens = drawn("hyperloop", hyper_connections=n_streams), tiny_tokens()
    e, read_out, w, cfg = ends(model, tokens)
    S = [e] * n_streams
    for t in range(3):
        flat = torch.cat(S, dim=-1)
        z = flat * torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + 1e-6)
        gates = torch.sigmoid(
            z @ w["hyper_connections.W_gates"][t] + w["hyper_connections.b_gates"][t]
        )
        r, v, k = gates.chunk(3, dim=-1)
        x = core(sum(r[..., n, None] * S[n] for n in range(n_streams)), w, cfg)
        x = x + w["hyper_connections.W_E"][t]
        S = [k[..., n, None] * S[n] + 2 * v[..., n, None] * x for n in range(n_streams)]
    assert_logits(model, tokens, read_out(sum(S) / n_streams))
    _, cache = model.run_with_cache(tokens)
    assert_close(cache["hyper_read", 2], r, rtol=1e-4, atol=1e-5)
    assert_close(cache["hyper_write", 2], 2 * v, rtol=1e-4, atol=1e-5)
    assert_close(cache["hyper_keep", 2], k, rtol=1e-4, atol=1e-5)
    assert_close(cache["state_out", 2], sum(S) / n_streams, rtol=1e-4, atol=1e-4)
    assert_close(cache["state_in", 1], cache["state_out", 0])


def test_an_edit_of_the_state_moves_every_stream():
    model, tokens = drawn("hyperloop"), tiny_tokens()
    delta = torch.randn(32, generator=torch.Generator().manual_seed(2))
    add = lambda x, hook: x + delta  # noqa: E731
    behind = model.run_with_hooks(tokens, fwd_hooks=[("iter.0.hook_state_out", add)])
    before = model.run_with_hooks(tokens, fwd_hooks=[("iter.1.hook_state_in", add)])
    assert_close(behind, before)
    assert not torch.allclose(behind, model(tokens), atol=1e-3)
    _, cache = model.run_with_cache(tokens)
    with model.hooks([("iter.2.hook_state_out", add)]):
        _, edited = model.run_with_cache(tokens)
    entered = edited["blocks.7.hook_resid_pre"] - cache["blocks.7.hook_resid_pre"]
    assert_close(entered, delta.expand_as(entered), rtol=1e-4, atol=1e-4)


# All of them.


@pytest.mark.parametrize("name", ALL)
def test_what_every_looped_model_promises_holds(name):
    findings = {finding.name: finding for finding in check_model(drawn(name))}
    refused = {"restart at each iteration", "decomposition"} if name in MIXED else set()
    for check, finding in findings.items():
        expected = "not applicable" if check in refused else "ok"
        assert finding.status == expected, (check, finding.detail)


@pytest.mark.parametrize("name", ALL)
def test_a_saved_model_is_the_same(name, tmp_path):
    model, tokens = drawn(name), tiny_tokens()
    model.save_pretrained(tmp_path / "saved")
    loaded = LoopedTransformer.from_pretrained_no_processing(tmp_path / "saved")
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.cfg.describe().splitlines()[1:] == model.cfg.describe().splitlines()[1:]
    assert model.cfg.n_params == sum(p.numel() for p in model.parameters())
    assert type(model.cfg).from_dict(model.cfg.to_dict()) == model.cfg


@pytest.mark.parametrize("name", ALL)
def test_it_trains(name):
    model = tiny_model(name).train()
    generator = torch.Generator().manual_seed(0)
    # Each token follows from the one before it.
    steps = torch.randint(0, 50, (50,), generator=generator)
    first = torch.randint(0, 50, (16, 1), generator=generator)
    rows = [first]
    for _ in range(7):
        rows.append(steps[rows[-1]])
    tokens = torch.cat(rows, dim=1)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        if name == "ponder":
            loss = ponder_training_loss(model, tokens)
        else:
            loss = model(tokens, return_type="loss")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", ALL)
def test_cached_generation_is_the_uncached_one(name):
    model, tokens = drawn(name), tiny_tokens()
    arguments: dict[str, Any] = dict(
        max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False
    )
    expected = model.generate(tokens, use_past_kv_cache=False, **arguments)
    assert torch.equal(model.generate(tokens, **arguments), expected)
    mask = torch.ones(2, 9, dtype=torch.int)
    mask[1, :4] = 0
    padded = model.generate(tokens, attention_mask=mask, **arguments)
    alone = model.generate(tokens[1:, 4:], **arguments)
    assert torch.equal(padded[1, 4:], alone[0])


@pytest.mark.parametrize("name", [name for name in ALL if name not in MIXED])
def test_the_stream_decomposes(name):
    model, tokens = drawn(name), tiny_tokens()
    _, cache = model.run_with_cache(tokens)
    end = cache["resid_post", -1]
    for stack in (
        cache.decompose_resid(),
        cache.get_full_resid_decomposition(),
        cache.get_full_resid_decomposition(expand_neurons=False),
        cache.stack_head_results(incl_remainder=True),
    ):
        assert_close(stack.sum(0), end, rtol=1e-4, atol=1e-4)
    for t in range(model.cfg.n_iterations):
        parts = cache.decompose_resid(state_out=t)
        assert_close(parts.sum(0), cache["state_out", t], rtol=1e-4, atol=1e-4)
        late, labels = cache.decompose_resid(from_iteration=t, return_labels=True)
        assert_close(late.sum(0), end, rtol=1e-4, atol=1e-4)
        assert (f"r{t}_step_embedding" in labels) == (model.cfg.step_embedding is not None)


def test_the_sum_of_states_decomposes_before_it_is_made():
    model, tokens = drawn("act"), tiny_tokens()
    _, cache = model.run_with_cache(tokens)
    for t in range(4):
        parts = cache.decompose_resid(state_out=t)
        assert_close(parts.sum(0), cache["state_out", t], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("n_coda", [0, 1])
def test_the_last_row_of_the_logit_lens_is_the_logits(name, n_coda):
    if name == "ponder" and n_coda:
        pytest.skip("it reads every state out")
    model, tokens = drawn(name, n_coda=n_coda), tiny_tokens()
    logits, cache = model.run_with_cache(tokens)
    rows = cache.accumulated_resid(apply_ln=True)
    assert_close(rows[-1] @ model.W_U + model.b_U, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MIXED)
def test_a_start_inside_such_a_loop_is_refused(name):
    model, tokens = drawn(name), tiny_tokens()
    logits, cache = model.run_with_cache(tokens)
    state = cache["state_in", 0]
    e = cache.cache_dict.get("hook_injection")
    again = model(state, start_at_iteration=0, injection=e)
    assert_close(again, logits)
    for arguments in (dict(start_at_iteration=1), dict(start_at_layer=model.layout.core_start + 1)):
        with pytest.raises(LoopedSemanticsError, match="carries more than its state"):
            model(state, injection=e, **arguments)
    with pytest.raises(LoopedSemanticsError, match="no sum along one path"):
        cache.decompose_resid()


@pytest.mark.parametrize("name", ALL)
def test_patching_everything_gives_the_clean_logits(name):
    from tl_loops.patching import activation_patch

    model, clean, corrupted = drawn(name), tiny_tokens(1), tiny_tokens(1, seed=9)
    logits, cache = model.run_with_cache(clean)
    grid = activation_patch(
        model, corrupted, cache, lambda x: x[0, -1, 7], axes=("block",), progress=False
    )
    if model.cfg.injection is None:
        assert_close(grid[0], logits[0, -1, 7], rtol=1e-4, atol=1e-4)
    # A cell is its own forward pass: nothing between iterations is taken from another run.
    block = model.layout.core_start + 1

    def put(x, hook):
        return cache[hook.name]

    one = model.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{block}.hook_resid_pre", put)])
    assert_close(grid[block], one[0, -1, 7], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(router="expert_choice"), "not causal"),
        (dict(router="top_k"), "router must be one of"),
        (dict(router="token_choice", router_score="linear"), "router_score must be one of"),
        (dict(router="token_choice", router_scale=0.0), "router_scale must be above 0"),
        (dict(router="token_choice", max_iterations=5), "shares tokens out among 5 depths"),
        (dict(halting="act"), "needs exit_gate=True"),
        (dict(halting="ponder", exit_gate=True, n_coda=1), "a coda would run once per iteration"),
        (dict(halting="act", exit_gate=True, act_epsilon=1.0), "act_epsilon must be"),
        (dict(halting="act", exit_gate=True, exit_threshold=0.5), "exclude each other"),
        (dict(halting="act", exit_gate=True, router="token_choice"), "exclude each other"),
        (dict(hyper_connections=1), "at least 2"),
        (dict(hyper_connections=2, router="token_choice"), "exclude each other"),
        (dict(hyper_connections=2, norm_between_iterations=True), "exclude each other"),
        (dict(step_embedding="sinusoid"), "step_embedding must be one of"),
        (dict(step_embedding="learned", max_iterations=2), "more than the max_iterations=2"),
        (dict(block_norm="sandwich", normalization_type="LN"), "a norm that does not centre"),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config("weightless", **{**dict(injection=None, qk_norm=None), **changes})


def test_describe_says_what_the_loop_does():
    for name, words in (
        ("universal", "sinusoids of the position plus sinusoids of t + 1"),
        ("act", "until the sum reaches 0.99"),
        ("ponder", "the last: the rest"),
        ("recursions", "depth i = argmax g"),
        ("hyperloop", "3 streams S"),
        ("learned_steps", "W_E[t]"),
    ):
        assert words in tiny_config(name).describe()
    assert "x = ln1_post(x + attn(x))" in tiny_config("universal").describe()


def test_the_document_runs():
    text = (Path(__file__).parents[3] / "docs" / "adaptive_loops.md").read_text(encoding="utf-8")
    scope: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S).group(1), scope)
    assert_close(scope["halting"].sum(0), torch.ones(2, 9, 1))
