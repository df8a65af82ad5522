"""Text comes with the tokenizer's own mask, and the mask reaches the loss and later tokens."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.closeness import assert_close
from tests.models import tiny_config
from tl_loops import LoopedTransformer
from tl_loops.lens import coda_lens

CLOSE = dict(rtol=1e-4, atol=1e-5)


def speaking(side, bos="<bos>"):
    """A model whose padding token is the end of a text, as TransformerLens sets it."""
    words = {w: i for i, w in enumerate(["<bos>", "<eos>", "<unk>", *"abcdefghij"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="<eos>", unk_token="<unk>"
    )
    fast.pad_token = "<eos>"
    cfg = tiny_config("layer_norm")
    return LoopedTransformer(cfg, tokenizer=fast, default_padding_side=side).eval()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bos", ["<bos>", "<eos>"])
@pytest.mark.parametrize("text", ["a b <eos>", ""])
def test_padding_is_not_guessed_from_ids(side, bos, text):
    model = speaking(side, bos)
    tokens = model.to_tokens(text)
    if text or bos == "<eos>":
        assert int(tokens[0, -1]) == model.tokenizer.pad_token_id
    whole = torch.ones_like(tokens)
    assert torch.equal(model(text), model(tokens, attention_mask=whole))
    lens = coda_lens(model, text, keep_logits=True)
    assert_close(lens.logits[-1], model(tokens, attention_mask=whole), **CLOSE)
    by_hand = tokens
    for _ in range(4):
        logits = model(by_hand, attention_mask=torch.ones_like(by_hand))
        by_hand = torch.cat([by_hand, logits[:, -1].argmax(-1, keepdim=True)], 1)
    flags = dict(do_sample=False, verbose=False, stop_at_eos=False, return_type="tokens")
    assert torch.equal(model.generate(text, 4, **flags), by_hand)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_padded_texts_is_over_real_tokens(side):
    model, texts = speaking(side), ["a b", "c d e f g h"]
    alone = [model(text, return_type="loss", loss_per_token=True).flatten() for text in texts]
    assert_close(model(texts, return_type="loss"), torch.cat(alone).mean(), **CLOSE)


def test_right_padding_in_a_key_value_cache_stays_masked():
    model, texts = speaking("right"), ["a b", "c d e f g h"]
    later = model.to_tokens("i j", prepend_bos=False).expand(2, -1)
    past = model.make_kv_cache(2)
    model(texts, past_kv_cache=past)
    after = model(later, past_kv_cache=past)
    for row, text in enumerate(texts):
        whole = torch.cat([model.to_tokens(text), later[row : row + 1]], 1)
        assert_close(after[row], model(whole)[0, -2:], **CLOSE)


def test_a_batch_of_left_padded_tokens_goes_on_as_each_prompt_alone():
    model = speaking("left")
    alone = [model.to_tokens(text) for text in ("a b", "c d e f")]
    pads = torch.full((1, 2), model.tokenizer.pad_token_id)
    batch = torch.cat([torch.cat([pads, alone[0]], 1), alone[1]])
    flags = dict(do_sample=False, verbose=False, stop_at_eos=False, return_type="tokens")
    for use_past_kv_cache in (True, False):
        flags["use_past_kv_cache"] = use_past_kv_cache
        found = model.generate(batch, 4, **flags)
        for row, tokens in enumerate(alone):
            assert torch.equal(found[row, -4:], model.generate(tokens, 4, **flags)[0, -4:])
    unmasked = model.generate(batch, 4, attention_mask=torch.ones_like(batch), **flags)
    assert not torch.equal(unmasked[0, -4:], found[0, -4:])
