"""Slices: the entries that Python and numpy would take, or an error that names the argument."""

import numpy as np
import pytest
import torch

from tests.models import tiny_model, tiny_tokens
from tl_loops.upstream import Slice, as_slice

X = torch.arange(10)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, X),
        (3, X[3]),
        (np.int64(-1), X[-1]),
        (torch.tensor(4), X[4]),
        ((4,), X[:4]),
        ((2, 5), X[2:5]),
        ((1, None, 3), X[1::3]),
        (slice(2, np.int64(99)), X[2:]),
        ([1, 4], X[[1, 4]]),
        (range(2), X[:2]),
        (np.array([-1, 0]), X[[-1, 0]]),
        (torch.tensor([3, 3]), X[[3, 3]]),
        ([], X[:0]),
        (Slice([1, 4]), X[[1, 4]]),
        (Slice(5), X[5]),
    ],
)
def test_entries(given, expected):
    cut = as_slice("pos_slice", given)
    assert torch.equal(cut.apply(X), expected)
    assert np.array_equal(np.atleast_1d(cut.indices(10)) % 10, np.atleast_1d(expected))


def test_an_index_may_keep_its_axis():
    assert torch.equal(as_slice("pos_slice", np.int64(3), keep_axis=True).apply(X), X[3:4])


@pytest.mark.parametrize(
    "given", [1.0, "1", True, [1.0], [True], [None], [[1]], [[1], [1, 2]], (1, 2, 3, 4), ("a",)]
)
def test_what_is_no_slice_is_named(given):
    with pytest.raises(ValueError, match="pos_slice must be an index, a list"):
        as_slice("pos_slice", given)


@pytest.mark.parametrize("given", [10, -11, [0, 10], np.array([-11]), 10**30])
def test_indices_that_an_axis_does_not_have_are_named(given):
    with pytest.raises(IndexError, match="pos_slice asks for index"):
        as_slice("pos_slice", given).apply(X)


def test_a_run_keeps_the_positions_that_are_asked_for():
    model, tokens = tiny_model("ouro"), tiny_tokens()
    whole = model.run_with_cache(tokens)[1]["resid_pre", 0]
    for given, expected in (([1, 0], whole[:, [1, 0]]), (np.int64(1), whole[:, 1:2])):
        kept = model.run_with_cache(tokens, pos_slice=given)[1]["resid_pre", 0]
        assert torch.equal(kept, expected)
    with pytest.raises(IndexError, match="pos_slice asks for index 99, but the axis has"):
        model.run_with_cache(tokens, pos_slice=99)
