"""Components carried through norms and injections sum to the stream; each is right by itself."""

import warnings

import pytest
import torch

from tests.closeness import assert_close
from tests.feedforward import only_before_4
from tests.models import ARCHITECTURES, VARIATIONS, any_model, tiny_model, tiny_tokens
from tl_loops import LoopedSemanticsError
from tl_loops.upstream import HookedTransformer, KeyValueCache

TOKENS = tiny_tokens()
NAMES = [*ARCHITECTURES, *VARIATIONS]
CLOSE = dict(rtol=1e-4, atol=1e-5)


def folded(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.process_weights_()
    return model


@pytest.fixture(params=NAMES, scope="module")
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return any_model(name)


@pytest.fixture(scope="module")
def cache(model):
    return model.run_with_cache(TOKENS)[1]


@pytest.fixture(params=["unfolded", "folded"], scope="module")
def either(request, name):
    """Logits and cache of the model with its weights as they are, or folded."""
    model = any_model(name)
    return (model if request.param == "unfolded" else folded(model)).run_with_cache(TOKENS)


def stream(cache, layer, mlp_input=False):
    """The residual stream that a decomposition must sum to."""
    layout = cache.layout
    if layer < layout.n_layers:
        return cache["resid_mid" if mlp_input else "resid_pre", layer]
    if cache.model.cfg.norm_before_coda and not layout.n_coda:
        return cache["ln_coda.hook_normalized"] * cache.model.ln_final.w
    return cache["resid_post", layout.n_layers - 1]


def normed(norm, prefix, cache):
    """What a norm gave in a run."""
    out = cache[f"{prefix}.hook_normalized"]
    out = out if norm.w is None else out * norm.w
    return out if norm.b is None else out + norm.b


def some_blocks(layout):
    """Blocks at which something begins or ends, and one between."""
    first, n_core = layout.core_start, layout.n_core
    ends = (0, first, first + 1, first + n_core, layout.coda_start - 1, layout.n_layers - 1)
    return sorted({*ends, min(layout.coda_start, layout.n_layers - 1)})


def places(cache):
    for layer in some_blocks(cache.layout):
        yield layer, False
        yield layer, True
    yield cache.layout.n_layers, False


# Sums.


def test_components_sum_to_the_stream_everywhere(either):
    _, cache = either
    shown = ("whole", "parts", "by_iteration") if cache.model.cfg.injection else (None,)
    for layer, mlp_input in places(cache):
        expected = stream(cache, layer, mlp_input)
        for injection in shown:
            stack, labels = cache.decompose_resid(
                layer, mlp_input, return_labels=True, injection=injection
            )
            assert len(labels) == len(set(labels)) == len(stack)
            assert_close(stack.sum(0), expected, **CLOSE)


def test_components_sum_to_what_each_norm_makes_of_the_stream(either):
    _, cache = either
    model = cache.model
    for layer, mlp_input in places(cache):
        stack = cache.decompose_resid(layer, mlp_input, apply_ln=True)
        if layer == cache.layout.n_layers:
            expected = normed(model.ln_final, "ln_final", cache)
        elif model.cfg.block_norm in ("post_branch", "post_norm"):
            expected = stream(cache, layer, mlp_input)
        else:
            name = "ln2" if mlp_input else "ln1"
            norm = getattr(model.blocks[layer], name)
            expected = normed(norm, f"blocks.{layer}.{name}", cache)
        assert_close(stack.sum(0), expected, **CLOSE)


def test_heads_neurons_and_biases_sum_to_the_stream(cache):
    depth = cache.layout.n_layers
    for layer, mlp_input in ((0, True), (cache.layout.core_start + 1, False), (depth, False)):
        for expand in (True, False):
            stack, labels = cache.get_full_resid_decomposition(
                layer, mlp_input, expand_neurons=expand, return_labels=True
            )
            assert len(labels) == len(set(labels)) == len(stack)
            assert_close(stack.sum(0), stream(cache, layer, mlp_input), **CLOSE)
        ln = cache.get_full_resid_decomposition(layer, mlp_input, apply_ln=True)
        assert_close(
            ln.sum(0), cache.decompose_resid(layer, mlp_input, apply_ln=True).sum(0), **CLOSE
        )


def test_attributions_sum_to_the_logits(either):
    logits, cache = either
    model = cache.model
    tokens = TOKENS.roll(-1, 1)
    bias = model.b_U[tokens]
    if model.ln_final.b is not None:
        bias = bias + (model.ln_final.b @ model.W_U)[tokens]
    expected = logits.gather(-1, tokens[..., None])[..., 0] - bias
    for stack in (
        cache.decompose_resid(),
        cache.decompose_resid(injection="parts"),
        cache.get_full_resid_decomposition(),
        cache.stack_head_results(incl_remainder=True),
        cache.stack_neuron_results(incl_remainder=True),
    ):
        assert_close(cache.logit_attrs(stack, tokens).sum(0), expected, **CLOSE)
    one, other = 3, 5
    stack = cache.decompose_resid()
    difference = cache.logit_attrs(stack, one, incorrect_tokens=other).sum(0)
    bias = model.b_U[one] - model.b_U[other]
    if model.ln_final.b is not None:
        bias = bias + model.ln_final.b @ (model.W_U[:, one] - model.W_U[:, other])
    assert_close(difference, logits[..., one] - logits[..., other] - bias, **CLOSE)


# Single components.


def held(model, cache, but=None):
    """Hooks that hold every norm on the stream and every branch output, but one, as they were."""
    posts = ("ln1_post", "ln2_post")
    by_placement = {"post_residual": posts, "post_norm": posts, "stream": ("ln1", "ln2")}
    between = by_placement.get(model.cfg.block_norm, ())

    def is_held(name):
        if name.endswith("hook_scale"):
            on_stream = (
                ".norm.",
                "ln_coda",
                "ln_injection",
                "ln_state",
                *(f".{n}." for n in between),
            )
            return any(part in name for part in on_stream)
        return name.endswith(("hook_attn_out", "hook_mlp_out")) and name != but

    return [(n, lambda x, hook: cache[hook.name].clone()) for n in cache.keys() if is_held(n)]


def end_of(cache, model, hooks):
    """The stream before the final norm, with hooks."""
    found = []
    at = "ln_final.hook_scale"
    name = f"blocks.{cache.layout.n_layers - 1}.hook_resid_post"
    if model.cfg.norm_before_coda and not model.cfg.n_coda:
        name = "ln_coda.hook_normalized"
    hooks = [*hooks, (name, lambda x, hook: found.append(x.clone()) or x)]
    model.run_with_hooks(TOKENS, fwd_hooks=hooks, return_type=None)
    assert at in model.hook_dict
    return found[0] * model.ln_final.w if "ln_coda" in name else found[0]


def test_each_component_is_what_goes_missing_without_it(model, cache):
    # With norm scales and the other branches held the model is linear in each component.
    depth = cache.layout.n_layers
    stack, labels = cache.decompose_resid(return_labels=True, injection="parts")
    before = stream(cache, depth)

    def zero(x, hook):
        return torch.zeros_like(x)

    sites = {"embed": "hook_embed", "pos_embed": "hook_pos_embed"}
    for index in some_blocks(cache.layout):
        for part in ("attn_out", "mlp_out"):
            sites[f"{cache.layout.label(index)}_{part}"] = f"blocks.{index}.hook_{part}"
    if "initial_state" in labels:
        sites["initial_state"] = "hook_initial_state"
    for label, name in sites.items():
        if label not in labels:
            continue
        after = end_of(cache, model, [*held(model, cache, but=name), (name, zero)])
        size = float(before.abs().max())
        assert_close(before - after, stack[labels.index(label)], **CLOSE, size=size, msg=label)


def test_whole_injection_is_what_goes_missing_without_e(model, cache):
    if model.cfg.injection is None:
        pytest.skip("no injection")
    stack, labels = cache.decompose_resid(return_labels=True)

    def zero(x, hook):
        return torch.zeros_like(x)

    def restore(x, hook):
        return cache["hook_initial_state"].clone()

    hooks = [*held(model, cache), ("hook_injection", zero), ("hook_initial_state", restore)]
    missing = stream(cache, cache.layout.n_layers) - end_of(cache, model, hooks)
    assert_close(missing, stack[labels.index("injection")], **CLOSE)
    parts, part_labels = cache.decompose_resid(return_labels=True, injection="by_iteration")
    rows = [i for i, label in enumerate(part_labels) if label.endswith("_injection")]
    assert len(rows) == model.cfg.n_iterations
    assert_close(parts[rows].sum(0), missing, **CLOSE)


def test_each_head_is_what_goes_missing_without_it(model, cache):
    stack, labels = cache.stack_head_results(return_labels=True)
    assert labels == model.all_head_labels()
    before = stream(cache, cache.layout.n_layers)
    for index in (0, cache.layout.coda_start - 1, cache.layout.n_layers - 1):
        head = 2

        def without(x, hook, head=head):
            z = cache[hook.name].clone()
            z[:, :, head] = 0
            return z

        own = f"blocks.{index}.hook_attn_out"
        scale = f"blocks.{index}.ln1_post.hook_scale"
        hooks = [*held(model, cache, but=own), (f"blocks.{index}.attn.hook_z", without)]
        if model.cfg.block_norm in ("sandwich", "post_branch", "stream"):
            hooks.append((scale, lambda x, hook: cache[hook.name].clone()))
        missing = before - end_of(cache, model, hooks)
        assert_close(missing, stack[index * model.cfg.n_heads + head], **CLOSE)


def test_each_neuron_is_what_goes_missing_without_it(model, cache):
    stack, labels = cache.stack_neuron_results(neuron_slice=[7, 20], return_labels=True)
    assert len(labels) == 2 * cache.layout.n_layers
    before = stream(cache, cache.layout.n_layers)
    for index in (0, cache.layout.coda_start - 1, cache.layout.n_layers - 1):

        def without(x, hook):
            post = cache[hook.name].clone()
            post[..., 20] = 0
            return post

        own = f"blocks.{index}.hook_mlp_out"
        hooks = [*held(model, cache, but=own), (f"blocks.{index}.mlp.hook_post", without)]
        if model.cfg.block_norm in ("sandwich", "post_branch", "stream"):
            scale = f"blocks.{index}.ln2_post.hook_scale"
            hooks.append((scale, lambda x, hook: cache[hook.name].clone()))
        missing = before - end_of(cache, model, hooks)
        assert_close(missing, stack[2 * index + 1], **CLOSE, size=float(before.abs().max()))


def test_heads_of_a_block_sum_to_its_attention(model, cache):
    heads = cache.stack_head_results().unflatten(0, (-1, model.cfg.n_heads)).sum(1)
    rows = cache.decompose_resid(mode="attn", incl_embeds=False)
    assert heads.shape == rows.shape
    if not model.cfg.attn_bias:
        assert_close(heads, rows, **CLOSE)
    else:
        assert not torch.allclose(heads, rows, atol=1e-2)  # b_O is in the rows alone


def test_one_mode_is_a_part_of_all(cache):
    every, labels = cache.decompose_resid(return_labels=True, injection="parts")
    for mode in ("attn", "mlp"):
        rows, own = cache.decompose_resid(mode=mode, incl_embeds=False, return_labels=True)
        assert own == [label for label in labels if label.endswith(f"_{mode}_out")]
        assert_close(rows, every[[labels.index(label) for label in own]])


# Agreement with TransformerLens where there is nothing but passes.


def same_without_loop(looped):
    """TransformerLens's own model with every unrolled block as a block of its own."""
    cfg = looped.cfg
    sizes = ("n_layers", "d_model", "d_head", "n_heads", "d_mlp", "d_vocab", "n_ctx", "eps")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(
            dict(
                {size: getattr(cfg, size) for size in sizes},
                act_fn="silu",
                gated_mlp=True,
                normalization_type="RMSPre",
                positional_embedding_type="rotary",
                rotary_dim=cfg.d_head,
                device="cpu",
            )
        )
    model.load_state_dict(looped.state_dict(), strict=False)
    return model


@only_before_4
def test_a_loop_without_specials_is_what_transformer_lens_says():
    ours = folded(any_model("plain"))
    theirs = same_without_loop(ours)
    logits, cache = ours.run_with_cache(TOKENS)
    expected, reference = theirs.run_with_cache(TOKENS)
    assert_close(logits, expected, **CLOSE)
    for call in (
        lambda c: c.decompose_resid(),
        lambda c: c.decompose_resid(3, mlp_input=True, apply_ln=True),
        lambda c: c.decompose_resid(mode="attn", pos_slice=-1),
        lambda c: c.accumulated_resid(incl_mid=True),
        lambda c: c.accumulated_resid(apply_ln=True),
        lambda c: c.accumulated_resid(4, apply_ln=True, mlp_input=True),
        lambda c: c.stack_head_results(apply_ln=True),
        lambda c: c.stack_head_results(3, incl_remainder=True, pos_slice=(1, 4)),
        lambda c: c.stack_neuron_results(4, neuron_slice=(5,), incl_remainder=True),
        lambda c: c.stack_neuron_results(
            -1, apply_ln=True, project_output_onto=c.model.W_U[:, 3], incl_remainder=True
        ),
        lambda c: c.get_full_resid_decomposition(),
        lambda c: c.get_full_resid_decomposition(
            2, mlp_input=True, expand_neurons=False, apply_ln=True
        ),
        lambda c: c.get_full_resid_decomposition(project_output_onto=c.model.W_U[:, :4]),
        lambda c: c.get_neuron_results(2, neuron_slice=(3, 9), pos_slice=-1),
        lambda c: c.get_neuron_results(2, project_output_onto=c.model.W_U[:, :4]),
        lambda c: c.logit_attrs(c.decompose_resid(), TOKENS, incorrect_tokens=TOKENS.roll(1, 1)),
        lambda c: c.logit_attrs(c.decompose_resid(pos_slice=-1), 7, pos_slice=-1),
        lambda c: c.stack_activation("pattern"),
    ):
        assert_close(call(cache), call(reference), **CLOSE)


# Names.


def test_labels_name_iteration_and_layer():
    _, cache = tiny_model("huginn", n_iterations=2).run_with_cache(TOKENS)
    _, labels = cache.decompose_resid(return_labels=True)
    blocks = ["r0.0", "r0.1", "r1.0", "r1.1", "c0", "c1"]
    parts = [f"{b}_{part}_out" for b in blocks for part in ("attn", "mlp")]
    assert labels == ["initial_state", "injection", *parts]
    _, labels = cache.decompose_resid(return_labels=True, injection="parts")
    prelude = [f"p{i}_{part}_out" for i in (0, 1) for part in ("attn", "mlp")]
    assert labels == ["embed", *prelude, "initial_state", *parts]
    _, labels = cache.decompose_resid(1, return_labels=True)
    assert labels == ["embed", "p0_attn_out", "p0_mlp_out"]
    _, labels = cache.stack_head_results(return_labels=True)
    assert labels[0] == "p.L0H0" and labels[4 * 5 + 3] == "r1.L1H3" and labels[-1] == "c.L1H3"
    _, labels = cache.stack_neuron_results(return_labels=True, neuron_slice=-1)
    assert labels[5] == "r1.L1N47"
    _, labels = cache.get_full_resid_decomposition(return_labels=True)
    assert labels[-3:] == ["embed", "initial_state", "bias"]
    _, labels = cache.accumulated_resid(return_labels=True, incl_mid=True, incl_states=True)
    assert labels[:3] == ["p0_pre", "p0_mid", "p1_pre"] and labels[-1] == "final_post"
    assert labels.index("r0_state_out") + 1 == labels.index("r1.0_pre")


def test_a_state_that_starts_as_e_comes_from_the_embedding():
    _, cache = tiny_model("weightless").run_with_cache(TOKENS)
    _, labels = cache.decompose_resid(return_labels=True)
    assert labels[:4] == ["embed", "p0_attn_out", "p0_mlp_out", "injection"]


def test_a_given_initial_state_is_a_component(model):
    state = torch.randn(2, 9, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    _, cache = model.run_with_cache(TOKENS, initial_state=state)
    for injection in ("whole", "parts", "by_iteration"):
        stack, labels = cache.decompose_resid(return_labels=True, injection=injection)
        assert "initial_state" in labels
        assert_close(stack.sum(0), stream(cache, cache.layout.n_layers), **CLOSE)
    if model.cfg.injection is None:
        assert "embed" not in labels  # nothing of it reaches the end


# Windows.


def test_the_state_that_leaves_an_iteration(model, cache):
    for t in (0, model.cfg.n_iterations - 1):
        expected = cache[f"iter.{t}.hook_state_out"]
        assert_close(cache.decompose_resid(state_out=t).sum(0), expected, **CLOSE)
        full = cache.get_full_resid_decomposition(state_out=t)
        assert_close(full.sum(0), expected, **CLOSE)
        assert_close(
            cache.stack_head_results(state_out=t, incl_remainder=True).sum(0), expected, **CLOSE
        )
    with pytest.raises(ValueError, match="not both"):
        cache.decompose_resid(2, state_out=0)
    with pytest.raises(IndexError, match="no iteration 9"):
        cache.decompose_resid(state_out=9)


def test_attributions_of_an_exit_sum_to_its_logits(model, cache):
    stack = cache.decompose_resid(state_out=1)
    if model.cfg.n_coda:
        with pytest.raises(LoopedSemanticsError, match="a coda stands between"):
            cache.logit_attrs(stack, TOKENS, state_out=1)
        return
    logits = model(TOKENS, exit_at=1)
    expected = logits.gather(-1, TOKENS[..., None])[..., 0] - model.b_U[TOKENS]
    if model.ln_final.b is not None and not model.cfg.norm_between_iterations:
        expected = expected - (model.ln_final.b @ model.W_U)[TOKENS]
    assert_close(cache.logit_attrs(stack, TOKENS, state_out=1).sum(0), expected, **CLOSE)


def test_from_an_iteration_on(model, cache):
    for first in (0, 1, model.cfg.n_iterations - 1):
        stack, labels = cache.decompose_resid(from_iteration=first, return_labels=True)
        assert labels[0] == f"r{first}_state_in"
        assert not any(label.startswith(f"r{first - 1}.") for label in labels)
        assert_close(stack.sum(0), stream(cache, cache.layout.n_layers), **CLOSE)
        full = cache.get_full_resid_decomposition(from_iteration=first)
        assert_close(full.sum(0), stream(cache, cache.layout.n_layers), **CLOSE)
    with pytest.raises(ValueError, match="after the place"):
        cache.decompose_resid(0 if model.cfg.n_prelude else 1, from_iteration=1)


def test_selections_take_rows(model, cache):
    layout, heads = cache.layout, model.cfg.n_heads
    every, labels = cache.stack_head_results(return_labels=True)
    for selection in ({"layers": [1, -1]}, {"iterations": 1}, {"iterations": slice(1, None)}):
        stack, own = cache.stack_head_results(return_labels=True, **selection)
        assert 0 < len(own) < len(labels)
        assert_close(stack, every[[labels.index(label) for label in own]])
    rows = cache.decompose_resid(iterations=1, mode="mlp", incl_embeds=False)
    assert len(rows) == layout.n_core
    first = layout.index(iteration=1, layer=0)
    both = cache.stack_neuron_results(layers=[first], iterations=0)
    assert both.shape == (0, 2, 9, model.cfg.d_model)
    remainder = cache.decompose_resid(iterations=1, incl_remainder=True)
    assert_close(remainder.sum(0), stream(cache, layout.n_layers), **CLOSE)
    assert len(cache.stack_head_results(layers=first)) == heads
    with pytest.raises(IndexError, match="no block 99"):
        cache.stack_head_results(layers=99)


# Slices, projections, sizes.


@pytest.mark.parametrize("pos", [-1, (2, 5), [0, 3, 7]])
def test_slicing_positions_first_is_slicing_them_last(model, cache, pos):
    cut = pos if isinstance(pos, (int, list)) else slice(*pos)
    for call in (
        lambda **k: cache.accumulated_resid(apply_ln=True, **k),
        lambda **k: cache.stack_head_results(apply_ln=True, incl_remainder=True, **k),
        lambda **k: cache.get_full_resid_decomposition(3, **k),
    ):
        assert_close(call(pos_slice=pos), call()[:, :, cut], **CLOSE)
    stack, sliced = cache.decompose_resid(), cache.decompose_resid(pos_slice=pos)
    attributions = cache.logit_attrs(stack, 3)[:, :, cut]
    assert_close(cache.logit_attrs(sliced, 3, pos_slice=pos), attributions, **CLOSE)


def test_projected_neurons_equal_neurons_projected(model, cache):
    onto = torch.randn(model.cfg.d_model, 3, generator=torch.Generator().manual_seed(1))
    depth = cache.layout.n_layers
    for layer, options in (
        (depth, {"apply_ln": True}),
        (cache.layout.coda_start - 1, {"mlp_input": True, "pos_slice": -1}),
        (depth, {"from_iteration": 1}),
        (depth, {"state_out": 1}),
        (depth, {"iterations": [0, 2]}),
    ):
        options = {"neuron_slice": (4, 11), "return_labels": True, **options}
        plain, labels = cache.stack_neuron_results(layer, **options)
        for directions in (onto, onto[:, 0]):
            projected, own = cache.stack_neuron_results(
                layer, project_output_onto=directions, **options
            )
            assert own == labels
            assert_close(projected, plain @ directions, **CLOSE)
    remainder = cache.stack_neuron_results(
        project_output_onto=onto, apply_ln=True, incl_remainder=True
    )
    expected = normed(model.ln_final, "ln_final", cache) @ onto
    assert_close(remainder.sum(0), expected, **CLOSE)
    full = cache.get_full_resid_decomposition(project_output_onto=onto, apply_ln=True)
    assert_close(full.sum(0), expected, **CLOSE)
    assert cache.stack_neuron_results(0, project_output_onto=onto).shape == (0, 2, 9, 3)


def test_a_stack_too_large_for_any_machine_is_refused(monkeypatch):
    _, cache = tiny_model("ouro").run_with_cache(TOKENS)
    monkeypatch.setattr("tl_loops.cache.layers.MAX_ELEMENTS", 10_000)
    for call in (
        cache.stack_neuron_results,
        cache.stack_head_results,
        cache.get_full_resid_decomposition,
    ):
        with pytest.raises(LoopedSemanticsError, match="GiB: pass layers"):
            call()
    assert len(cache.stack_neuron_results(layers=1)) == 48
    assert len(cache.stack_neuron_results(4, neuron_slice=0)) == 4
    assert len(cache.stack_neuron_results(project_output_onto=cache.model.W_U[:, 0])) == 12 * 48


# Other runs.


def test_a_cache_goes_by_the_layout_of_its_own_run(model):
    _, cache = model.run_with_cache(TOKENS, n_iterations=5)
    assert cache.layout.n_iterations == 5 and model.cfg.n_iterations != 5
    with model.iterations(5):
        _, expected = model.run_with_cache(TOKENS)
        same = expected.decompose_resid(), expected.stack_head_results(incl_remainder=True)
    depth = cache.layout.n_layers
    assert_close(cache.decompose_resid().sum(0), stream(cache, depth), **CLOSE)
    assert_close(cache.decompose_resid(), same[0])
    assert_close(cache.stack_head_results(incl_remainder=True), same[1])
    assert len(cache.accumulated_resid()) == depth + 1
    cache.compute_head_results()
    assert f"blocks.{depth - 1}.attn.hook_result" in cache


def test_without_a_batch_axis(model):
    _, batched = model.run_with_cache(TOKENS[:1])
    _, cache = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    for call in (
        lambda c: c.decompose_resid(apply_ln=True),
        lambda c: c.stack_head_results(5),
        lambda c: c.get_full_resid_decomposition(5, expand_neurons=False),
        lambda c: c.accumulated_resid(apply_ln=True),
        lambda c: c.stack_neuron_results(5, project_output_onto=model.W_U[:, :2]),
    ):
        assert_close(call(cache), call(batched)[:, 0], **CLOSE)
    stack = cache.decompose_resid()
    assert_close(
        cache.logit_attrs(stack, TOKENS[0], has_batch_dim=False),
        batched.logit_attrs(batched.decompose_resid(), TOKENS[:1])[:, 0],
        **CLOSE,
    )


def test_padded_and_partly_cached_runs(model):
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    past = KeyValueCache.init_cache(model.cfg, torch.device("cpu"), 2)
    model(TOKENS[:, :4], past_kv_cache=past)
    for _, cache in (
        model.run_with_cache(TOKENS, attention_mask=mask),
        model.run_with_cache(TOKENS[:, 4:], past_kv_cache=past),
        model.run_with_cache(TOKENS, pos_slice=(2, 5)),
        model.run_with_cache(TOKENS, pos_slice=-1),
    ):
        full = cache.get_full_resid_decomposition()
        assert_close(full.sum(0), stream(cache, cache.layout.n_layers), **CLOSE)
        ln = cache.decompose_resid(2, apply_ln=True)
        assert ln.shape[1:] == cache["resid_pre", 2].shape


PRECISIONS = [(name, torch.bfloat16, 0.02) for name in NAMES] + [("huginn", torch.float64, 1e-12)]


@pytest.mark.parametrize("name, dtype, rtol", PRECISIONS)
def test_other_precisions(name, dtype, rtol):
    model = any_model(name).to(dtype)
    _, cache = model.run_with_cache(TOKENS)
    expected = stream(cache, cache.layout.n_layers)
    for stack in (cache.decompose_resid(), cache.get_full_resid_decomposition()):
        assert stack.dtype == dtype
        error = (stack.double().sum(0) - expected).norm() / expected.double().norm()
        assert error < rtol
    attributions = cache.logit_attrs(cache.decompose_resid(), TOKENS)
    assert attributions.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)


def test_an_edit_of_the_stream_itself_is_the_remainder():
    model = tiny_model("retrofitted")
    push = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(2))
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_mid"
    with model.hooks(fwd_hooks=[(last, lambda x, hook: x + push)]):
        _, cache = model.run_with_cache(TOKENS)
    stack, labels = cache.decompose_resid(return_labels=True, incl_remainder=True)
    assert labels[-1] == "remainder"
    assert_close(stack[-1], push.expand_as(stack[-1]), **CLOSE)


