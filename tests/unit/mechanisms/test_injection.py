"""Injections against their published equations; what decompositions make of the later kinds."""

import pytest
import torch
import torch.nn.functional as F

from tests.closeness import assert_close
from tests.models import tiny_config, tiny_model, tiny_tokens
from tl_loops import ConfigError, LoopedSemanticsError
from tl_loops.model.check import check_model

TOKENS = tiny_tokens()
CLOSE = dict(rtol=1e-4, atol=1e-5)


def orthogonal(**changes):
    """A model whose injected updates are long beside its states."""
    changes = {"injection": "orthogonal", "initial_state": "normal", **changes}
    model = tiny_model("olmo_grouped", initializer_range=0.2, initial_state_std=1.0, **changes)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in (model.injection.A_log, model.injection.dt_bias):
            weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    return model


def test_orthogonal_injection_is_the_published_one():
    model = orthogonal()
    _, cache = model.run_with_cache(TOKENS)
    w, e = model.physical_state_dict(), cache["hook_injection"]
    delta = F.softplus(w["injection.dt_bias"])
    a = delta * (e @ w["injection.W_B"])
    for t in range(3):
        v = cache["state_in", t] * torch.exp(-delta * torch.exp(w["injection.A_log"]))
        along = (v * a).sum(-1, keepdim=True) / ((a * a).sum(-1, keepdim=True) + 1e-6)
        assert_close(cache["injected", t], v - along * a + a, **CLOSE)
        # Along a there is a alone.
        inside = ((cache["injected", t] - a) * a).sum(-1)
        assert inside.abs().max() < 1e-4 * (v.norm(dim=-1) * a.norm(dim=-1)).max()
        assert (along * a).abs().max() > 0.01


def test_without_an_update_nothing_is_projected():
    model = orthogonal(injection_eps=1e-3)
    injection, s = model.injection, torch.randn(2, 5, 32)
    assert_close(injection(s, torch.zeros_like(s)), injection.carry(s))


def test_decompositions_carry_components_through_the_projection():
    model = orthogonal()
    _, cache = model.run_with_cache(TOKENS)
    for layer in (1, 2, 4, 6, 7, 8):
        stream = cache["resid_pre" if layer < 8 else "resid_post", min(layer, 7)]
        for shown in ("whole", "parts", "by_iteration"):
            assert_close(cache.decompose_resid(layer, injection=shown).sum(0), stream, **CLOSE)
    heads = cache.get_full_resid_decomposition(5, expand_neurons=True)
    assert_close(heads.sum(0), cache["resid_pre", 5], **CLOSE)
    one = cache.decompose_resid(5, pos_slice=3)
    assert_close(one, cache.decompose_resid(5)[:, :, 3], **CLOSE)


def test_a_component_is_what_goes_missing_without_it():
    """With e held, removing what a layer wrote takes its component off a later state."""
    model = orthogonal()
    _, cache = model.run_with_cache(TOKENS)
    parts, labels = cache.decompose_resid(3, return_labels=True, injection="whole")
    component = parts[labels.index("r0.1_mlp_out")]
    without = cache["state_out", 0] - cache["mlp_out", 2]
    again = model.injection(without, model.injection.prepare(cache["hook_injection"]))
    assert_close(cache["injected", 1] - again, component, **CLOSE)


def test_weights_alone_say_nothing_of_a_projection():
    for tool in (
        lambda: orthogonal().all_composition_scores("Q"),
        lambda: orthogonal(attn_bias=True, block_norm="pre").accumulated_bias(5),
    ):
        with pytest.raises(LoopedSemanticsError, match="decompose a cached run"):
            tool()


@pytest.mark.parametrize("kind", ["concat", "concat_injection_first"])
def test_a_biased_map_is_the_linear_layer(kind):
    model = tiny_model("retrofitted", injection=kind, injection_bias=True, initializer_range=0.2)
    w = model.physical_state_dict()
    assert w["injection.b"].abs().max() > 0.1
    _, cache = model.run_with_cache(TOKENS)
    for t in range(3):
        pair = [cache["state_in", t], cache["hook_injection"]]
        joined = torch.cat(pair if kind == "concat" else pair[::-1], -1)
        expected = F.linear(joined, w["injection.W"].T, w["injection.b"])
        assert_close(cache["injected", t], expected, **CLOSE)
    parts, labels = cache.decompose_resid(return_labels=True)
    assert {f"r{t}_injection_bias" for t in range(3)} <= set(labels)
    assert_close(parts.sum(0), cache["resid_post", -1], **CLOSE)


def test_the_biases_of_injections_accumulate():
    """A loop whose blocks write nothing: what arrives is what the biases and maps make of 0."""
    model = tiny_model("retrofitted", injection_bias=True, initial_state="zeros")
    with torch.no_grad():
        for name, weight in model.physical_named_parameters():
            if name.endswith(("W_O", "W_out", "W_E")):
                weight.zero_()
    _, cache = model.run_with_cache(TOKENS)
    for layer in (1, 3, 7, 8):
        stream = cache["resid_pre" if layer < 8 else "resid_post", min(layer, 7)]
        assert_close(model.accumulated_bias(layer).expand_as(stream), stream, **CLOSE)


@pytest.mark.parametrize(
    "model",
    [orthogonal(), tiny_model("retrofitted", injection_bias=True)],
    ids=lambda m: m.cfg.injection,
)
def test_every_promise_is_kept(model):
    failed = [finding for finding in check_model(model) if finding.status == "failed"]
    assert not failed
    with torch.inference_mode(False):
        model(TOKENS, return_type="loss").backward()
    for name, parameter in model.physical_named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(injection="add", injection_bias=True), "injection_bias needs injection='concat'"),
        (dict(injection="orthogonal", injection_eps=0.0), "injection_eps"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config("retrofitted", **changes)


def test_describe_tells_the_kinds_apart():
    said = {
        tiny_config("retrofitted", **changes).describe()
        for changes in (
            dict(injection="gated_diagonal"),
            dict(injection="orthogonal"),
            dict(injection="orthogonal", injection_eps=1e-5),
            dict(injection="concat"),
            dict(injection="concat", injection_bias=True),
        )
    }
    assert len(said) == 5
