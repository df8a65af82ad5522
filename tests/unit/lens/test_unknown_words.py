"""Text that stands for a token must be in the vocabulary."""

import pytest

from tests.models import tiny_config
from tests.unit.upstream.test_inputs import tokenizer
from tl_loops import LoopedTransformer, exit_curve
from tl_loops.lens import coda_lens


@pytest.fixture(scope="module")
def model():
    return LoopedTransformer(tiny_config("ouro"), tokenizer=tokenizer()).eval()


@pytest.mark.parametrize("word", ["Frederick", ["Frederick"], [["a", "Frederick"]]])
def test_an_unknown_word_cannot_be_tracked(model, word):
    with pytest.raises(ValueError, match=r"'Frederick', which the vocabulary .* does not have"):
        coda_lens(model, "a b", track={"name": word})


def test_the_token_of_unknown_words_can_be_asked_for(model):
    coda_lens(model, "a b", track={"name": "<unk>", "known": "c"})


def test_an_unknown_word_is_no_answer(model):
    with pytest.raises(ValueError, match="answer 0 is the text 'a Frederick'"):
        exit_curve(model, ["a b"], answers=["a Frederick"])