def test_no_gradient_is_kept(cache):
    assert not cache.decompose_resid().requires_grad
    assert not cache.stack_neuron_results(3).requires_grad


# The stream as it accumulates.


def test_accumulated_rows_are_the_stream(model, cache):
    depth = cache.layout.n_layers
    rows, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert len(rows) == 2 * depth + 1
    for index in range(depth):
        assert torch.equal(rows[2 * index], cache["resid_pre", index])
        assert torch.equal(rows[2 * index + 1], cache["resid_mid", index])
    assert_close(rows[-1], stream(cache, depth), **CLOSE)
    part = cache.accumulated_resid(3, mlp_input=True)
    assert len(part) == 5 and torch.equal(part[-1], cache["resid_mid", 3])
    states, labels = cache.accumulated_resid(incl_states=True, return_labels=True)
    for t in range(model.cfg.n_iterations):
        row = states[labels.index(f"r{t}_state_out")]
        assert torch.equal(row, cache[f"iter.{t}.hook_state_out"])


def test_the_last_row_of_the_logit_lens_is_the_logits(either):
    logits, cache = either
    lens = cache.accumulated_resid(apply_ln=True)
    assert_close(cache.model.unembed(lens[-1]), logits, **CLOSE)


def test_the_logit_lens_of_a_state_is_what_an_exit_reads_out():
    for name in ("ouro", "weightless", "branch_normed_between", "huginn_without_coda"):
        model = any_model(name)
        _, cache = model.run_with_cache(TOKENS)
        lens, labels = cache.accumulated_resid(apply_ln=True, incl_states=True, return_labels=True)
        for t in range(model.cfg.n_iterations):
            exit_logits = model(TOKENS, exit_at=t)
            read = model.unembed(lens[labels.index(f"r{t}_state_out")])
            assert_close(read, exit_logits, **CLOSE)
            if model.cfg.injection is None and t + 1 < model.cfg.n_iterations:
                read = model.unembed(lens[labels.index(f"r{t + 1}.0_pre")])
                assert_close(read, exit_logits, **CLOSE)


