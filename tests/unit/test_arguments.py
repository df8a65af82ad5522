"""Arguments are read by their annotations, and written out only where they are wrong."""

import pytest

from tl_loops.arguments import argument, as_index, is_index
from tl_loops.errors import ArgumentError


class Large:
    """As a tensor on a GPU: to write it out takes long."""

    n_written = 0

    def __repr__(self):
        self.n_written += 1
        return "Large()"


def test_what_is_taken_is_not_written_out():
    value = Large()
    assert argument("x", value, int | Large) is value
    assert not is_index(value)
    assert value.n_written == 0


def test_what_is_not_taken_is_written_out_once():
    value = Large()
    with pytest.raises(ArgumentError, match=r"^x must be an integer, got Large\(\)$"):
        argument("x", value, int)
    with pytest.raises(TypeError, match=r"^the row must be an integer, got Large\(\)$"):
        as_index("the row", value)
    assert value.n_written == 2
