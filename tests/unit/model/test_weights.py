"""Weights exist once: tying, saving, moving, folding."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.closeness import assert_close
from tests.models import ARCHITECTURES, tiny_model, tiny_tokens
from tl_loops import LoopedSemanticsError, LoopedTransformer

TOKENS = tiny_tokens()


@pytest.fixture(params=ARCHITECTURES, scope="module")
def model(request):
    return tiny_model(request.param)


def storages(module):
    return {p.untyped_storage().data_ptr() for p in module.parameters()}


def test_unrolled_blocks_are_distinct_modules_over_the_same_parameters(model):
    layout = model.layout
    for layer in range(layout.n_core):
        first = model.blocks[layout.index(iteration=0, layer=layer)]
        for t in range(1, layout.n_iterations):
            other = model.blocks[layout.index(iteration=t, layer=layer)]
            assert other is not first
            assert other.hook_resid_pre is not first.hook_resid_pre
            for (name, p), (_, q) in zip(
                first.named_parameters(), other.named_parameters(), strict=True
            ):
                assert p is q, name


def test_physical_state_dict_has_each_weight_once(model):
    physical = model.physical_state_dict()
    assert sum(t.numel() for t in physical.values()) == model.cfg.n_params
    pointers = [(t.untyped_storage().data_ptr(), t.storage_offset()) for t in physical.values()]
    assert len(set(pointers)) == len(pointers)
    names = set(physical)
    with model.iterations(6):
        assert set(model.physical_state_dict()) == names
    state_dict = model.state_dict()
    assert {f"blocks.{i}.attn.W_Q" for i in range(model.cfg.n_layers)} <= set(state_dict)
    assert {"embed.W_E", "unembed.W_U"} <= set(state_dict)


def test_state_dict_round_trip(model):
    other = LoopedTransformer(model.cfg)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_a_tied_head_refuses_another_unembedding():
    model = tiny_model("huginn")
    state_dict = model.state_dict()
    state_dict["unembed.W_U"] = state_dict["unembed.W_U"] + 1
    with pytest.raises(RuntimeError, match="this model ties them"):
        model.load_state_dict(state_dict)


def test_copies_keep_their_own_ties(model):
    other = copy.deepcopy(model)
    assert storages(other).isdisjoint(storages(model))
    assert len(list(other.parameters())) == len(list(model.parameters()))
    assert torch.equal(other(TOKENS), model(TOKENS))
    with torch.no_grad():
        other.blocks[other.layout.core_start].attn.W_Q.zero_()
    last = other.layout.index(iteration=-1, layer=0)
    assert not other.blocks[last].attn.W_Q.any()


def test_moving_keeps_ties_and_the_config_true(model):
    other = copy.deepcopy(model)
    n_parameters = len(list(other.parameters()))
    returned = other.to(torch.bfloat16)
    assert returned is other
    assert other.cfg.dtype == torch.bfloat16
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in other.buffers()} <= {torch.bfloat16}
    assert len(list(other.parameters())) == n_parameters
    assert other(TOKENS).dtype == torch.bfloat16
    other.to("cpu", torch.float32)
    assert (other.cfg.device, other.cfg.dtype) == ("cpu", torch.float32)
    assert_close(other(TOKENS), model(TOKENS), rtol=0.2, atol=0.5)


def test_a_forward_pass_copies_no_weight(model):
    """The storage layout makes every weight that F.linear reads a view."""
    for block in model.physical_blocks().values():
        attn = block.attn
        names = ("W_Q", f"{attn.kv_prefix}W_K", f"{attn.kv_prefix}W_V")
        for weight in (getattr(attn, name) for name in names):
            flat = weight.transpose(1, 2).reshape(-1, weight.shape[1])
            assert flat.data_ptr() == weight.data_ptr()
            assert flat.is_contiguous()
        flat = attn.W_O.permute(2, 0, 1).reshape(attn.W_O.shape[2], -1)
        assert flat.data_ptr() == attn.W_O.data_ptr()
        assert block.mlp.W_in.T.is_contiguous()


def test_stacks_are_over_physical_layers(model):
    cfg = model.cfg
    assert model.W_Q.shape == (cfg.n_physical_layers, cfg.n_heads, cfg.d_model, cfg.d_head)
    assert model.W_K.shape == model.W_Q.shape
    assert model.W_O.shape == (cfg.n_physical_layers, cfg.n_heads, cfg.d_head, cfg.d_model)
    assert model.W_out.shape == (cfg.n_physical_layers, cfg.d_mlp, cfg.d_model)
    assert (model.W_gate is None) == (not cfg.gated_mlp)
    assert model.b_O.shape == (cfg.n_physical_layers, cfg.d_model)
    first = model.blocks[model.layout.core_start]
    assert torch.equal(model.W_Q[cfg.n_prelude], first.attn.W_Q)


def test_saving_and_loading(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(stored) == set(model.physical_state_dict())
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "tl_loops"
    with pytest.warns(UserWarning, match="tokenizer"):
        other = LoopedTransformer.from_pretrained_no_processing(tmp_path / "saved", device="cpu")
    fields = model.cfg.to_dict()
    assert other.cfg.to_dict() == {**fields, "seed": None}  # of the random draw, no longer true
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_loading_physical_weights_is_all_or_nothing(model):
    before = model(TOKENS)
    weights = {name: t * 0 for name, t in model.physical_state_dict().items()}
    weights.pop("embed.W_E")
    weights["embed.W_X"] = torch.zeros(1)
    weights["ln_final.w" if model.cfg.norm_has_weight else "core.0.attn.W_O"] = torch.zeros(2)
    with pytest.raises(ValueError) as error:
        model.load_physical_state_dict(weights)
    for part in ("missing: embed.W_E", "unexpected: embed.W_X", "found (2,)"):
        assert part in str(error.value)
    assert torch.equal(model(TOKENS), before)


def test_streamed_weights_must_fit(model):
    weights = model.physical_state_dict()
    weights.pop("embed.W_E")
    with pytest.raises(ValueError, match=r"missing weights: embed\.W_E"):
        LoopedTransformer(model.cfg, weights=weights.items())
    weights["embed.W_E"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"embed\.W_E: expected \(50, 32\), found \(3, 3\)"):
        LoopedTransformer(model.cfg, weights=weights.items())


def test_folding_keeps_the_logits_and_says_what_it_left(model):
    folded = copy.deepcopy(model)
    with pytest.warns(UserWarning) as warned:
        folded.process_weights_()
    assert len(warned) == 1
    message = str(warned[0].message)
    assert "center_unembed" in message
    assert_close(folded(TOKENS), model(TOKENS), rtol=2e-5, atol=2e-5)
    cfg = folded.cfg
    if cfg.norm_has_weight and cfg.normalization_type == "RMS":
        if cfg.block_norm != "post_branch":
            assert all((b.ln1.w == 1).all() for b in folded.physical_blocks().values())
        used_once = not (cfg.norm_before_coda or cfg.norm_between_iterations)
        assert bool((folded.ln_final.w == 1).all()) == (used_once and not cfg.tie_word_embeddings)
        assert ("ln_final" in message) != (used_once and not cfg.tie_word_embeddings)
    if cfg.attn_bias:
        assert not folded.b_V.any()
        assert model.b_V.any()


def test_nothing_to_leave_means_no_warning(model, recwarn):
    copy.deepcopy(model).process_weights_(
        fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    assert not recwarn.list


def test_refactoring_is_refused(model):
    with pytest.raises(LoopedSemanticsError, match=r"model\.QK and model\.OV"):
        model.process_weights_(refactor_factored_attn_matrices=True)