def test_at_a_layer_the_last_row_is_what_the_layer_reads(model, cache):
    for layer in some_blocks(cache.layout):
        row = cache.accumulated_resid(layer, apply_ln=True)[-1]
        assert_close(row, cache.decompose_resid(layer, apply_ln=True).sum(0), **CLOSE)


# Norms.


def test_apply_ln_to_stack(model, cache):
    depth = cache.layout.n_layers
    for layer, mlp_input in places(cache):
        stack = cache.decompose_resid(layer, mlp_input)
        scaled = cache.apply_ln_to_stack(stack, layer, mlp_input)
        expected = cache.decompose_resid(layer, mlp_input, apply_ln=True)
        assert_close(scaled, expected[: len(scaled)], **CLOSE)
    stack = stream(cache, depth)[None]
    fresh = cache.apply_ln_to_stack(stack, recompute_ln=True)
    assert_close(fresh[0], normed(model.ln_final, "ln_final", cache), **CLOSE)
    one = cache.apply_ln_to_stack(stack, batch_slice=1)
    assert_close(one, cache.apply_ln_to_stack(stack)[:, 1])
    last = cache.apply_ln_to_stack(stack[:, :, -1], pos_slice=-1)
    assert_close(last, cache.apply_ln_to_stack(stack)[:, :, -1])


