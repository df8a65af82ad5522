"""Axes end at their data, and never beyond what their quantity can be."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_loops.drawing import quantities
from tl_loops.drawing.figure import Axis, Bars, Figure, Heat, Line, Panel
from tl_loops.drawing.limits import whole_step, with_limits
from tl_loops.plots import draw

QUANTITIES = {
    name: axis for name, axis in vars(quantities).items() if isinstance(axis, Axis)
} | {"share": quantities.share("tokens")}  # fmt: skip


def panel(y, x=None, x_axis=quantities.ITERATION, y_axis=None) -> Panel:
    y = np.array(y, dtype=float)
    x = np.arange(len(y), dtype=float) if x is None else np.array(x, dtype=float)
    line = Line(x, y, "a", "#000000")
    return Panel((line,), x_axis, y_axis or Axis("y"))


def limited(given: Panel) -> Panel:
    return with_limits(Figure("t", "s", (given,))).panels[0]


@pytest.mark.parametrize("axis", QUANTITIES.values(), ids=QUANTITIES.keys())
@given(st.data())
def test_an_axis_holds_its_data_and_stays_within_its_quantity(axis, data):
    least, most = (max(axis.bounds[0], -1e4), min(axis.bounds[1], 1e4))
    least = max(least, 1e-3) if axis.log else least
    numbers = st.integers(int(least), int(most)) if axis.whole else st.floats(least, most)
    values = data.draw(st.lists(numbers, min_size=1, max_size=5))
    low, high = limited(panel(values, y_axis=axis)).y.limits
    assert low < high
    assert low <= min(values) and max(values) <= high
    if axis.log:
        low, high = math.log10(low), math.log10(high)
        least, most = (math.log10(b) if b > 0 else -math.inf for b in axis.bounds)
    else:
        least, most = axis.bounds
    room = 0.25 if axis.whole else 0
    assert low >= least - 0.06 * (high - low) - room
    assert high <= most + 0.06 * (high - low) + room


def test_a_share_that_never_changes_has_the_whole_axis():
    low, high = limited(panel([0, 0, 0], y_axis=quantities.share("tokens"))).y.limits
    assert (low, high) == pytest.approx((-0.03, 1.03))


def test_the_best_rank_is_the_end_of_its_axis():
    low, high = limited(panel([1, 1, 1], y_axis=quantities.RANK)).y.limits
    assert 0.9 < low < 1 < high


@pytest.mark.parametrize("n", [1, 2, 4, 12, 13, 64, 128])
def test_iterations_are_counted_in_whole_steps(n):
    figure = draw(Figure("t", "s", (panel(np.arange(n) / 10),)), "plotly")
    axis = figure.layout.xaxis
    assert axis.dtick == int(axis.dtick) >= 1 and axis.tick0 == 0
    low, high = axis.range
    assert low > -axis.dtick and (high - low) / axis.dtick <= 12


def test_steps_of_whole_numbers():
    assert [whole_step((0, n), 10) for n in (1, 10, 11, 21, 51, 101, 1000)] == [
        1, 1, 2, 5, 10, 20, 100,
    ]  # fmt: skip


def test_bars_stand_on_zero_and_matrices_have_row_0_on_top():
    bars = Bars(np.arange(3.0), np.array([0.2, 0.3, 0.5]), "b", "#000000")
    low, high = limited(Panel((bars,), quantities.ITERATION, quantities.PROBABILITY)).y.limits
    assert -0.02 < low < 0 and 0.5 < high < 0.6
    heat = limited(Panel((Heat(np.ones((2, 5))),), Axis("x"), Axis("y")))
    assert heat.x.limits == (-0.5, 4.5) and heat.y.limits == (1.5, -0.5)


@pytest.mark.parametrize(("low", "high"), [(320, 900), (1, 1.4), (0.02, 0.03)])
def test_ticks_within_a_decade_are_round_numbers(low, high):
    length = quantities.LENGTH
    axis = draw(Figure("t", "s", (panel([low, high], y_axis=length),)), "plotly").layout.yaxis
    step = float(axis.dtick.removeprefix("L"))
    assert axis.tick0 == 0 and float(f"{step:.0e}") == step  # plotly counts from 0 in such steps
    assert 2 <= (high - low) / step <= 20
