"""Weights that are NaN or infinite."""

import pytest
import torch

from tests.unit.loading.files_of import FIXTURES, stored, written
from tl_loops import HookedTransformer, LoopedTransformer, LoopedTransformerConfig
from tl_loops.errors import CheckpointError

PLACES = [
    ("ouro", "model.layers.1.self_attn.q_proj.weight"),
    ("ouro", "model.norm.weight"),
    ("huginn", "transformer.wte.weight"),
    ("huginn", "transformer.core_block.1.attn.Wqkv.weight"),
]


@pytest.mark.parametrize(("name", "key"), PLACES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, name, key, value, dtype):
    tensors = stored(name)
    tensors[key].view(-1)[7] = value
    directory = written(tmp_path / "c", name, tensors)
    with pytest.raises(CheckpointError, match=rf"{key}.*NaN or infinite.*allow_non_finite"):
        HookedTransformer.from_pretrained(str(directory), dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_who_asks_for_them_gets_weights_that_are_no_numbers(tmp_path, dtype):
    tensors = stored("ouro")
    tensors["model.norm.weight"][3] = float("nan")
    directory = written(tmp_path / "c", "ouro", tensors)
    model = LoopedTransformer.from_pretrained_no_processing(
        directory, dtype=dtype, allow_non_finite=True
    )
    assert model.ln_final.w.isnan().nonzero().tolist() == [[3]]


def test_a_number_that_the_wanted_type_cannot_hold_is_refused(tmp_path):
    tensors = stored("ouro")
    tensors["model.norm.weight"][3] = 1e30
    directory = written(tmp_path / "c", "ouro", tensors)
    LoopedTransformer.from_pretrained_no_processing(directory)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*1e\+30.*float16"):
        LoopedTransformer.from_pretrained_no_processing(directory, dtype="float16")


def test_a_tied_copy_that_is_the_same_and_no_number_is_the_same(tmp_path):
    tensors = stored("huginn")
    tensors["transformer.wte.weight"][5, 5] = float("nan")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    directory = written(tmp_path / "c", "huginn", tensors)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        LoopedTransformer.from_pretrained_no_processing(directory)
    LoopedTransformer.from_pretrained_no_processing(directory, allow_non_finite=True)


def test_the_largest_numbers_of_a_type_are_numbers(tmp_path):
    tensors = stored("ouro")
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key].view(-1)[:4] = torch.tensor([3.3e38, -3.3e38, 1e-45, 0.0])
    directory = written(tmp_path / "c", "ouro", tensors)
    model = LoopedTransformer.from_pretrained_no_processing(directory)
    assert torch.equal(model.blocks[0].mlp.W_in, tensors[key].T)


@pytest.mark.parametrize("weight", ["W_Q", "W_K", "W_V", "W_O"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("length", [9, 200])
def test_fused_and_explicit_attention_agree_on_what_is_no_number(weight, value, length):
    cfg = LoopedTransformerConfig(
        n_prelude=1,
        n_core=2,
        n_coda=1,
        n_iterations=3,
        injection="concat",
        initial_state="normal",
        d_model=32,
        d_head=8,
        n_heads=4,
        d_mlp=64,
        d_vocab=50,
        n_ctx=256,
        seed=0,
        initializer_range=0.3,
        device="cpu",
    )
    model = LoopedTransformer(cfg)
    with torch.no_grad():
        getattr(model.blocks[1].attn, weight)[1, 2, 3] = value
    tokens = torch.arange(length)[None] % 50
    fused = model(tokens)
    explicit, _ = model.run_with_cache(tokens)
    assert torch.equal(fused.isfinite(), explicit.isfinite())
    assert not fused.isfinite().all()


def test_no_fixture_holds_such_numbers():
    for directory in FIXTURES.iterdir():
        if (directory / "model.safetensors").exists():
            LoopedTransformer.from_pretrained_no_processing(directory)
