"""tl_loops.loop over a TransformerBridge: the Hugging Face layers run again, under names."""

import warnings

import pytest
import torch

import tl_loops
from tests.bridged.models import bridged, build_bridge
from tests.feedforward import only_from_4, plain_model
from tests.parity.test_feedforward import TOKENS, close, original
from tl_loops import (
    ConfigError,
    HookNameError,
    LoopedSemanticsError,
    LoopedTransformer,
    UnrolledBridge,
    lens,
    measure,
)
from tl_loops.patching import activation_patch

KINDS = ("gpt2", "llama 3", "mistral", "qwen2", "qwen3", "olmo2", "pythia", "gpt-neox, in turn")
DEEP = ("gpt2", "qwen3", "olmo2", "pythia")
"""Learned positions, norms of heads, norms after branches, branches side by side."""
LOOP = (1, 3, 3)
pytestmark = pytest.mark.filterwarnings(
    "ignore:A forward hook edited", "ignore:Backward hooks on", "ignore:.*no tokenizer files"
)


def bridge_of(kind):
    """A fresh bridge around the random model of a case."""
    model = original(kind)
    return build_bridge(model, model.config)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Per kind: a bridge, a loop over it, and the same loop over the same checkpoint."""
    models = {}

    def make(kind):
        if kind not in models:
            directory = tmp_path_factory.mktemp("checkpoint")
            original(kind).save_pretrained(directory)
            bridge = bridge_of(kind)
            models[kind] = (
                bridge,
                tl_loops.loop(bridge, *LOOP),
                LoopedTransformer.from_pretrained_no_processing(directory, loop=LOOP),
            )
        return models[kind]

    return make


@pytest.fixture(params=KINDS)
def models(request, made):
    return made(request.param)


@pytest.fixture(params=DEEP)
def pair(request, made):
    return made(request.param)[1:]


@pytest.fixture
def one(made):
    return made("qwen3")


def finite(x):
    return x.where(x.isfinite() & (x > -1e30), 0.0)  # What the causal mask hides.


def test_one_iteration_is_the_bridge_itself(models):
    bridge, looped, _ = models
    with torch.no_grad():
        expected, theirs = bridge.run_with_cache(TOKENS, use_cache=False)
        logits, ours = looped.run_with_cache(TOKENS, n_iterations=1)
    assert torch.equal(logits, expected)
    for ours_name, theirs_name in (("hook_resid_post", "hook_out"), ("attn.hook_z",) * 2):
        assert torch.equal(ours[f"blocks.2.{ours_name}"], theirs[f"blocks.2.{theirs_name}"])
    with torch.no_grad():
        close(logits, bridge(TOKENS))


def test_iterations_are_those_of_the_same_checkpoint(models):
    _, looped, expected = models
    assert looped.cfg.notation == expected.cfg.notation == "(1, 2⊗3, 1)"
    assert looped.cfg.n_params == expected.cfg.n_params
    for n in (1, 3, 5):
        close(looped(TOKENS, n_iterations=n), expected(TOKENS, n_iterations=n))


def test_every_cached_tensor_is_that_of_the_looped_transformer(models):
    _, looped, other = models
    with torch.no_grad():
        cache, expected = (model.run_with_cache(TOKENS)[1] for model in (looped, other))
    given, missing = set(looped.hook_dict), set(looped.missing)
    assert set(cache.keys()) == given
    assert given | missing == set(other.hook_dict) and not given & missing
    for name in cache.keys():
        assert cache[name].shape == expected[name].shape
        close(finite(cache[name]), finite(expected[name]))


def test_only_the_inputs_of_single_heads_are_missing(one, made):
    looped = one[1]
    ends = {name.rsplit(".", 1)[-1] for name in looped.missing}
    inputs = {f"hook_{x}" for x in ("q_input", "k_input", "v_input", "attn_in", "mlp_in")}
    assert ends == inputs | {"hook_result"}
    pythia = made("pythia")[1]
    with pytest.raises(HookNameError, match=r"a bridge does not give.*rotates them where no"):
        pythia.add_hook("iter.1.0.attn.hook_rot_q", lambda x, hook: None)


def test_several_loops_are_those_of_the_looped_transformer(made, tmp_path):
    for kind, how in (
        ("pythia", dict(loops=[(0, 2, 2), (3, 4, 3)])),
        ("gpt2", dict(repeats={1: 2, 2: 3})),
    ):
        original(kind).save_pretrained(tmp_path / kind)
        plain = LoopedTransformer.from_pretrained_no_processing(tmp_path / kind)
        looped, other = (tl_loops.loop(model, **how) for model in (made(kind)[0], plain))
        assert looped.layout == other.layout
        with torch.no_grad():
            logits, cache = looped.run_with_cache(TOKENS)
            expected, theirs = other.run_with_cache(TOKENS)
        close(logits, expected)
        for name in cache.keys():
            close(finite(cache[name]), finite(theirs[name]))
        close(looped.looped()(TOKENS), expected)
        with pytest.raises(LoopedSemanticsError, match="does not say which"):
            looped.set_iterations(2)


def places(model):
    """Hook points of one layer at iteration 1, those between iterations, the last stream."""
    block = f"blocks.{model.layout.index(iteration=1, layer=0)}."
    for name in model.hook_dict:
        if not name.startswith("blocks.") or name.startswith(block):
            yield name
    yield f"blocks.{model.layout.n_layers - 1}.hook_resid_post"


def edit(x, hook):
    if hook.name.endswith(("hook_pattern", "hook_attn_scores")):
        return x.flip(-3)  # Stays a pattern.
    x = x.clone()
    x[:, 2:4] = 1.3 * x[:, 2:4] + 0.1
    return x


def test_an_edit_at_one_iteration_is_the_looped_transformers(pair):
    looped, _ = pair
    changed = 0
    with torch.no_grad():
        before = looped(TOKENS)
        for name in places(looped):
            found, expected = (
                model.run_with_hooks(TOKENS, fwd_hooks=[(name, edit)]) for model in pair
            )
            close(found, expected)
            changed += not torch.allclose(found, before, atol=1e-5)
        assert torch.equal(looped(TOKENS), before)
    assert changed > 0.9 * len(list(places(looped)))


def test_gradients_at_one_iteration_are_the_looped_transformers(pair):
    names = ["iter.1.0.hook_resid_pre", "iter.1.0.attn.hook_z", "iter.0.hook_state_out"]
    gradients = []
    for model in pair:
        found = {}

        def keep(grad, hook, found=found):
            found[hook.name] = grad.detach().clone()

        with model.hooks(bwd_hooks=[(name, keep) for name in names]):
            model(TOKENS)[:, -1].pow(2).sum().backward()
        gradients.append(found)
    assert len(gradients[0]) == 3
    for name, grad in gradients[0].items():
        assert grad.abs().max() > 0
        close(grad, gradients[1][name])


def test_gradients_of_all_iterations_gather_at_the_bridge(one):
    _, looped, other = one
    assert not any(parameter.requires_grad for parameter in looped.parameters())
    looped.bridge.zero_grad()
    other.zero_grad()
    for model in (looped, other):
        model(TOKENS, return_type="loss").backward()
    weight = looped.bridge.original_model.get_parameter("model.layers.1.mlp.down_proj.weight")
    close(weight.grad.T, other.blocks[1].mlp.W_out.grad)


def test_no_weight_is_copied_and_no_module_changed():
    for kind in ("gpt2", "pythia"):  # TransformerLens splits their fused matrices.
        bridge = bridge_of(kind)
        modules = list(bridge.original_model.modules())
        held = {weight.untyped_storage().data_ptr() for weight in bridge.parameters()}
        looped = tl_loops.loop(bridge, 0, 2, 4)
        seen = {weight.untyped_storage().data_ptr() for weight in looped.parameters()}
        assert seen <= held
        before = looped(TOKENS)
        assert list(bridge.original_model.modules()) == modules
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in bridge.blocks)
        with torch.no_grad():
            for weight in bridge.blocks.parameters():
                weight.mul_(1.1)
        assert not torch.allclose(looped(TOKENS), before)
        close(looped(TOKENS), looped.looped()(TOKENS))


def test_hooks_of_the_bridge_itself_fire_at_every_pass(one):
    bridge, looped, _ = one
    fires = {1: 0, 3: 0}
    for layer in fires:
        bridge.add_hook(
            f"blocks.{layer}.hook_out", lambda x, hook, layer=layer: count(fires, layer)
        )
    looped(TOKENS)
    assert fires == {1: 3, 3: 1}
    bridge(TOKENS)
    assert fires == {1: 4, 3: 2}
    bridge.reset_hooks()


def count(fires, layer):
    fires[layer] += 1


def test_a_run_that_stops_or_fails_leaves_the_bridge_as_it_was(one):
    bridge, looped, other = one
    with torch.no_grad():
        before = bridge(TOKENS)
        for stop in (0, 1, 3, 6, 7, 8):
            found, expected = (model(TOKENS, stop_at_layer=stop) for model in (looped, other))
            close(found, expected)

        def fail(x, hook):
            raise RuntimeError("of the user's own")

        with pytest.raises(RuntimeError, match="of the user's own"):
            looped.run_with_hooks(TOKENS, fwd_hooks=[("iter.1.0.hook_resid_post", fail)])
        assert torch.equal(bridge(TOKENS), before)
    assert not [point for point in bridge.hook_dict.values() if point.fwd_hooks]


def metric(logits):
    return (logits[:, -1, 5] - logits[:, -1, 8]).sum()


def test_the_tools_are_those_of_the_looped_transformer(pair):
    results = []
    for model in pair:
        with torch.no_grad():
            _, cache = model.run_with_cache(TOKENS[:1])
            over = ("iteration", "head")
            stack = cache.decompose_resid()
            results.append(
                {
                    "patching": activation_patch(
                        model, TOKENS[1:], cache, metric, "z", over, progress=False
                    ),
                    "lens": lens.logit_lens(model, TOKENS, points="states").entropy,
                    "measured": measure(
                        model, list(TOKENS), ("residual_norm",), progress=False
                    ).mean("residual_norm"),
                    "sum of components": stack.sum(0),
                    "heads": cache.stack_head_results(iterations=1),
                }
            )
            close(stack.sum(0), cache["resid_post", -1])
    for name, found in results[0].items():
        close(found, results[1][name])


def test_padding_is_that_of_the_looped_transformer(models):
    _, looped, other = models
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    found, expected = (model(TOKENS, attention_mask=mask) for model in (looped, other))
    close(found[0, 3:], expected[0, 3:])
    close(found[1], expected[1])


def test_generation_without_a_key_value_cache(one):
    _, looped, other = one
    options = dict(do_sample=False, stop_at_eos=False, verbose=False, max_new_tokens=3)
    found = looped.generate(TOKENS, use_past_kv_cache=False, **options)
    assert torch.equal(found, other.generate(TOKENS, **options))
    with pytest.raises(LoopedSemanticsError, match="use_past_kv_cache=False"):
        looped.generate(TOKENS, **options)


def test_iterations_change_and_come_back(one):
    _, looped, other = one
    before = looped(TOKENS)
    with looped.iterations(5):
        assert "iter.4.hook_state_out" in looped.hook_dict
        close(looped(TOKENS), other(TOKENS, n_iterations=5))
    assert torch.equal(looped(TOKENS), before)


# What is refused.


def test_arguments_are_checked_before_anything_runs(one):
    bridge, looped, _ = one
    with pytest.raises(ConfigError, match="0 <= start < stop <= 4"):
        tl_loops.loop(bridge, 2, 5, 2)
    with pytest.raises(LoopedSemanticsError, match=r"or loop model\.bridge with other"):
        tl_loops.loop(looped, 1, 2, 2)
    assert isinstance(looped, UnrolledBridge)
    for arguments in ({"start_at_layer": 1}, {"start_at_iteration": 1}, {"exit_at": 0}):
        with pytest.raises(LoopedSemanticsError, match=r"model\.looped\(\)"):
            looped(TOKENS, **arguments)
    with pytest.raises(LoopedSemanticsError, match="edit hook_initial_state"):
        looped(TOKENS, initial_state=torch.zeros(*TOKENS.shape, 32))
    with pytest.raises(LoopedSemanticsError, match=r"loop\(bridge, \.\.\.\) again"):
        looped.to(torch.float64)


def test_a_bridge_of_a_looped_model_has_its_own_loop():
    with pytest.raises(LoopedSemanticsError, match=r"looped already \(ouro\).*unroll"):
        tl_loops.loop(bridged("ouro"), 0, 1, 2)
    with pytest.raises(LoopedSemanticsError, match=r"gives it a loop"):
        tl_loops.unroll(bridge_of("llama tied"))


@only_from_4
def test_layers_that_are_not_known_do_not_repeat():
    plain = plain_model(n_layers=2, d_model=8, d_head=4, n_ctx=8, d_vocab=9, act_fn="gelu", seed=0)
    with pytest.raises(LoopedSemanticsError, match=r"gpt2, llama.*got one with Native"):
        tl_loops.loop(plain, 0, 1, 2)


def test_a_variant_that_is_not_exact_does_not_repeat():
    bridge = bridge_of("mistral")
    bridge.original_model.config.sliding_window = 8
    with pytest.raises(LoopedSemanticsError, match=r"(?s)cannot be looped.*'sliding_window' = 8"):
        tl_loops.loop(bridge, 0, 1, 2)


def test_processed_weights_do_not_repeat():
    bridge = bridge_of("llama tied")
    looped = tl_loops.loop(bridge, 1, 2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge.enable_compatibility_mode(disable_warnings=True)
    for use in (lambda: looped(TOKENS), lambda: tl_loops.loop(bridge, 1, 2, 2)):
        with pytest.raises(LoopedSemanticsError, match="no_processing=True"):
            use()
