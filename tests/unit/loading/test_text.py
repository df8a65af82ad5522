"""The looped language model that ships with the package does what its card says."""

from pathlib import Path

import pytest
import torch

import tl_loops
from tl_loops import LoopedTransformer
from tl_loops.training import evaluate, token_losses

DIRECTORY = Path(tl_loops.__file__).parent / "text"
VERSES = [
    "And the LORD said unto him, Go up to the city, and speak unto the people of the land.",
    "Then came the servants of the king, and told him all these words.",
]


@pytest.fixture(scope="module")
def model() -> LoopedTransformer:
    return LoopedTransformer.from_pretrained_no_processing("tl-loops-text", device="cpu")


def loss(model, text, n_iterations):
    tokens = model.to_tokens(text)
    with torch.no_grad():
        return float(token_losses(model(tokens, n_iterations=n_iterations), tokens).mean())


def test_it_is_what_its_card_says(model):
    card = (DIRECTORY / "README.md").read_text("utf-8")
    assert model.cfg.notation == "(2, 4⊗4, 2)_I" and model.cfg.notation in card
    assert model.cfg.n_params == 1_003_104 and "1,003,104" in card
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir()) <= 6_000_000
    assert model.cfg.dtype == torch.float32
    tokens = model.to_tokens("the")
    assert tokens[0, 0] == model.tokenizer.bos_token_id == 0


def test_it_has_learned_the_order_of_words(model):
    """Far below an even guess, and below the same words in another order."""
    for verse in VERSES:
        found = loss(model, verse, 4)
        assert found < 4.5 < 6.93
        backwards = " ".join(reversed(verse.split()))
        assert found + 0.5 < loss(model, backwards, 4)


def test_more_iterations_hold_the_loss(model):
    tokens = torch.cat([model.to_tokens(verse, prepend_bos=False)[0] for verse in VERSES])
    losses = evaluate(model, tokens, tokens.shape[0], (1, 4, 16), first_token=0)
    assert losses[4] < losses[1] + 0.05
    assert losses[16] == pytest.approx(losses[4], abs=0.02)


def test_text_comes_back_from_its_tokens(model):
    for verse in VERSES:
        ids = model.to_tokens(verse, prepend_bos=False)[0]
        assert model.to_string(ids) == verse
