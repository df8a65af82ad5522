"""Odd arguments give the right number, NaN, or one clear error of ours."""

import inspect
import linecache
import os
import traceback
from pathlib import Path

import pytest
import torch

import tl_loops
from tests.fuzz.arguments import CALLS, ODD, call
from tl_loops import metrics

ROOT = str(Path(tl_loops.__file__).parent)


def raised_here(error: Exception) -> bool:
    """Whether an error is stated by tl_loops (or its type checks), not met on the way."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    ours = frame.filename.startswith(ROOT) and line.startswith("raise")
    return ours or type(error).__name__ == "TypeCheckError"


def result_of(name, arguments):
    """The tensors, or ``None`` for a clear error."""
    try:
        return call(name, arguments)
    except Exception as error:
        assert isinstance(error, (ValueError, TypeError, IndexError)), repr(error)
        assert raised_here(error), traceback.format_exc()
        return None


EVERY = [(name, oddity) for name in CALLS for oddity in ODD]
SAMPLE = EVERY if "FUZZ_EXAMPLES" in os.environ else EVERY[::5]
"""All of them by ``make fuzz``, otherwise every fifth: 5 and the number of ways share no factor."""


@pytest.mark.parametrize(("name", "oddity"), SAMPLE)
def test_a_metric(name, oddity):
    arguments = {
        key: ODD[oddity](value) if isinstance(value, torch.Tensor) and value.ndim > 1 else value
        for key, value in CALLS[name].items()
    }
    found = result_of(name, arguments)
    if oddity in ("integers", "booleans", "complex"):
        assert found is None
        return
    if found is None:
        return
    if oddity == "inf" and "gate_logits" in arguments:
        return  # A probability of 1.
    if oddity in ("NaN", "inf"):
        assert any(bool((~x.isfinite()).any()) for x in found if x.is_floating_point())
        return
    exact = {
        key: value.double().contiguous() if isinstance(value, torch.Tensor) else value
        for key, value in arguments.items()
    }
    if "validate" in inspect.signature(getattr(metrics, name)).parameters:
        exact["validate"] = False  # Rounded rows sum to 1 within their own dtype only.
    expected = result_of(name, exact)
    assert expected is not None
    for ours, right in zip(found, expected, strict=True):
        if not right.is_floating_point():
            assert torch.equal(ours, right)
            continue
        assert ours.dtype in (torch.float32, torch.float64)
        torch.testing.assert_close(ours.double(), right, rtol=1e-3, atol=1e-4, equal_nan=True)