def test_split_inputs_share_a_scale_unless_edited():
    model = tiny_model("retrofitted")
    model.set_use_split_qkv_input(True)
    _, cache = model.run_with_cache(TOKENS)
    assert cache["blocks.2.ln1.hook_scale"].ndim == 4
    ln = cache.decompose_resid(2, apply_ln=True)
    expected = cache["blocks.2.ln1.hook_normalized"][:, :, 0] * model.blocks[2].ln1.w
    assert_close(ln.sum(0), expected, **CLOSE)

    def edit(x, hook):
        x[:, :, 1] = 0
        return x

    with model.hooks(fwd_hooks=[("blocks.2.hook_v_input", edit)]):
        _, cache = model.run_with_cache(TOKENS)
    with pytest.raises(LoopedSemanticsError, match="read different inputs"):
        cache.decompose_resid(2, apply_ln=True)


@pytest.mark.parametrize("name", ["weightless", "huginn_without_coda"])
def test_an_early_exit_is_not_taken_for_the_end(name):
    model = any_model(name)
    logits, cache = model.run_with_cache(TOKENS, exit_at=0)
    with pytest.raises(LoopedSemanticsError, match="left the loop early"):
        cache.decompose_resid(apply_ln=True)
    with pytest.raises(LoopedSemanticsError, match="state_out=t"):
        cache.logit_attrs(cache.stack_activation("resid_post"), 3)
    last = model.cfg.n_layers - 1
    expected = cache["resid_mid", last]
    assert_close(cache.decompose_resid(last, mlp_input=True).sum(0), expected, **CLOSE)
    stack = cache.decompose_resid(state_out=0)
    assert_close(cache.logit_attrs(stack, 3, state_out=0).sum(0), logits[..., 3], **CLOSE)


