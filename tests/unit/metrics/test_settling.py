"""Late drift, Otsu's threshold and the table of settled against correct."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics import late_drift, otsu_threshold, settling_table

laws = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**31 - 1)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@laws
@given(st.floats(0.3, 0.9), st.integers(1, 6))
def test_drift_of_a_geometric_approach(rate, window):
    t = torch.arange(9, dtype=torch.float64)
    x = rate ** t[:, None] * torch.tensor([[3.0, 4.0]]).double()
    steps = 5 * rate ** t[:-1] * (1 - rate)
    assert late_drift(x, window).item() == pytest.approx(float(steps[-window:].mean()))
    relative = late_drift(x, window, relative=True).item()
    assert relative == pytest.approx(1 / rate - 1)  # every state is rate times the one before


def test_drift_of_short_paths():
    x = randn(0, 3, 2, 4)
    torch.testing.assert_close(late_drift(x, 4), x.diff(dim=0).norm(dim=-1).mean(0))
    assert late_drift(x[:1]).isnan().all()
    with pytest.raises(ValueError, match="window=0"):
        late_drift(x, 0)


@laws
@given(seeds, st.integers(2, 12))
def test_otsu_is_the_best_of_all_splits(seed, n):
    x = randn(seed, n)
    found = otsu_threshold(x)

    def within(threshold):
        groups = [x[x <= threshold], x[x > threshold]]
        return sum(float((g - g.mean()).square().sum()) for g in groups if g.numel())

    best = min(within(float(value)) for value in x.sort().values[:-1])
    assert within(found) == pytest.approx(best)
    assert otsu_threshold(2 * x + 3) == pytest.approx(2 * found + 3)


def test_otsu_of_two_clusters_and_of_one_value():
    x = torch.cat([randn(0, 50) * 0.1, 5 + randn(1, 20) * 0.1, torch.tensor([-math.inf]).double()])
    assert 0.5 < otsu_threshold(x) < 4.5
    assert math.isnan(otsu_threshold(torch.ones(4)))
    assert math.isnan(otsu_threshold(torch.tensor([1.0, math.nan])))
    # Equal values fall on one side.
    assert otsu_threshold(torch.tensor([0.0, 0, 0, 0, 1])) == 0.5


def test_the_table():
    drift = torch.tensor([0.01, 0.02, 0.015, 2.0, 3.0, 0.0])
    correct = torch.tensor([True, True, False, False, True, True])
    found = settling_table(drift, correct)
    assert 0.02 < found.threshold < 2.0
    assert found.settled.tolist() == [True, True, True, False, False, True]
    assert found.counts.tolist() == [[3, 1], [1, 1]]
    assert found.to_frame().loc["settled", "correct"] == 3
    assert found.accuracy_settled == 0.75 and found.accuracy_wandering == 0.5
    # Wrong: 0.015, 2. Right: 0.01, 0.02, 3, 0: 2 + 3 of 8 pairs.
    assert found.auc == pytest.approx(5 / 8)
    fixed = settling_table(drift, correct, threshold=10.0)
    assert bool(fixed.settled.all()) and math.isnan(fixed.accuracy_wandering)


@laws
@given(seeds, st.integers(1, 8), st.integers(1, 8))
def test_the_area_is_that_of_all_pairs(seed, n_wrong, n_right):
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randint(0, 5, (n_wrong + n_right,), generator=generator).float()
    correct = torch.arange(n_wrong + n_right) >= n_wrong
    wrong, right = drift[:n_wrong, None], drift[None, n_wrong:]
    pairs = ((wrong > right).float() + 0.5 * (wrong == right).float()).mean()
    assert settling_table(drift, correct, threshold=1.0).auc == pytest.approx(float(pairs))


def test_what_has_no_table():
    right = torch.tensor([True, True])
    assert math.isnan(settling_table(torch.tensor([0.1, 1.0]), right).auc)
    with pytest.raises(ValueError, match="do not differ"):
        settling_table(torch.tensor([1.0, 1.0]), right)
    for drift in (torch.tensor([-1.0, 1.0]), torch.tensor([math.nan, 1.0]), torch.tensor([])):
        with pytest.raises(ValueError, match="leave out"):
            settling_table(drift, right[: len(drift)])
