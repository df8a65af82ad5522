"""Comparison of tensors, relative to the size of what is compared.

Two processors round differently, and the difference grows with the numbers that were added up: an
absolute tolerance that holds on one fails on the next.
"""

from typing import Any

import torch
from torch import Tensor

DEFAULT = {torch.float64: (1e-7, 1e-7), torch.float32: (1.3e-6, 1e-5)}
"""``rtol`` and ``atol`` that torch.testing takes where none is given."""


def assert_close(
    found: Any,
    expected: Any,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    size: float | None = None,
    **options: Any,
) -> None:
    """As ``torch.testing.assert_close``, but ``atol`` counts in sizes of what is compared.

    Args:
        found: Tensor, or what torch.testing takes.
        expected: The same.
        rtol: Of each element.
        atol: Of ``size``. Without ``rtol`` and ``atol``, torch.testing's numbers for the type.
        size: The largest finite magnitude of ``expected``, unless given: where a difference of
            large numbers is compared, their magnitude.
        options: Of torch.testing.
    """
    if isinstance(expected, Tensor) and expected.is_floating_point():
        if rtol is None and atol is None:
            rtol, atol = DEFAULT.get(expected.dtype, (None, None))
        if atol is not None:
            finite = expected.detach()[expected.isfinite()].abs()
            atol *= size if size is not None else float(finite.max()) if finite.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, **options)
