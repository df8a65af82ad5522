import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import tiny_model
from tests.unit.upstream.test_inputs import BOS, EOS, looped
from tl_loops.runs.batches import batches, check_batch_size, longest_first, token_prompts

FAST = settings(deadline=None, max_examples=25)


@pytest.fixture(scope="module")
def model():
    return tiny_model("retrofitted")


def test_tokens_are_taken_as_they_are(model):
    given = [torch.tensor([3, 1, 4]), torch.tensor([1], dtype=torch.int32)]
    tokens = token_prompts(model, given)
    assert [t.tolist() for t in tokens] == [[3, 1, 4], [1]]
    assert all(t.dtype == torch.int64 for t in tokens)
    assert [t.tolist() for t in token_prompts(model, iter(given))] == [[3, 1, 4], [1]]
    for listed in ([3, 1, 4], (3, 1, 4), np.array([3, 1, 4])):
        tokens = token_prompts(model, [listed, [1]])
        assert [t.tolist() for t in tokens] == [[3, 1, 4], [1]] and tokens[0].dtype == torch.int64


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_is_tokenised_alone_and_never_cut(side):
    model = looped(side, n_ctx=64)
    found = [t.tolist() for t in token_prompts(model, ["a b", "c", "a <eos>"])]
    assert found == [[BOS, 3, 4], [BOS, 5], [BOS, 3, EOS]]
    with pytest.raises(ValueError, match=r"prompt 1: 66 tokens do not fit.*n_ctx=64"):
        token_prompts(model, ["a", "b " * 65])
    with pytest.raises(ValueError, match=r"prompt 0 has 1 token.*at least 2: ''"):
        token_prompts(model, [""], at_least=2)


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ("one string", TypeError, "one string: pass a list"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, r"shape \[2, 3\]: pass a list"),
        ([], ValueError, "empty"),
        (["text"], ValueError, "no tokenizer"),
        (["text", torch.tensor([1])], TypeError, "mixes"),
        ([torch.tensor([1]), {1: 2}], TypeError, "prompt 1 is a dict"),
        ([[1, 2], [1, [2]]], ValueError, r"prompt 1 is \[1, \[2\]\], expected a flat list"),
        ([[1, 2], [1, "a"]], ValueError, "prompt 1 is .*expected a flat list"),
        ([[1, 2], [1.5, 2]], ValueError, "prompt 1: .*got a torch.float32"),
        ([[1, 2], []], ValueError, "prompt 1: .*empty"),
        ([["a b"], [1]], ValueError, "prompt 0 is .*expected a flat list"),
        ([torch.tensor([[1, 2]])], ValueError, r"prompt 0 has shape \[1, 2\]"),
        ([torch.tensor([1.0])], ValueError, "prompt 0: .*got a torch.float32"),
        ([torch.tensor([1]), torch.tensor([], dtype=torch.int64)], ValueError, "prompt 1: .*empty"),
        (
            [torch.tensor([1, 50])],
            ValueError,
            "prompt 0: .*from 1 to 50, but the model embeds 0 to 49",
        ),
        ([torch.tensor([-1])], ValueError, "ids from -1"),
        ([torch.zeros(65, dtype=torch.int64)], ValueError, "n_ctx=64"),
    ],
)
def test_bad_prompts_are_refused(model, prompts, error, message):
    with pytest.raises(error, match=message):
        token_prompts(model, prompts)


@FAST
@given(st.lists(st.integers(1, 6), min_size=1, max_size=30), st.integers(1, 5))
def test_batches_hold_each_prompt_once_at_one_length(lengths, batch_size):
    order = longest_first(lengths, lengths)
    cut = list(batches(order, lengths.__getitem__, batch_size))
    assert [i for batch in cut for i in batch] == order
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    for batch in cut:
        assert 1 <= len(batch) <= batch_size and len({lengths[i] for i in batch}) == 1
        assert batch == sorted(batch)


def test_equal_lengths_with_other_keys_do_not_share_a_batch():
    keys = [(4, 1), (4, 2), (4, 1), (3, 1)]
    order = longest_first(keys, [4, 4, 4, 3])
    assert list(batches(order, keys.__getitem__, 8)) == [[0, 2], [1], [3]]


def test_a_batch_holds_a_prompt():
    check_batch_size(1)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        check_batch_size(0)
