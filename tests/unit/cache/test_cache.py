"""The cache's own business: what is in it, where it is, which rows, stacked how."""

import copy
import logging

import numpy as np
import pytest
import torch

import tl_loops
from tests.closeness import assert_close
from tests.feedforward import plain_model
from tests.models import ARCHITECTURES, any_model, tiny_model, tiny_tokens
from tests.unit.upstream.test_inputs import TEXTS
from tests.unit.upstream.test_inputs import looped as looped_with_tokenizer
from tl_loops import LoopedSemanticsError
from tl_loops.cache.cache import LoopedActivationCache
from tl_loops.upstream import ActivationCache, Slice, model_input

TOKENS = tiny_tokens()
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(params=[*ARCHITECTURES, "biased_sandwich", "biased_post_residual"], scope="module")
def model(request):
    return any_model(request.param)


@pytest.fixture
def cache(model):
    return model.run_with_cache(TOKENS)[1]


def tensors(cache):
    return {(x.data_ptr(), x.shape, x.stride()) for x in cache.values()}


# Addressing.


def test_dictionary_methods_show_canonical_names(model, cache):
    names = list(cache.keys())
    assert len(cache) == len(names) == len(list(cache.values())) == len(list(cache.items()))
    assert list(cache) == names
    assert all(name in model.hook_dict and name in cache for name in names)
    assert all(cache[name] is tensor for name, tensor in cache.items())


def test_negative_blocks_count_from_the_end_of_the_run(model):
    _, cache = model.run_with_cache(TOKENS, n_iterations=5)
    depth = model.layout.with_iterations(5).n_layers
    assert cache["resid_post", -1] is cache[f"blocks.{depth - 1}.hook_resid_post"]
    assert cache["post", -2, "mlp"] is cache[f"blocks.{depth - 2}.mlp.hook_post"]
    assert cache["pattern", -1, 0] is cache["iter.4.0.attn.hook_pattern"]


def test_states_between_iterations_by_shorthand(model, cache):
    assert cache["state_out", 1] is cache["iter.1.hook_state_out"]
    assert cache["injected", -1] is cache[f"iter.{model.cfg.n_iterations - 1}.hook_injected"]
    assert cache["embed"] is cache["hook_embed"]
    with pytest.raises(IndexError, match="no iteration"):
        cache["state_out", 99]


# Moving and slicing.


def test_moving_keeps_one_tensor_one_tensor(cache):
    before = {name: tensor.clone() for name, tensor in cache.items()}
    shared = len(tensors(cache))
    assert shared < len(cache)  # a block's output is the next one's input
    assert cache.to(torch.device("cpu")) is cache
    assert len(tensors(cache)) == shared
    for name, tensor in cache.items():
        assert torch.equal(tensor, before[name])


def test_a_copy_to_another_place_is_made_once(model, cache):
    shared = len(tensors(cache))
    moved = cache._each_once(torch.clone)
    assert len({x.data_ptr() for x in moved.values()}) == shared
    assert all(torch.equal(moved[name], cache[name]) for name in moved)


@pytest.mark.parametrize(
    "rows, cut",
    [
        (1, 1),
        ((0, 1), slice(0, 1)),
        ([1, 0, 1], [1, 0, 1]),
        (None, slice(None)),
        (Slice((1, 2)), slice(1, 2)),
    ],
)
def test_batch_rows(model, cache, rows, cut):
    sliced = cache.apply_slice_to_batch_dim(rows)
    assert isinstance(sliced, LoopedActivationCache)
    for name, tensor in sliced.items():
        assert torch.equal(tensor, cache[name][cut])
    assert sliced.has_batch_dim == (rows != 1)
    assert_close(sliced.decompose_resid(), cache.decompose_resid()[:, cut], **CLOSE)


def test_rows_of_a_run_with_other_iterations_keep_its_layout(model):
    _, cache = model.run_with_cache(TOKENS, n_iterations=4)
    assert cache.apply_slice_to_batch_dim(0).layout.n_iterations == 4


def test_removing_the_batch_axis(model, cache):
    _, one = model.run_with_cache(TOKENS[:1])
    _, expected = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    assert one.remove_batch_dim() is one and not one.has_batch_dim
    for name, tensor in one.items():
        assert torch.equal(tensor, expected[name])
    with pytest.raises(AssertionError, match="batch size 2"):
        cache.remove_batch_dim()
    with pytest.raises(ValueError, match="no batch axis"):
        one.apply_slice_to_batch_dim(0)
    assert torch.equal(one.apply_slice_to_batch_dim(None)["embed"], one["embed"])


