"""TransformerLens's tools refuse a bridged loop, where they would be wrong, and nothing else."""

import importlib
import subprocess
import sys
import warnings
from functools import cache

import pytest
import torch
from transformer_lens import ActivationCache, head_detector, patching

import tl_loops
from tests.bridged.models import bridged, reference
from tests.closeness import assert_close
from tests.feedforward import only_from_4, plain_model
from tl_loops import LoopedSemanticsError, unroll
from tl_loops.upstream.guards import GUARDED_FUNCTIONS, GUARDED_METHODS
from tl_loops.upstream.refusal import LOOPED_ADAPTERS

TOKENS = reference("ouro")["tokens"]
CLEAN, CORRUPTED = TOKENS[:1, :4], TOKENS[1:, :4]
ANSWER = 5
ANALYSIS = "transformer_lens.tools.analysis"
REFUSED = r"is wrong on a bridged Ouro.*tl_loops\.unroll"
pytestmark = [only_from_4, pytest.mark.filterwarnings("ignore")]


def tool(module, name):
    return getattr(importlib.import_module(f"{ANALYSIS}.{module}"), name)


@cache
def models():
    """A bridge of Ouro, and the same unrolled."""
    bridge = bridged("ouro")
    return bridge, unroll(bridge)


@pytest.fixture
def bridge():
    return models()[0]


@pytest.fixture
def unrolled():
    return models()[1]


@pytest.fixture
def unguarded():
    tl_loops.unregister()
    yield
    tl_loops.register()


def metric(logits):
    return logits[:, -1, ANSWER].sum()


# What is refused would be wrong.


class TestLogitLens:
    def test_unguarded_the_first_row_is_not_the_embedding(self, bridge, unrolled, unguarded):
        found = tool("logit_lens", "logit_lens")(bridge, TOKENS)
        assert found.labels == ["0_pre", "1_pre", "2_pre", "final_post"]
        expected = self.readout(unrolled, "hook_embed")
        assert not torch.allclose(found.readout.values[0], expected, atol=0.1)

    def readout(self, model, name):
        _, cache = model.run_with_cache(TOKENS)
        return model.unembed(model.ln_final(cache[name]))[:, -1]

    def test_refused_on_the_bridge_and_right_unrolled(self, bridge, unrolled):
        with pytest.raises(LoopedSemanticsError, match=REFUSED):
            tool("logit_lens", "logit_lens")(bridge, TOKENS)
        _, run = unrolled.run_with_cache(TOKENS)
        found = tool("logit_lens", "logit_lens")(unrolled, cache=run)
        assert found.labels[:4] == ["r0.0_pre", "r0.1_pre", "r0.2_pre", "r1.0_pre"]
        for row, name in ((0, "hook_embed"), (3, "iter.1.0.hook_resid_pre")):
            assert_close(
                found.readout.values[row], self.readout(unrolled, name), rtol=1e-4, atol=1e-4
            )
        assert_close(found.readout.values[-1], unrolled(TOKENS)[:, -1], rtol=1e-4, atol=1e-4)


