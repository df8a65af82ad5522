"""Spans of real tokens: what a mask may look like and what slicing to it gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.padding import expand_mask, map_spans, statistic_dtype, valid_spans

torch.set_num_threads(1)


def mask_of(spans, n_pos):
    mask = torch.zeros(len(spans), n_pos, dtype=torch.bool)
    for row, (start, stop) in enumerate(spans):
        mask[row, start:stop] = True
    return mask


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 6)).map(lambda x: (x[0], x[0] + x[1])),
        min_size=1,
        max_size=5,
    )
)
def test_valid_spans_inverts_the_mask(spans):
    assert valid_spans(mask_of(spans, n_pos=12)) == spans


def test_valid_spans_refuses_holes_and_empty_rows():
    with pytest.raises(ValueError, match=r"row 1 has 2 separate runs"):
        valid_spans(torch.tensor([[True, True, True], [True, False, True]]))
    with pytest.raises(ValueError, match=r"row 0 has no real token"):
        valid_spans(torch.tensor([[False, False], [True, True]]))


def test_expand_mask_refuses_other_dtypes_and_shapes():
    with pytest.raises(TypeError, match=r"int64.*mask\.bool\(\)"):
        expand_mask(torch.ones(2, 3, dtype=torch.long), torch.Size([2]), 3)
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[5, 3\]"):
        expand_mask(torch.ones(2, 3, dtype=torch.bool), torch.Size([5]), 3)


def test_statistic_dtype():
    assert statistic_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert statistic_dtype(torch.zeros(1, dtype=dtype)) == torch.float32
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(TypeError, match="floating point"):
            statistic_dtype(torch.zeros(1, dtype=dtype))


def test_map_spans_equals_row_by_row_and_keeps_the_order():
    values = torch.arange(2 * 4 * 6.0).reshape(2, 4, 6, 1)
    spans = [(2, 6), (0, 3), (2, 6), (5, 6)]
    result = map_spans(lambda x: x.sum((-2, -1)), [values], mask_of(spans, 6), 2, (-2,))
    assert result.shape == (2, 4)
    for outer in range(2):
        for row, (start, stop) in enumerate(spans):
            assert result[outer, row] == values[outer, row, start:stop].sum()


def test_map_spans_computes_rows_with_one_span_together():
    calls = []

    def count(x):
        calls.append(x.shape)
        return x.sum((-2, -1))

    map_spans(count, [torch.ones(4, 5, 1)], mask_of([(0, 3), (1, 5), (0, 3), (0, 3)], 5), 2, (-2,))
    assert sorted(calls) == [(1, 4, 1), (3, 3, 1)]


def test_map_spans_gradient_is_zero_on_padding_even_where_it_is_nan():
    values = torch.ones(2, 4, 1)
    values[0, 2:] = float("nan")
    values.requires_grad_()
    map_spans(
        lambda x: x.sum((-2, -1)), [values], mask_of([(0, 2), (0, 4)], 4), 2, (-2,)
    ).sum().backward()
    assert values.grad[..., 0].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_map_spans_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="no row"):
        map_spans(
            lambda x: x.sum((-2, -1)),
            [torch.ones(0, 4, 1)],
            torch.ones(0, 4, dtype=torch.bool),
            2,
            (-2,),
        )
