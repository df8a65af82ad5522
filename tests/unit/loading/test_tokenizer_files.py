"""Tokenizer files that are broken, or do not fit the model: found at loading."""

import json
import os
import warnings

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.unit.loading.files_of import written
from tl_loops import HookedTransformer, LoopedTransformer
from tl_loops.errors import CheckpointError

N_WORDS, D_VOCAB = 40, 96


def with_tokenizer(directory, name="ouro", words=None, **special):
    """A fixture with a tokenizer of 40 words."""
    words = words or {w: i for i, w in enumerate(["<bos>", "<eos>", "<unk>"])}
    words |= {f"w{i}": i for i in range(len(words), N_WORDS)}
    built = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>", **special}
    written(directory, name)
    PreTrainedTokenizerFast(tokenizer_object=built, **special).save_pretrained(directory)
    return directory


def change(directory, file, **fields):
    path = directory / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_words(directory, words):
    path = directory / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"] |= words
    path.write_text(json.dumps(document))


def refusal(directory):
    with pytest.raises(CheckpointError) as error:
        HookedTransformer.from_pretrained(str(directory))
    message = str(error.value)
    assert str(directory) in message and len(message) < 800
    return message


def said(directory):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model = LoopedTransformer.from_pretrained_no_processing(directory)
    return model, " ".join(str(w.message) for w in found if "okenizer" in str(w.message))


def test_a_tokenizer_that_fits_loads_without_a_word(tmp_path):
    model, warned = said(with_tokenizer(tmp_path / "c"))
    assert model.to_tokens("w5 w7").tolist() == [[0, 5, 7]] and not warned


@pytest.mark.parametrize("kind", ["bos", "eos", "pad"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_special_tokens_outside_the_vocabulary_are_named(tmp_path, kind, file):
    directory = with_tokenizer(tmp_path / "c")
    if file == "special_tokens_map.json":
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        settings.pop(f"{kind}_token", None)
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        (directory / file).write_text("{}")
    change(directory, file, **{f"{kind}_token": "<nowhere>"})
    if kind == "bos":
        assert "bos_token '<nowhere>', which the model does not know" in refusal(directory)
    else:
        assert f"{kind}_token '<nowhere>', which the model does not know" in said(directory)[1]


def test_special_tokens_beyond_the_embedding_are_named(tmp_path):
    directory = with_tokenizer(tmp_path / "c")
    change_words(directory, {"<far>": D_VOCAB + 3})
    change(directory, "tokenizer_config.json", bos_token="<far>")
    assert f"bos_token '<far>', which the model does not know (id {D_VOCAB + 3}" in (
        refusal(directory)
    )


def test_words_beyond_the_embedding_are_named(tmp_path):
    directory = with_tokenizer(tmp_path / "c")
    change_words(directory, {f"far{i}": D_VOCAB + i for i in range(5)})
    model, warned = said(directory)
    assert "has words beyond the 96 tokens of the model" in warned
    assert "'far0' (id 96)" in warned and "and 2 more" in warned
    assert model.to_tokens("w5").tolist() == [[0, 5]]


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer_class": "NobodysTokenizer"},
        {"tokenizer_class": 5},
        {"tokenizer_class": ["PreTrainedTokenizerFast"]},
        {"tokenizer_class": "PreTrainedTokenizer"},
        {"tokenizer_class": "LlamaTokenizer", "bos_token": 3},
        {"tokenizer_class": ""},
        {"bos_token": 7},
        {"bos_token": ["<bos>"]},
        {"eos_token": {"content": 5}},
        {"added_tokens_decoder": {"x": "y"}},
        {"added_tokens_decoder": 5},
        {"model_max_length": "long"},
        {"model_max_length": -1},
        {"model_max_length": []},
        {"padding_side": "up"},
        {"padding_side": 3},
        {"truncation_side": "up"},
        {"model_input_names": 5},
        {"extra_special_tokens": 5},
        {"clean_up_tokenization_spaces": "perhaps"},
        {"chat_template": 5},
    ],
    ids=repr,
)
def test_odd_fields_are_refused_or_do_no_harm(tmp_path, fields):
    directory = with_tokenizer(tmp_path / "c")
    change(directory, "tokenizer_config.json", **fields)
    try:
        model, _ = said(directory)
    except CheckpointError:
        refusal(directory)
    else:
        assert model.to_tokens("w5 w7")[0, -2:].tolist() == [5, 7]
        assert model.to_str_tokens("w5 w7")[-1] == "w7"
        assert model.to_tokens(["w5", "w7 w8"]).shape[0] == 2


@pytest.mark.parametrize(
    "field",
    [
        "model",
        "added_tokens",
        "normalizer",
        "pre_tokenizer",
        "post_processor",
        "decoder",
        "version",
    ],
)
@pytest.mark.parametrize("value", [5, [], {}, "x", [{"id": -1}], {"type": "Nobody"}], ids=repr)
def test_odd_parts_of_a_tokenizer_are_refused_or_do_no_harm(tmp_path, field, value):
    directory = with_tokenizer(tmp_path / "c")
    change(directory, "tokenizer.json", **{field: value})
    try:
        model, _ = said(directory)
    except CheckpointError:
        refusal(directory)
    else:
        assert model.to_tokens("w5").shape[0] == 1


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
@pytest.mark.parametrize("kind", ["a pipe", "a directory", "cut", "nested", "empty"])
def test_broken_tokenizer_files_are_refused(tmp_path, name, kind):
    directory = with_tokenizer(tmp_path / "c")
    content = (directory / name).read_bytes() if (directory / name).exists() else b'{"a": 3}'
    (directory / name).unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(directory / name)
    elif kind == "a directory":
        (directory / name).mkdir()
    else:
        cut = content[: len(content) // 2]
        nested = b'{"a": ' + b"[" * 100_000
        (directory / name).write_bytes({"cut": cut, "nested": nested, "empty": b""}[kind])
    if kind in ("a directory", "a pipe") and name == "tokenizer.json":
        assert "is no file" in refusal(directory)
    elif name != "added_tokens.json" or kind == "a pipe":
        refusal(directory)