class TestGradients:
    POINT = "blocks.0.attn.hook_z"

    def true(self, unrolled, iteration):
        """Activation and gradient of layer 0 at one iteration, by autograd."""
        name, found = unrolled.hook_name(f"iter.{iteration}.0.attn.hook_z"), {}

        def keep(kind):
            return lambda x, hook: found.update({kind: x.detach().clone()})

        with unrolled.hooks(fwd_hooks=[(name, keep("act"))], bwd_hooks=[(name, keep("grad"))]):
            metric(unrolled(TOKENS)).backward()
        return found["act"], found["grad"]

    def test_unguarded_activation_and_gradient_are_of_two_iterations(
        self, bridge, unrolled, unguarded
    ):
        both = tool("attribution_patching", "cache_activation_and_gradient")(bridge, TOKENS, metric)
        first, last = self.true(unrolled, 0), self.true(unrolled, 3)
        assert_close(both.activations[self.POINT], last[0], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(both.gradients[self.POINT], last[1], rtol=0.1, atol=1e-4)
        assert not torch.allclose(both.activations[self.POINT], first[0], rtol=0.1, atol=1e-4)

    def test_refused_on_the_bridge_and_right_unrolled(self, bridge, unrolled):
        get = tool("attribution_patching", "cache_activation_and_gradient")
        with pytest.raises(LoopedSemanticsError, match=REFUSED):
            get(bridge, TOKENS, metric)
        both = get(unrolled, TOKENS, metric)
        for t in range(4):
            name = unrolled.hook_name(f"iter.{t}.0.attn.hook_z")
            act, grad = self.true(unrolled, t)
            assert_close(both.activations[name], act)
            assert_close(both.gradients[name], grad)

    def test_attribution_patching(self, bridge, unrolled):
        attribute = tool("attribution_patching", "attribution_patch")
        with pytest.raises(LoopedSemanticsError, match=REFUSED):
            attribute(bridge, TOKENS, TOKENS.flip(-1), metric)
        scores = attribute(unrolled, TOKENS, TOKENS.flip(-1), metric).node_scores
        name = unrolled.hook_name("iter.2.1.hook_mlp_out")
        clean = unrolled.run_with_cache(TOKENS)[1][name]
        get = tool("attribution_patching", "cache_activation_and_gradient")
        both = get(unrolled, TOKENS.flip(-1), metric)
        expected = ((clean - both.activations[name]) * both.gradients[name]).sum(2).mean(0)
        block = unrolled.layout.index(iteration=2, layer=1)
        for node, score in scores.items():
            if node.layer == block and node.head is None:
                assert score == pytest.approx(float(expected[node.position]), rel=1e-3, abs=1e-5)

    @pytest.mark.parametrize("name", ["faithfulness", "capture_writer_outputs"])
    def test_what_builds_on_them_is_refused(self, bridge, name):
        try:
            refused = tool("attribution_patching", name)
        except AttributeError:
            pytest.skip(f"this TransformerLens has no {name}")
        with pytest.raises(LoopedSemanticsError, match=REFUSED):
            refused(bridge, TOKENS)


class TestDirectLogitAttribution:
    def processed(self):
        """A bridge in compatibility mode whose final norm is the identity, as the tool asks for."""
        bridge = bridged("ouro")
        with torch.no_grad():
            for name, parameter in bridge.original_model.named_parameters():
                if name.startswith("model.norm"):
                    parameter.fill_(1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
        return bridge

    def attribute(self, model):
        attribute = tool("direct_logit_attribution", "direct_logit_attribution")
        return attribute(model, TOKENS, answer_tokens=ANSWER)

    def test_unguarded_it_does_not_sum_to_the_logit(self, unguarded):
        bridge = self.processed()
        found = self.attribute(bridge).attribution.sum(0)
        assert not torch.allclose(found, bridge(TOKENS)[:, -1, ANSWER], atol=0.05)

    def test_refused_on_the_bridge_and_right_unrolled(self, unrolled):
        with pytest.raises(LoopedSemanticsError, match=REFUSED):
            self.attribute(self.processed())
        expected = unrolled(TOKENS)[:, -1, ANSWER]
        assert_close(self.attribute(unrolled).attribution.sum(0), expected, rtol=1e-3, atol=1e-3)


class TestPatching:
    def test_unguarded_every_iteration_is_patched(self, bridge, unrolled, unguarded):
        _, run = bridge.run_with_cache(CLEAN)
        found = patching.get_act_patch_resid_pre(bridge, CORRUPTED, run, metric)
        _, exact = unrolled.run_with_cache(CLEAN)
        expected = patching.get_act_patch_resid_pre(unrolled, CORRUPTED, exact, metric)
        last = unrolled.layout.index(iteration=3, layer=0)
        assert found.shape == (3, 4) and expected.shape == (12, 4)
        assert not torch.allclose(found, expected[last:], atol=1e-3)

    @pytest.mark.parametrize(
        "name", [n for n in vars(patching) if n.startswith("get_act_patch_") or "generic" in n]
    )
    def test_refused_on_the_bridge(self, bridge, name):
        _, run = bridge.run_with_cache(CLEAN)
        for call in (
            lambda: getattr(patching, name)(bridge, CORRUPTED, run, metric),
            lambda: getattr(patching, name)(model=bridge),
        ):
            with pytest.raises(LoopedSemanticsError, match=rf"{name} {REFUSED}"):
                call()


class TestCache:
    def test_unguarded_components_do_not_sum_to_the_stream(self, bridge, unguarded):
        run = bridge.run_with_cache(TOKENS)[1]
        assert (run.decompose_resid().sum(0) - run["resid_post", -1]).abs().max() > 0.1

    @pytest.mark.parametrize(
        "name", GUARDED_METHODS["transformer_lens.ActivationCache", "ActivationCache"]
    )
    def test_decompositions_of_the_last_iteration_are_refused(self, bridge, name):
        if not hasattr(ActivationCache, name):
            pytest.skip(f"this TransformerLens has no ActivationCache.{name}")
        run = bridge.run_with_cache(TOKENS)[1]
        arguments = {"apply_ln_to_stack": (torch.zeros(1),), "logit_attrs": (torch.zeros(1), 3)}
        with pytest.raises(LoopedSemanticsError, match=rf"{name} {REFUSED}"):
            getattr(run, name)(*arguments.get(name, ()))


def test_head_detection_and_composition_are_refused(bridge):
    with pytest.raises(LoopedSemanticsError, match=f"detect_head {REFUSED}"):
        head_detector.detect_head(bridge, "a b", "previous_token_head")
    with pytest.raises(LoopedSemanticsError, match=f"all_composition_scores {REFUSED}"):
        bridge.all_composition_scores("Q")


def test_huginn_is_refused_too():
    bridge = bridged("huginn")
    with pytest.raises(LoopedSemanticsError, match="wrong on a bridged Huginn"):
        patching.get_act_patch_resid_pre(bridge, CORRUPTED, {}, metric)


def test_the_adapters_are_those_of_transformer_lens():
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    names = {adapter.__name__ for adapter in SUPPORTED_ARCHITECTURES.values()}
    assert set(LOOPED_ADAPTERS) <= names


# Nothing else is refused.


def test_models_without_a_loop_pass():
    fields = dict(n_layers=2, d_model=16, d_head=8, n_ctx=8, d_vocab=50, act_fn="gelu", seed=0)
    plain = plain_model(**fields, initializer_range=0.3, device="cpu")
    _, run = plain.run_with_cache(CLEAN % 50)
    guarded = patching.get_act_patch_resid_pre(plain, CORRUPTED % 50, run, metric)
    stack = run.decompose_resid()
    tl_loops.unregister()
    try:
        original = patching.get_act_patch_resid_pre(plain, CORRUPTED % 50, run, metric)
        assert torch.equal(guarded, original)
        assert torch.equal(stack, run.decompose_resid())
    finally:
        tl_loops.register()


def test_unregistering_gives_the_originals_back():
    names = ("get_act_patch_resid_pre", "generic_activation_patch")
    guarded = {name: getattr(patching, name) for name in names}
    method = ActivationCache.decompose_resid
    tl_loops.unregister()
    try:
        for name in names:
            assert getattr(patching, name) is guarded[name].__wrapped__
        assert ActivationCache.decompose_resid is method.__wrapped__
        assert not any(type(f).__name__ == "_Guards" for f in sys.meta_path)
    finally:
        tl_loops.register()
    tl_loops.register()
    assert sum(type(finder).__name__ == "_Guards" for finder in sys.meta_path) == 1
    assert not hasattr(patching.generic_activation_patch.__wrapped__, "__wrapped__")


LATER = """
from transformer_lens.patching import get_act_patch_resid_pre as before
assert not hasattr(before, "__wrapped__")
import sys
import tl_loops
names = [name for name in %r if name in sys.modules]
import transformer_lens.tools.analysis.attribution_patching as later
from transformer_lens.tools.analysis import attribution_patch
from transformer_lens.model_bridge import TransformerBridge
assert hasattr(before, "__wrapped__"), "imported before"
assert hasattr(later.attribution_patch, "__wrapped__"), "imported later"
assert attribution_patch is later.attribution_patch
assert hasattr(TransformerBridge.all_composition_scores, "__wrapped__")
tl_loops.unregister()
assert not hasattr(before, "__wrapped__") and not hasattr(attribution_patch, "__wrapped__")
print("imported before:", names)
"""


def test_tools_imported_before_and_later_are_guarded():
    script = LATER % list(GUARDED_FUNCTIONS)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    # Importing tl_loops imports no tool: those named here TransformerLens imports by itself.
    assert "tools" not in run.stdout
