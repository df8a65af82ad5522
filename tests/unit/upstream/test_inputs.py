"""Text and tokens become ids and a mask that tells real tokens from padding."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.bridged.models import bridged
from tests.feedforward import only_from_4, plain_model
from tests.models import tiny_config, tiny_model
from tl_loops import LoopedTransformer, unroll
from tl_loops.upstream import get_attention_mask, number_of_ids
from tl_loops.upstream import model_input as model_input_of

TEXTS = ["a b", "c d e f a <eos> b"]
BOS, EOS = 0, 1


def model_input(*args: Any, **kwargs: Any) -> Any:
    """Untyped, so that a test can read a mask that may be None."""
    return model_input_of(*args, **kwargs)


def tokenizer(side="right", prepends=False, pad: str | None = "<eos>"):
    """Words that are letters; the padding token is also the end of a text."""
    words = {w: i for i, w in enumerate(["<bos>", "<eos>", "<unk>", *"abcdef"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if prepends:
        made.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token=pad,
        padding_side=side,
    )


def looped(side="right", prepends=False, n_ctx=16):
    config = tiny_config("layer_norm", n_ctx=n_ctx)
    return LoopedTransformer(config, tokenizer=tokenizer(side, prepends)).eval()


def plain():
    fields = dict(n_layers=1, d_model=8, n_heads=2, d_head=4, d_mlp=8, d_vocab=12, n_ctx=16)
    model = plain_model(**fields, act_fn="gelu", normalization_type="LN")
    return speaking(model)


def bridge():
    return speaking(bridged("ouro"))


def speaking(model):
    model.tokenizer = tokenizer()
    model.cfg.tokenizer_prepends_bos = False
    model.cfg.default_prepend_bos = True
    return model


KINDS = {
    "looped": looped,
    "plain": plain,
    "bridge": pytest.param(bridge, marks=only_from_4),
    "unrolled": pytest.param(lambda: speaking(unroll(bridge())), marks=only_from_4),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_texts_are_tokenised_as_by_the_model(make):
    model = make()
    found = model_input(model, TEXTS)
    assert torch.equal(found.tokens, model.to_tokens(TEXTS))
    assert found.mask is not None and found.mask.dtype == torch.bool
    assert found.mask.sum(-1).tolist() == [3, 8]
    assert found.mask[0].tolist() == [True] * 3 + [False] * 5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prepends", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_overrides_are_those_of_to_tokens(side, prepends, bos):
    model = looped(prepends=prepends)
    found = model_input(model, TEXTS, prepend_bos=bos, padding_side=side)
    expected = model.to_tokens(TEXTS, prepend_bos=bos, padding_side=side)
    assert torch.equal(found.tokens, expected)
    real = [[BOS] * bos + [3, 4], [BOS] * bos + [5, 6, 7, 8, 3, EOS, 4]]
    assert [row[kept].tolist() for row, kept in zip(found.tokens, found.mask, strict=True)] == real
    assert model.tokenizer.padding_side == "right"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", ["a b <eos>", "<eos> a b", "<eos>"])
def test_a_single_text_has_no_padding_though_it_holds_the_padding_token(side, text):
    model = looped(side)
    assert model_input(model, text).mask is None
    assert model_input(model, [text]).mask is None
    assert model_input(model, text, prepend_bos=False).mask is None


def test_a_tokenizer_without_padding_token_reads_a_single_text():
    model = looped()
    model.tokenizer = tokenizer(pad=None)
    assert model_input(model, "a b").tokens.tolist() == [[BOS, 3, 4]]


def test_leading_padding_of_tokens_is_found_as_transformer_lens_finds_it():
    tokens = torch.tensor([[EOS, EOS, BOS, 3], [BOS, 4, EOS, 5]])
    model = looped("left")
    expected = get_attention_mask(model.tokenizer, tokens, True).bool()
    assert torch.equal(model_input(model, tokens).mask, expected)
    assert expected.tolist() == [[False, False, True, True], [True] * 4]
    assert model_input(looped("right"), tokens).mask is None


def test_a_mask_that_is_given_is_taken():
    model, tokens = looped("left"), torch.tensor([[EOS, 3, 4], [5, 6, 7]])
    assert model_input(model, tokens, torch.ones(2, 3)).mask is None
    given = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.equal(model_input(model, tokens, given).mask, given.bool())
    assert model_input(model, tokens[0], given[0]).mask.tolist() == [[True, True, False]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_any_integers_are_tokens(dtype):
    found = model_input(tiny_model("layer_norm"), torch.tensor([3, 4], dtype=dtype))
    assert found.tokens.dtype == torch.int64 and found.tokens.tolist() == [[3, 4]]
    assert found.mask is None


def test_long_text_is_cut_only_when_asked():
    model = looped(n_ctx=4)
    assert model_input(model, "a b c d e", truncate=True).tokens.shape == (1, 4)
    for given in ("a b c d e", torch.tensor([3, 4, 5, 6, 7])):
        with pytest.raises(ValueError, match="do not fit the context of n_ctx=4 tokens"):
            model_input(model, given)


def test_ids_after_the_vocabulary():
    model = tiny_model("layer_norm")
    last = number_of_ids(model.cfg) - 1
    assert last == model.cfg.d_vocab - 1
    assert model_input(model, torch.tensor([0, last])).tokens.tolist() == [[0, last]]
    model.cfg.n_extra_tokens = 2
    assert number_of_ids(model.cfg) == last + 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(2, 3), "float32 tensor of shape"),
        (torch.ones(2, 3, dtype=torch.bool), "torch.bool tensor"),
        (torch.zeros(1, 2, 3, dtype=torch.int), r"\(1, 2, 3\)"),
        (torch.tensor(3), r"shape \(\)"),
        (torch.zeros(1, 0, dtype=torch.int), "empty"),
        ([], "empty"),
        (torch.tensor([[3, -1]]), "from -1 to 3"),
        (torch.tensor([[3, 10_000]]), "from 3 to 10000"),
        ([3, 4], "a list of int"),
        (None, "NoneType"),
        ("a", "no tokenizer"),
    ],
)
def test_what_cannot_be_fed_raises(given, message):
    with pytest.raises(ValueError, match=message):
        model_input(tiny_model("layer_norm"), given)


def test_no_text_and_no_bos_raises():
    with pytest.raises(ValueError, match="empty"):
        model_input(looped(), "", prepend_bos=False)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 3), r"\[1, 2\], got \[1, 3\]"),
        (torch.zeros(1, 2), "without a real token"),
    ],
)
def test_a_mask_that_does_not_fit_raises(mask, message):
    with pytest.raises(ValueError, match=message):
        model_input(tiny_model("layer_norm"), torch.tensor([[3, 4]]), mask)
