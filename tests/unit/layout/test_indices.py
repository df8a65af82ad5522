"""Which values are indices. Not among the inner tests, whose checks of types would speak first."""

import numpy as np
import pytest
import torch

from tl_loops import LoopLayout

HUGINN = LoopLayout(n_prelude=2, n_core=4, n_coda=2, n_iterations=8)


@pytest.mark.parametrize("bad", [1.5, True, "1", np.float64(1), np.bool_(True), torch.tensor(1.0)])
def test_an_index_is_a_whole_number_of_any_integer_type(bad):
    for name in ("iteration", "layer"):
        with pytest.raises(TypeError, match=f"{name}.* must be an integer, got"):
            HUGINN.index(**{**dict(iteration=3, layer=0), name: bad})
    for three in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert HUGINN.index(iteration=three, layer=three) == HUGINN.index(iteration=3, layer=3)
