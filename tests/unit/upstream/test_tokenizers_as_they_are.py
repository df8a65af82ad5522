"""Tokenizers with whatever special tokens they have: a text works, and none is made up."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.models import tiny_model
from tl_loops import LoopedTransformer
from tl_loops.lens import coda_lens

WORDS = [f"w{i}" for i in range(1, 40)]
KINDS: dict[str, dict[str, str]] = {
    "bos alone": dict(bos_token="<bos>"),
    "eos alone": dict(eos_token="<eos>"),
    "no special tokens": {},
    "pad is eos": dict(bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"),
    "all": dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"),
    "bos is eos": dict(bos_token="<eos>", eos_token="<eos>"),
}
EVERY = pytest.mark.parametrize("kind", KINDS)
BOTH = pytest.mark.parametrize("side", ["right", "left"])


def tokenizer(kind: str, prepends: bool = False, appends: bool = False):
    special = sorted(set(KINDS[kind].values()))
    vocabulary = {word: i for i, word in enumerate(["<unk>", *WORDS, *special])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if prepends or appends:
        template = " ".join([*["<bos>"] * prepends, "$A", *["<eos>"] * appends])
        ids = [(token, vocabulary[token]) for token in special]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **KINDS[kind])


def model_with(given, **changes) -> LoopedTransformer:
    model = tiny_model("ouro", **changes)
    model.set_tokenizer(given)
    return model


def ids(given, text: str) -> list[int]:
    return [given.get_vocab()[word] for word in text.split()]


@EVERY
@BOTH
def test_a_text_works_and_no_token_is_invented_into_it(kind, side):
    given = tokenizer(kind)
    vocabulary = dict(given.get_vocab())
    model = model_with(given, default_prepend_bos=True)
    first = KINDS[kind].get("bos_token", KINDS[kind].get("eos_token"))
    expected = [*([vocabulary[first]] if first is not None else []), *ids(given, "w1 w2 w3")]
    assert model.to_tokens("w1 w2 w3").tolist() == [expected]
    assert model.to_tokens("w1 w2 w3", prepend_bos=False).tolist() == [expected[-3:]]
    assert model.tokenizer.get_vocab() == vocabulary
    logits = model("w1 w2 w3")
    assert torch.equal(logits, model(torch.tensor([expected])))
    both = model(["w1 w2 w3", "w4"], padding_side=side)
    place = slice(None, len(expected)) if side == "right" else slice(-len(expected), None)
    assert torch.allclose(both[:1, place], logits, atol=1e-5)
    short = model("w4")
    place = slice(None, short.shape[1]) if side == "right" else slice(-short.shape[1], None)
    assert torch.allclose(both[1:, place], short, atol=1e-5)
    assert model.to_tokens(["w1 w2 w3", "w4"]).shape == (2, len(expected))
    read = coda_lens(model, "w1 w2 w3", keep_logits=True)
    assert torch.allclose(read.logits[-1], logits, atol=1e-5)
    assert model.to_string(model.to_tokens("w1 w2", prepend_bos=False)[0]) == "w1 w2"
    assert model.to_str_tokens("w1 w2", prepend_bos=False) == ["w1", "w2"]
    assert model.to_single_token("w7") == 7
    if first is None:
        assert model.tokenizer.eos_token is None and model.tokenizer.pad_token is None


@EVERY
def test_saving_leaves_the_tokenizer_as_it_was(kind, tmp_path):
    given = tokenizer(kind)
    given.save_pretrained(tmp_path / "before")
    model = model_with(given)
    model.save_pretrained(tmp_path / "once")
    loaded = LoopedTransformer.from_pretrained_no_processing(tmp_path / "once", device="cpu")
    assert torch.equal(loaded("w1 w2 w3"), model("w1 w2 w3"))
    loaded.save_pretrained(tmp_path / "twice")
    before = PreTrainedTokenizerFast.from_pretrained(tmp_path / "before")
    for saved in ("once", "twice"):
        after = PreTrainedTokenizerFast.from_pretrained(tmp_path / saved)
        assert after.special_tokens_map == before.special_tokens_map
        assert after.encode("w1 w2") == before.encode("w1 w2")
        contents = [
            json.loads((tmp_path / at / "tokenizer.json").read_text()) for at in ("before", saved)
        ]
        assert contents[0] == contents[1]


def test_added_vocabulary_is_saved(tmp_path):
    model = model_with(tokenizer("all"))
    model.tokenizer.add_tokens(["more"])
    model.save_pretrained(tmp_path)
    assert "more" in PreTrainedTokenizerFast.from_pretrained(tmp_path).get_vocab()


@pytest.mark.parametrize("prepends", [False, True])
def test_bos_is_removed_only_where_the_tokenizer_put_it(prepends):
    given = tokenizer("all", prepends=prepends, appends=True)
    model = model_with(given)
    bos, eos = given.bos_token_id, given.eos_token_id
    assert model.cfg.tokenizer_prepends_bos is prepends
    assert model.to_tokens("w1 w2").tolist() == [[bos, *ids(given, "w1 w2"), eos]]
    without = [*ids(given, "w1 w2"), eos]
    assert model.to_tokens("w1 w2", prepend_bos=False).tolist() == [without]
    assert torch.equal(model("w1 w2", prepend_bos=False), model(torch.tensor([without])))
