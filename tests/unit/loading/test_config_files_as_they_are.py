"""config.json with odd values: every refusal is a sentence with file, field and what was found."""

import json
import shutil
import time

import pytest
import torch

from tests.unit.loading.files_of import FIXTURES, written
from tl_loops import HookedTransformer, LoopedTransformer
from tl_loops.errors import CheckpointError, UnknownModelError
from tl_loops.loading.open import load_config, save_checkpoint
from tl_loops.loading.source import is_looped_name, resolve

ODD = [10**400, -1, -(10**400), float("inf"), float("nan"), "7", [], {}, [[1]], True, 10**18, 1.5]
SIZES = {
    "huginn": ["n_embd", "n_heads", "intermediate_size", "padded_vocab_size", "mean_recurrence"],
    "retrofitted_llama_llama3": ["n_embd", "n_heads", "num_key_value_heads", "head_dim"],
    "ouro": ["hidden_size", "num_attention_heads", "total_ut_steps", "num_hidden_layers"],
    "parcae": ["n_embd", "num_attention_heads", "mean_recurrence", "block_size"],
    "nanochat_recursive": ["n_embd", "n_head", "n_recur_block", "vocab_size"],
    "hrm_text": ["hidden_size", "num_attention_heads", "H_cycles", "L_cycles"],
}


def refusal(directory):
    started = time.monotonic()
    with pytest.raises(CheckpointError) as error:
        load_config(resolve(directory), device="cpu")
    assert time.monotonic() - started < 5
    message = str(error.value)
    assert "config.json" in message and len(message) < 3000
    for bare in ("Error:", "not supported between", "unhashable", "KeyError", "NoneType"):
        assert bare not in message
    return message


@pytest.mark.parametrize(("name", "key"), [(n, key) for n, keys in SIZES.items() for key in keys])
@pytest.mark.parametrize("value", [*ODD, 0], ids=lambda value: repr(value)[:10])
def test_sizes_that_are_none_are_refused_by_field(tmp_path, name, key, value):
    directory = written(tmp_path / "c", name, **{key: value})
    if type(value) is int and value > 2**31 and key == "num_hidden_layers":
        assert "num_hidden_layers" in refusal(directory)
    else:
        message = refusal(directory)
        # The config itself says so of no iterations, under its own name.
        assert f"'{key}'" in message or (value == 0 and "n_iterations must be at" in message)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_any_field_of_another_kind_loads_or_is_refused_in_a_sentence(tmp_path, name):
    released = json.loads((FIXTURES / name / "config.json").read_text())
    directory = written(tmp_path / "c", name)
    for key in released:
        for value in (10**400, [], {}, "x", 0, -1.5, float("nan"), ["a", [1]]):
            (directory / "config.json").write_text(json.dumps({**released, key: value}))
            try:
                load_config(resolve(directory), device="cpu")
            except CheckpointError:
                refusal(directory)


def test_more_layers_than_the_files_have_tensors_are_refused_at_once(tmp_path):
    directory = written(tmp_path / "c", "ouro", num_hidden_layers=2**31 - 1)
    assert "more layers than the files have tensors: n_prelude = 0" in refusal(directory)


def test_more_iterations_than_a_model_can_have_are_refused_at_once(tmp_path):
    directory = written(tmp_path / "c", "ouro", total_ut_steps=2**31 - 1)
    assert "asks for n_iterations = 2147483647" in refusal(directory)


@pytest.fixture
def native(tmp_path):
    cfg = load_config(resolve(FIXTURES / "ouro"), device="cpu")
    model = LoopedTransformer.from_pretrained_no_processing(FIXTURES / "ouro")
    save_checkpoint(tmp_path / "n", cfg, model.physical_state_dict())
    return tmp_path / "n"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", "48"),
        ("d_model", None),
        ("d_model", 10**400),
        ("n_core", 2.5),
        ("n_core", 10**18),
        ("n_iterations", True),
        ("n_iterations", 10**18),
        ("eps", "small"),
        ("eps", float("nan")),
        ("embed_scale", 10**400),
        ("exit_gate", "yes"),
        ("act_fn", 3),
        ("n_heads", {}),
    ],
)
def test_fields_of_the_own_format_have_types(native, field, value):
    path = native / "config.json"
    document = json.loads(path.read_text())
    document["config"][field] = value
    path.write_text(json.dumps(document))
    assert field in refusal(native)