def test_removing_the_batch_axis_of_a_number_of_prompts_that_is_known(model):
    _, cache = model.run_with_cache(TOKENS[:1])
    _, expected = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    with pytest.raises(AssertionError, match="of a cache of 2 prompts"):
        cache.remove_batch_dim(2)
    assert cache.has_batch_dim
    assert cache.remove_batch_dim(1) is cache and not cache.has_batch_dim
    assert all(torch.equal(cache[name], expected[name]) for name in expected)


# Stacking.


def test_stacks_over_blocks_and_iterations(model, cache):
    layout = model.layout
    patterns = cache.stack_activation("pattern")
    assert patterns.shape[0] == layout.n_layers
    for index in range(layout.n_layers):
        assert torch.equal(patterns[index], cache["pattern", index])
    by_iteration = cache.stack_activation("pattern", by_iteration=True)
    assert torch.equal(by_iteration, layout.by_iteration(patterns))
    assert torch.equal(by_iteration[2, 1], cache["pattern", 2, 1])
    assert torch.equal(cache.stack_activation("resid_pre", 2), patterns_of(cache, 2))
    states = cache.stack_activation("state_out")
    assert states.shape[0] == layout.n_iterations
    assert torch.equal(states[1], cache["iter.1.hook_state_out"])
    norm = "ln1" if model.cfg.block_norm == "pre" else "ln1_post"
    scales = cache.stack_activation("scale", sublayer_type=norm)
    assert scales.shape == (layout.n_layers, 2, 9, 1)
    with pytest.raises(ValueError, match="cannot be combined"):
        cache.stack_activation("state_out", 2)
    with pytest.raises(ValueError, match="out of range"):
        cache.stack_activation("pattern", 99)


def patterns_of(cache, n):
    return torch.stack([cache["resid_pre", index] for index in range(n)])


# Heads and neurons of one block.


def test_computed_head_results_are_those_of_the_hook(model):
    model.set_use_attn_result(True)
    try:
        _, expected = model.run_with_cache(TOKENS)
    finally:
        model.set_use_attn_result(False)
    _, cache = model.run_with_cache(TOKENS)
    cache.compute_head_results()
    for index in range(model.cfg.n_layers):
        assert_close(cache["result", index], expected["result", index], **CLOSE)
        assert cache["result", index].shape == (2, 9, model.cfg.n_heads, model.cfg.d_model)
    entries = len(cache)
    cache.compute_head_results()
    assert len(cache) == entries


def test_head_results_times_the_frozen_norm_sum_to_the_attention(model, cache):
    cache.compute_head_results()
    for index, block in enumerate(model.blocks):
        total = cache["result", index].sum(-2) + block.attn.b_O
        if model.cfg.block_norm in ("sandwich", "post_branch"):
            scale = cache[f"blocks.{index}.ln1_post.hook_scale"]
            total = total * block.ln1_post.w / scale
        elif model.cfg.block_norm == "stream":
            rate = (model.cfg.residual_rate * block.attn_rate.w).abs()
            total = total * rate / cache[f"blocks.{index}.ln1_post.hook_scale"]
        assert_close(total, cache["attn_out", index], **CLOSE)


def test_head_results_need_z():
    model = tiny_model("huginn")
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda n: n.endswith("resid_pre"))
    with pytest.raises(KeyError, match="hook_z"):
        cache.compute_head_results()
    _, cache = model.run_with_cache(TOKENS, names_filter="blocks.3.attn.hook_z")
    cache.compute_head_results()
    assert "blocks.3.attn.hook_result" in cache and len(cache) == 2


def test_neurons_of_a_block_sum_to_its_mlp(model, cache):
    for index, block in enumerate(model.blocks):
        total = cache.get_neuron_results(index).sum(-2)
        bias = block.mlp.b_out.expand_as(total)
        if model.cfg.block_norm in ("sandwich", "post_branch"):
            bias = bias * block.ln2_post.w / cache[f"blocks.{index}.ln2_post.hook_scale"]
        assert_close(total + bias, cache["mlp_out", index], **CLOSE)


def test_neuron_results_slice_and_project(model, cache):
    every = cache.get_neuron_results(2)
    onto = torch.randn(model.cfg.d_model, 3, generator=torch.Generator().manual_seed(0))
    assert_close(cache.get_neuron_results(2, neuron_slice=(3, 7)), every[..., 3:7, :], **CLOSE)
    assert_close(cache.get_neuron_results(2, neuron_slice=5), every[..., 5, :], **CLOSE)
    assert_close(cache.get_neuron_results(2, pos_slice=-1), every[:, -1], **CLOSE)
    projected = cache.get_neuron_results(2, project_output_onto=onto)
    assert_close(projected, every @ onto, **CLOSE)
    one = cache.get_neuron_results(2, pos_slice=4, project_output_onto=onto[:, 0])
    assert_close(one, (every @ onto[:, 0])[:, 4], **CLOSE)
    last = cache.get_neuron_results(-1)
    assert_close(last, cache.get_neuron_results(model.cfg.n_layers - 1))
    with pytest.raises(IndexError, match="no block 99"):
        cache.get_neuron_results(99)


