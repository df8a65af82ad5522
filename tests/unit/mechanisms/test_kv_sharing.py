"""Keys and values shared across iterations, against plain statements of who reads what."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.closeness import assert_close
from tests.models import tiny_config, tiny_model, tiny_tokens
from tl_loops import ConfigError, LoopedSemanticsError, LoopedTransformer
from tl_loops.mechanisms.kv_sharing import KVSharing
from tl_loops.model.kv_sharing_effect import kv_sharing_effect
from tl_loops.nn.kv_cache import SharedKeyValueCache

ALL = ("latest", "ring:2", "anchor:1", "shared", "shared:0.6", "first", "window:2")
CACHED_ONLY = ("latest", "ring:2", "anchor:1", "shared")
PLAIN: dict[str, Any] = dict(n_prelude=1, n_core=2, n_coda=1, n_iterations=4, injection="add")


def drawn(**changes: Any) -> LoopedTransformer:
    """A looped Llama whose attention matters."""
    model = tiny_model("retrofitted", **{**PLAIN, "initial_state": "embed", **changes})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, weight in model.physical_named_parameters():
            if not key.endswith((".w", ".b")):
                weight.copy_(0.25 * torch.randn(weight.shape, generator=generator))
    return model


# A plain transformer that decodes one token at a time.


def norm(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def rotate(x, position):
    half = x.shape[-1] // 2
    angles = position * 10000.0 ** -(torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def plain_decode(model, tokens, reads, n_iterations):
    """Logits [pos, d_vocab] of one text, token by token.

    ``reads(own, t, i, j)`` gives the keys and values that token i at iteration t reads of token j,
    where ``own[j]`` lists those of token j by iteration, as far as they are computed.
    ``n_iterations[i]`` is how often token i runs the core.
    """
    w, cfg = model.physical_state_dict(), model.cfg
    memory: dict[str, list[list]] = {}
    logits = []

    def block(x, name, t, i, shared):
        y = norm(x, w[f"{name}.ln1.w"])
        q, k, v = (torch.einsum("d,hde->he", y, w[f"{name}.attn.W_{n}"]) for n in "QKV")
        own = memory.setdefault(name, [])
        if len(own) <= i:
            own.append([])
        own[i].append((rotate(k, i), v))
        if shared:
            seen = [reads(own, t, i, j) for j in range(i + 1)]
        else:
            seen = [own[j][0] for j in range(i + 1)]
        keys, values = (torch.stack(part) for part in zip(*seen, strict=True))
        scores = torch.einsum("he,khe->hk", rotate(q, i), keys) / math.sqrt(cfg.d_head)
        z = torch.einsum("hk,khe->he", scores.softmax(-1), values)
        x = x + torch.einsum("he,hed->d", z, w[f"{name}.attn.W_O"])
        y = norm(x, w[f"{name}.ln2.w"])
        hidden = F.silu(y @ w[f"{name}.mlp.W_gate"]) * (y @ w[f"{name}.mlp.W_in"])
        return x + hidden @ w[f"{name}.mlp.W_out"]

    for i, token in enumerate(tokens.tolist()):
        e = block(w["embed.W_E"][token], "prelude.0", 0, i, False)
        s = e
        for t in range(n_iterations[i]):
            s = s + e
            for layer in range(cfg.n_core):
                s = block(s, f"core.{layer}", t, i, True)
        x = block(s, "coda.0", 0, i, False)
        logits.append(norm(x, w["ln_final.w"]) @ w["unembed.W_U"])
    return torch.stack(logits)


def latest(own, t, i, j):
    return own[j][min(t, len(own[j]) - 1)]


def ring(size):
    def reads(own, t, i, j):
        # The last iteration so far that wrote the slot of iteration t.
        return own[j][max(s for s in range(len(own[j])) if s % size == t % size)]

    return reads


def anchor(size):
    def reads(own, t, i, j):
        return own[j][t] if t < size else own[j][-1]

    return reads


def last(own, t, i, j):
    return own[j][-1]


def gated(gate):
    def reads(own, t, i, j):
        key, value = own[j][0]
        for new_key, new_value in own[j][1:]:
            key = gate * new_key + (1 - gate) * key
            value = gate * new_value + (1 - gate) * value
        return key, value

    return reads


def first(own, t, i, j):
    return own[j][0]


def window(size):
    def reads(own, t, i, j):
        return own[j][t] if i - j < size else own[j][0]

    return reads


READS = {
    "latest": latest,
    "ring:2": ring(2),
    "ring:3": ring(3),
    "anchor:1": anchor(1),
    "anchor:2": anchor(2),
    "shared": last,
    "shared:0.6": gated(0.6),
    "first": first,
    "window:1": window(1),
    "window:2": window(2),
}


def decoded(model, tokens, kv_sharing, pieces, n_iterations=None):
    """Logits with a cache, piece by piece."""
    cache = model.make_kv_cache(tokens.shape[0], kv_sharing)
    logits, at = [], 0
    for number, size in enumerate(pieces):
        piece = tokens[:, at : at + size]
        with torch.no_grad():
            logits.append(
                model(
                    piece,
                    past_kv_cache=cache,
                    n_iterations=None if n_iterations is None else n_iterations[number],
                )
            )
        at += size
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("kv_sharing", READS)
def test_decoding_reads_what_a_plain_decoder_reads(kv_sharing):
    model, tokens = drawn(), tiny_tokens(pos=7)
    found, _ = decoded(model, tokens, kv_sharing, [1] * 7)
    for row in range(2):
        expected = plain_decode(model, tokens[row], READS[kv_sharing], [4] * 7)
        assert_close(found[row], expected, rtol=2e-4, atol=2e-4)
    if kv_sharing != "latest":  # which acts where iterations differ
        assert (found - model(tokens)).abs().max() > 0.01


@pytest.mark.parametrize("n_iterations", [[4, 2, 4, 1, 3, 4, 6], [1, 5, 2, 5, 5, 1, 2]])
def test_tokens_that_ran_fewer_iterations_show_their_latest(n_iterations):
    model, tokens = drawn(), tiny_tokens(pos=7)
    found, _ = decoded(model, tokens, "latest", [1] * 7, n_iterations)
    for row in range(2):
        expected = plain_decode(model, tokens[row], latest, n_iterations)
        assert_close(found[row], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kv_sharing", ["first", "window:1", "window:2", "window:20"])
def test_sharing_that_acts_within_a_call_is_one_function(kv_sharing):
    model, tokens = drawn(), tiny_tokens()
    with torch.no_grad():
        at_once = model(tokens, kv_sharing=kv_sharing)
    for pieces in ([1] * 9, [4, 5], [9], [3, 1, 5]):
        found, _ = decoded(model, tokens, kv_sharing, pieces)
        assert_close(found, at_once, rtol=1e-4, atol=1e-5)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50
    with torch.no_grad():
        assert_close(model(changed, kv_sharing=kv_sharing)[:, :-1], at_once[:, :-1])
        if kv_sharing == "window:20":
            assert_close(at_once, model(tokens), rtol=1e-4, atol=1e-5)
        mask = torch.tensor([[0] * 3 + [1] * 9] * 2)
        padded = torch.cat([tokens[:, :3], tokens], dim=1)
        shifted = model(padded, attention_mask=mask, kv_sharing=kv_sharing)[:, 3:]
        assert_close(shifted, at_once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_sharing", CACHED_ONLY)
def test_tokens_of_one_call_see_each_other_as_without_sharing(kv_sharing):
    model, tokens = drawn(), tiny_tokens()
    with torch.no_grad():
        assert torch.equal(model(tokens, kv_sharing=kv_sharing), model(tokens))
    found, _ = decoded(model, tokens, kv_sharing, [9])
    assert torch.equal(found, model(tokens))


def test_off_by_default():
    model, tokens = drawn(), tiny_tokens()
    assert model.cfg.kv_sharing is None and "shared" not in model.cfg.describe()
    assert not isinstance(model.make_kv_cache(), SharedKeyValueCache)
    with torch.no_grad():
        logits = model(tokens)
        assert torch.equal(model(tokens, kv_sharing="none"), logits)
    found, cache = decoded(model, tokens, "latest", [4, 5])
    assert_close(found, logits, rtol=1e-4, atol=1e-5)
    assert cache.n_slots == model.cfg.n_layers


@pytest.mark.parametrize(
    ("kv_sharing", "n_slots"),
    [("latest", 10), ("ring:2", 6), ("ring:9", 10), ("anchor:1", 6), ("shared", 4), ("first", 4)],
)
def test_memory_is_that_of_the_slots(kv_sharing, n_slots):
    model, tokens = drawn(), tiny_tokens()
    _, cache = decoded(model, tokens, kv_sharing, [4, 5])
    assert cache.n_slots == n_slots


@pytest.mark.parametrize("kv_sharing", ALL)
def test_generation_shares_by_call_and_by_config(kv_sharing):
    model, tokens = drawn(), tiny_tokens()
    arguments: dict[str, Any] = dict(
        max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False
    )
    found = model.generate(tokens, kv_sharing=kv_sharing, **arguments)
    # By hand: the prompt at once, then token by token.
    cache, step, text = model.make_kv_cache(2, kv_sharing), tokens, tokens
    for _ in range(5):
        with torch.no_grad():
            new = model(step, past_kv_cache=cache)[:, -1].argmax(-1, keepdim=True)
        text, step = torch.cat([text, new], dim=1), new
    assert torch.equal(found, text)
    configured = drawn(kv_sharing=kv_sharing)
    assert torch.equal(configured.generate(tokens, **arguments), found)
    assert torch.equal(
        configured.generate(tokens, kv_sharing="none", **arguments),
        model.generate(tokens, **arguments),
    )


def test_sharing_in_the_config_is_saved_and_told(tmp_path):
    model, tokens = drawn(kv_sharing="window:2"), tiny_tokens()
    assert "shared across iterations: window:2" in model.cfg.describe()
    assert torch.equal(model(tokens), drawn()(tokens, kv_sharing="window:2"))
    model.save_pretrained(tmp_path / "saved")
    loaded = LoopedTransformer.from_pretrained_no_processing(tmp_path / "saved")
    assert loaded.cfg.kv_sharing == "window:2"
    assert torch.equal(loaded(tokens), model(tokens))
    with pytest.raises(LoopedSemanticsError, match="shared keys"):
        model(model(tokens, stop_at_layer=3), start_at_layer=3)
    _, cache = model.run_with_cache(tokens)
    parts = cache.get_full_resid_decomposition()
    assert_close(parts.sum(0), cache["resid_post", -1], rtol=1e-4, atol=1e-4)
    from tl_loops.model.check import check_model

    statuses = {finding.name: finding.status for finding in check_model(model)}
    assert statuses["cached decoding"] == "not applicable" and "failed" not in statuses.values()


def test_gradients_reach_what_is_read():
    model, tokens = drawn(), tiny_tokens()
    kept = {}

    def keep(x, hook):
        x.retain_grad()
        kept[hook.name] = x

    names = [f"iter.{t}.0.attn.hook_v" for t in range(3)]
    with model.hooks([(name, keep) for name in names]):
        model(tokens, kv_sharing="first").sum().backward()
    grads = [kept[model.hook_name(name)].grad for name in names]
    assert grads[0].abs().sum() > 0 and all(grad is None for grad in grads[1:])


def test_patterns_sum_to_one_and_grouped_heads_share():
    tokens = tiny_tokens()
    grouped = drawn(n_key_value_heads=2)
    for kv_sharing in ("window:2", "first"):
        with torch.no_grad():
            _, cache = grouped.run_with_cache(tokens, kv_sharing=kv_sharing)
            fused = grouped(tokens, kv_sharing=kv_sharing)
        assert_close(fused, cache["unembed.hook_out"], rtol=1e-4, atol=1e-5)
        assert_close(cache["pattern", 2, 1].sum(-1), torch.ones(2, 4, 9))
        found, _ = decoded(grouped, tokens, kv_sharing, [3, 1, 5])
        assert_close(found, cache["unembed.hook_out"], rtol=1e-4, atol=1e-5)


def test_the_effect_is_measured():
    model, tokens = drawn(), tiny_tokens()
    for kv_sharing in ALL:
        effect = kv_sharing_effect(model, tokens, kv_sharing, n_prompt=3)
        found, cache = decoded(model, tokens, kv_sharing, [3] + [1] * 6)
        p, q = model(tokens).log_softmax(-1), found.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        assert_close(effect.kl, kl, rtol=1e-3, atol=1e-5, size=1)  # of probabilities
        assert torch.equal(effect.agrees, p.argmax(-1) == q.argmax(-1))
        assert (effect.n_slots, effect.n_slots_without) == (cache.n_slots, 10)
        if kv_sharing == "latest":
            assert effect.kl.max() < 1e-5 and effect.logit_difference.max() < 1e-3
        elif kv_sharing in CACHED_ONLY:
            assert effect.kl[:, :3].max() < 1e-6 < effect.kl.max()
        assert f"{effect.n_slots} of 10 slots" in str(effect)
    with pytest.raises(ConfigError, match="shares nothing"):
        kv_sharing_effect(model, tokens, "none")
    with pytest.raises(ValueError, match="n_prompt"):
        kv_sharing_effect(model, tokens, "first", n_prompt=10)


def test_a_cache_belongs_to_its_sharing():
    model, tokens = drawn(), tiny_tokens()
    ring_cache = model.make_kv_cache(2, "ring:2")
    for arguments in (
        dict(past_kv_cache=ring_cache, kv_sharing="first"),
        dict(past_kv_cache=ring_cache, kv_sharing="none"),
        dict(past_kv_cache=model.make_kv_cache(2), kv_sharing="first"),
    ):
        with pytest.raises(ValueError, match="make_kv_cache"):
            model(tokens, **arguments)
    with pytest.raises(ValueError, match="make_kv_cache"):
        drawn(kv_sharing="first")(tokens, past_kv_cache=model.make_kv_cache(2))
    with pytest.raises(LoopedSemanticsError, match="cannot be frozen"):
        ring_cache.freeze()
    model(tokens, past_kv_cache=ring_cache)
    copied = ring_cache.copy()
    again = [model(tokens[:, :1], past_kv_cache=cache) for cache in (ring_cache, copied)]
    assert torch.equal(*again)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lastest", "must be 'none' or one of latest"),
        ("ring", "a number of iterations"),
        ("ring:", "expected ring:N"),
        ("ring:0", "at least 1"),
        ("window:two", "a number of tokens"),
        ("first:2", "'first' without a number"),
        ("shared:0", "above 0"),
        ("shared:x", "above 0"),
        ("", "must be 'none'"),
    ],
)
def test_bad_names_are_refused(text, message):
    for parse in (KVSharing.parse, lambda text: tiny_config("ouro", kv_sharing=text)):
        with pytest.raises(ConfigError, match=message):
            parse(text)


def test_names_round_trip_and_what_it_excludes():
    for text in ALL:
        assert str(KVSharing.parse(text)) == text
    with pytest.raises(ConfigError, match="routes decide"):
        tiny_config("recursions", kv_sharing="first")
    with pytest.raises(ConfigError, match="routes decide"):
        tiny_model("recursions").make_kv_cache(1, "first")
    two = tiny_model("hrm_text")
    for call in (
        lambda: two.make_kv_cache(1, "first"),
        lambda: two(tiny_tokens(), kv_sharing="window:2"),
        lambda: tiny_config("hrm_text", kv_sharing="shared"),
    ):
        with pytest.raises(ConfigError, match="two stacks run other layers"):
            call()
    with pytest.raises(ConfigError, match="by a trained gate"):
        tiny_config("ouro", first_pass_window=2, kv_sharing="window:2")


@pytest.mark.parametrize("kv_sharing", ["window:2", "first", "ring:2"])
def test_a_patched_cell_is_its_own_forward_pass(kv_sharing):
    from tl_loops.patching import activation_patch

    model, clean, corrupted = drawn(kv_sharing=kv_sharing), tiny_tokens(1), tiny_tokens(1, seed=9)
    _, cache = model.run_with_cache(clean)
    grid = activation_patch(
        model, corrupted, cache, lambda x: x[0, -1, 7], axes=("block", "pos"), progress=False
    )

    def put(x, hook):
        x = x.clone()
        x[:, 4] = cache[hook.name][:, 4]
        return x

    one = model.run_with_hooks(corrupted, fwd_hooks=[("blocks.4.hook_resid_pre", put)])
    assert_close(grid[4, 4], one[0, -1, 7], rtol=1e-4, atol=1e-5)
    assert grid.std() > 0