BROKEN = {
    "cut": b'{"model_type": "ouro", ',
    "nested brackets": b'{"a": ' + b"[" * 100_000,
    "nested braces": b'{"a":' * 100_000,
    "half of a surrogate pair": b'{"model_type": "ouro", "x": "\\ud800"}',
    "a list": b"[]",
    "not UTF-8": b'{"model_type": "\xff"}',
    "UTF-16": '{"model_type": "ouro"}'.encode("utf-16"),
    "a key twice": b'{"model_type": "ouro", "model_type": "llama"}',
    "an endless number": b'{"model_type": "ouro", "a": ' + b"9" * 10_000 + b"}",
    "empty": b"",
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_registered_way_in_says_what_is_wrong_with_a_broken_config(tmp_path, what):
    directory = written(tmp_path / "c", "ouro")
    (directory / "config.json").write_bytes(BROKEN[what])
    assert not is_looped_name(directory)
    for load in (HookedTransformer.from_pretrained, LoopedTransformer.from_pretrained):
        with pytest.raises(CheckpointError, match=r"config\.json (cannot be read|must hold)"):
            load(str(directory))


def test_other_names_still_reach_transformer_lens(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nobody"}')
    for name in (str(tmp_path), "nobody/nothing"):
        with pytest.raises(Exception) as error:
            HookedTransformer.from_pretrained(name)
        assert not isinstance(error.value, (CheckpointError, UnknownModelError))


@pytest.mark.parametrize("name", [None, 5, ["ouro-1.4b"], b"ouro-1.4b"])
def test_what_is_no_name_is_refused_in_a_sentence(name):
    with pytest.raises(TypeError, match="expected the name of a model or the path of a directory"):
        resolve(name)


@pytest.mark.parametrize("name", ["huginn", "ouro"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_line_that_converts_pickles_works_also_with_tied_weights(
    tmp_path, monkeypatch, name, tied
):
    directory = written(tmp_path / "c", name)
    expected = LoopedTransformer.from_pretrained_no_processing(directory)
    tensors = torch_tensors(directory)
    if tied and name == "huginn":
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    elif tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (directory / "model.safetensors").unlink()
    keys = sorted(tensors)
    torch.save({key: tensors[key] for key in keys[:5]}, directory / "pytorch_model-1.bin")
    torch.save(
        {key: torch.nn.Parameter(tensors[key].T.contiguous().T) for key in keys[5:]},
        directory / "pytorch_model-2.bin",
    )
    torch.save({"step": 3}, directory / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"only as pytorch_model-1\.bin") as error:
        LoopedTransformer.from_pretrained_no_processing(directory)
    line = str(error.value).split("environment you trust: ")[1]
    monkeypatch.chdir(directory)
    exec(line, {})
    model = LoopedTransformer.from_pretrained_no_processing(directory)
    if not (tied and name == "ouro"):
        for key, tensor in expected.physical_state_dict().items():
            assert torch.equal(model.physical_state_dict()[key], tensor)


def torch_tensors(directory):
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_beside_the_weights_is_named(tmp_path, name):
    directory = written(tmp_path / "c", "ouro")
    if name.endswith(".json"):
        (directory / name).write_text('{"peft_type": "LORA"}')
    else:
        shutil.copy(directory / "model.safetensors", directory / name)
    with pytest.warns(UserWarning, match=f"holds {name} beside the weights.*without that adapter"):
        LoopedTransformer.from_pretrained_no_processing(directory)


def test_an_adapter_alone_is_no_model(tmp_path):
    directory = written(tmp_path / "c", "ouro")
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="is of an adapter: merge it"), pytest.warns():
        LoopedTransformer.from_pretrained_no_processing(directory)