# The rest.


def test_there_are_no_state_space_mixers(cache):
    assert cache.ssm_layers() == []
    with pytest.raises(LoopedSemanticsError, match="hook_state_out"):
        cache.compute_ssm_state()
    with pytest.raises(LoopedSemanticsError, match="cache\\['pattern', i\\]"):
        cache.compute_ssm_effective_attention(layer=0)


def test_toggling_autodiff_is_global_as_upstream(cache, caplog):
    enabled = torch.is_grad_enabled()
    try:
        with caplog.at_level(logging.WARNING):
            cache.toggle_autodiff(False)
        assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(enabled)


def test_a_cache_made_by_hand_is_a_looped_one():
    model = tiny_model("huginn")
    _, cache = model.run_with_cache(tiny_tokens())
    made = ActivationCache(dict(cache.items()), model)
    assert type(made) is LoopedActivationCache
    assert_close(made.decompose_resid(), cache.decompose_resid(), rtol=0, atol=0)
    assert_close(made["resid_post", 1, 0], cache["resid_post", 1, 0], rtol=0, atol=0)
    copied = copy.deepcopy(made)
    assert type(copied) is LoopedActivationCache and len(copied) == len(made)
    try:
        tl_loops.unregister()
        assert type(ActivationCache(dict(cache.items()), model)) is ActivationCache
        assert type(LoopedActivationCache(dict(cache.items()), model)) is LoopedActivationCache
    finally:
        tl_loops.register()


SMALL = dict(
    n_layers=1, d_model=8, d_head=4, n_heads=2, n_ctx=8, d_vocab=10, d_mlp=16, act_fn="gelu"
)


def test_a_cache_of_another_model_stays_what_it_is():
    made = ActivationCache({"hook_embed": torch.zeros(1, 2, 3)}, plain_model(**SMALL))
    assert type(made) is ActivationCache
    assert type(copy.deepcopy(made)) is ActivationCache


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_cache_carries_the_mask_of_its_run(side):
    model = looped_with_tokenizer(side)
    _, cache = model.run_with_cache(TEXTS)
    expected = model_input(model, TEXTS).mask
    assert cache.mask is not None and expected is not None
    assert torch.equal(cache.mask, expected) and cache.mask.sum() == 11
    assert torch.equal(cache.to("cpu").mask, expected)
    row = cache.apply_slice_to_batch_dim(slice(0, 1))
    assert torch.equal(row.mask, expected[:1])
    assert torch.equal(cache.apply_slice_to_batch_dim(0).mask, expected[0])
    assert torch.equal(row.remove_batch_dim().mask, expected[0])
    assert torch.equal(model.run_with_cache(TEXTS, pos_slice=(-3, None))[1].mask, expected[:, -3:])
    # A single text has no padding, although it ends in the padding token.
    assert model.run_with_cache("a b <eos>")[1].mask is None


@torch.no_grad()
def test_a_cache_carries_the_mask_that_the_run_was_given():
    model = looped_with_tokenizer()
    tokens = model.to_tokens(TEXTS[1])
    mask = torch.ones_like(tokens)
    mask[:, :2] = 0
    _, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter="hook_embed")
    assert torch.equal(cache.mask, mask.bool())
    resid = model(tokens, stop_at_layer=0)
    _, later = model.run_with_cache(resid, start_at_layer=0, attention_mask=mask)
    assert torch.equal(later.mask, mask.bool())
    assert model.run_with_cache(resid, start_at_layer=0)[1].mask is None


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ([1, 4], [1, 4]),
        ([0, 2, 3], [0, 2, 3]),
        (np.array([1, 4]), [1, 4]),
        (torch.tensor([1, 4]), [1, 4]),
        ((1, 4), [1, 2, 3]),
        ((0, 5, 2), [0, 2, 4]),
        ((None, 4), [0, 1, 2, 3]),
        (slice(1, 4), [1, 2, 3]),
    ],
    ids=repr,
)
def test_lists_and_arrays_choose_positions_and_tuples_are_slices(given, chosen):
    _, cache = tiny_model("retrofitted").run_with_cache(tiny_tokens(2, 6))
    for method in (
        "accumulated_resid",
        "decompose_resid",
        "stack_head_results",
        "stack_neuron_results",
        "get_full_resid_decomposition",
    ):
        whole = getattr(cache, method)()
        found = getattr(cache, method)(pos_slice=given)
        assert_close(found, whole[:, :, chosen], atol=1e-5, rtol=1e-5, msg=method)
    neurons = cache.get_neuron_results(1)
    found = cache.get_neuron_results(1, neuron_slice=given)
    assert_close(found, neurons[:, :, chosen], atol=1e-5, rtol=1e-5)
