"""Keys as released files hold them: older names, wrappers, and tables that the original uses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.equations import write
from tl_loops import CheckpointError, LoopedTransformer
from tl_loops.families.registry import FAMILIES
from tl_loops.loading.json_file import read_json

FIXTURES = Path(__file__).parents[2] / "parity" / "fixtures"


def loaded(tmp_path: Path, name: str, tensors: dict[str, torch.Tensor]) -> LoopedTransformer:
    tmp_path.mkdir(exist_ok=True)
    write(tmp_path, read_json(FIXTURES / name / "config.json"), tensors)
    return LoopedTransformer.from_pretrained_no_processing(tmp_path, device="cpu")


def rotary_table(base: float, pairs: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    angles = torch.outer(torch.arange(64.0), base ** -(torch.arange(float(pairs)) / pairs))
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[None, :, None].to(dtype)


@pytest.mark.parametrize("name", ["huginn", "parcae"])
def test_a_stored_rotary_table_is_what_the_model_rotates_by(tmp_path, name):
    tensors = load_file(FIXTURES / name / "model.safetensors")
    with pytest.warns(UserWarning):
        plain = LoopedTransformer.from_pretrained_no_processing(FIXTURES / name, device="cpu")
    pairs = plain.cfg.d_head // 2
    with pytest.warns(UserWarning) as warned:
        same = loaded(tmp_path / "same", name, {**tensors, "freqs_cis": rotary_table(5e4, pairs)})
    assert not [w for w in warned if "freqs_cis" in str(w.message)]
    assert same.cfg.to_dict() == {**plain.cfg.to_dict(), "model_name": "same"}
    with pytest.warns(UserWarning, match="'freqs_cis' is of base 1234, where config.json says"):
        other = loaded(tmp_path / "o", name, {**tensors, "freqs_cis": rotary_table(1234.0, pairs)})
    assert other.cfg.rotary_base == 1234.0
    with pytest.warns(UserWarning):
        table = rotary_table(5e4, pairs, torch.bfloat16)
        rounded = loaded(tmp_path / "r", name, {**tensors, "freqs_cis": table})
    assert rounded.cfg.rotary_table_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.zeros(1, 64, 1, 8, 2), "'freqs_cis' is what the original rotates by"),
        (rotary_table(5e4, 8).nan_to_num() * 2, "'freqs_cis' is what the original rotates by"),
        (torch.zeros(64, 8), r"'freqs_cis' has shape \(64, 8\)"),
        (torch.zeros(1, 64, 1, 8, 2, dtype=torch.int32), "'freqs_cis' is stored as I32"),
    ],
)
def test_a_stored_rotary_table_that_no_base_gives_is_refused(tmp_path, table, message):
    tensors = {**load_file(FIXTURES / "huginn" / "model.safetensors"), "freqs_cis": table}
    with pytest.raises(CheckpointError, match=message):
        loaded(tmp_path, "huginn", tensors)


def test_two_spellings_of_one_tensor_are_refused(tmp_path):
    tensors = load_file(FIXTURES / "wild" / "loopformer_prefix_gpt" / "model.safetensors")
    key = "transformer.norm_f.weight"
    tensors[key] = tensors[f"gpt.{key}"] + 1
    with pytest.raises(CheckpointError, match=f"'gpt.{key}' and '{key}' mean the same tensor"):
        loaded(tmp_path, "wild/loopformer_prefix_gpt", tensors)


def test_every_other_spelling_leads_to_a_key_of_the_family():
    spellings = {family.name: family.spellings for family in FAMILIES if family.spellings}
    assert spellings.keys() == {
        "loopformer", "loopformer-base", "loopus", "hrm", "trm", "gpt2", "ifm-loopedlm", "tmlt",
    }  # fmt: skip
    for family in FAMILIES:
        for found, expected in family.spellings:
            assert family.spelled(f"{found}x") == f"{expected}x"