def test_two_layer_norms_in_a_row_are_no_single_norm():
    model = any_model("layer_norm", n_coda=0, norm_before_coda=True)
    logits, cache = model.run_with_cache(TOKENS)
    full = cache.get_full_resid_decomposition(apply_ln=True)
    assert_close(model.unembed(full.sum(0)), logits, **CLOSE)
    with pytest.raises(LoopedSemanticsError, match="two LayerNorms in a row"):
        cache.decompose_resid(state_out=1, apply_ln=True)


# What does not fit.


def test_tokens_must_fit_the_stack(model, cache):
    stack = cache.decompose_resid()
    per_row = cache.logit_attrs(stack, torch.tensor([3, 5]))
    assert_close(per_row[:, 0], cache.logit_attrs(stack, 3)[:, 0])
    assert_close(per_row[:, 1], cache.logit_attrs(stack, 5)[:, 1])
    per_pos = cache.logit_attrs(stack, TOKENS[0])
    assert_close(per_pos[:, 0], cache.logit_attrs(stack, TOKENS)[:, 0])
    with pytest.raises(ValueError, match="do not fit"):
        cache.logit_attrs(stack, torch.arange(5))
    with pytest.raises(ValueError, match="same shape"):
        cache.logit_attrs(stack, TOKENS, incorrect_tokens=3)
    with pytest.raises(ValueError, match="as well as the positions"):
        cache.logit_attrs(stack[:, :, :2], torch.tensor([3, 5]), pos_slice=(0, 2))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(layer=99), "layer=99 is out of range"),
        (dict(layer=-2), "layer=-2 is out of range"),
        (dict(mlp_input=True), "mlp_input=True needs a block"),
        (dict(mode="heads"), "mode must be"),
        (dict(injection="none"), "injection must be one of"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    _, cache = tiny_model("ouro").run_with_cache(TOKENS)
    with pytest.raises(ValueError, match=message):
        cache.decompose_resid(**arguments)


def test_a_cache_that_lacks_something_says_what():
    model = tiny_model("huginn")
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda n: "mlp_out" not in n)
    with pytest.raises(KeyError, match="hook_mlp_out"):
        cache.decompose_resid()
    with pytest.raises(KeyError, match="hook_injection"):
        model.run_with_cache(TOKENS, names_filter=lambda n: n != "hook_injection")[
            1
        ].decompose_resid()
