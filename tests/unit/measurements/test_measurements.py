"""The registry of measurements."""

import inspect

import pytest

from tests.models import tiny_config
from tl_loops.layout.layout import LoopLayout
from tl_loops.measurements import (
    DEFAULT_METRICS,
    MEASUREMENTS,
    core_calls,
    find_measurement,
    resolve_options,
    why_not,
)

LAYOUT = LoopLayout(n_prelude=1, n_core=2, n_coda=1, n_iterations=3)


@pytest.mark.parametrize(("name", "measurement"), MEASUREMENTS.items())
def test_every_entry_is_complete(name, measurement):
    low, high = measurement.bounds
    assert low < high
    assert measurement.unit
    assert measurement.summary[0].isupper() or measurement.summary[0].isdigit()
    assert "arXiv" in measurement.source
    assert (measurement.per_token is not None) == (measurement.needs in ("series", "path"))
    assert (measurement.window > 1) == (measurement.needs in ("previous", "path"))
    assert measurement.against_last or measurement.needs != "last"
    for option in measurement.options:
        assert option not in ("mask", "validate", "reference")


@pytest.mark.parametrize(("name", "measurement"), MEASUREMENTS.items())
def test_every_default_option_is_accepted(name, measurement):
    given = dict(measurement.options)
    assert resolve_options(name, measurement, given, n_tokens=4, d_model=8) == given
    assert resolve_options(name, measurement, {}, n_tokens=1, d_model=8) == given


def test_defaults_are_measured_on_feedforward_models_too():
    for name in DEFAULT_METRICS:
        assert MEASUREMENTS[name].blocks(None, 5) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("sink_rate", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("successive_difference", (3, 4, 5, 6)),
        ("step_angles", (5, 6)),
        ("fixed_point_distance", (1, 2, 3, 4)),
        ("trajectory_orbit", (5, 6)),
        ("state_entropy", (2, 4, 6)),
        ("exit_probability", (2, 4, 6)),
        ("expected_exit_iteration", (6,)),
    ],
)
def test_values_stand_where_they_are_defined(name, blocks):
    assert MEASUREMENTS[name].blocks(LAYOUT, LAYOUT.n_layers) == blocks


def test_calls_are_those_of_one_physical_layer():
    assert core_calls(LAYOUT) == {"core.0": [1, 3, 5], "core.1": [2, 4, 6]}
    stacks = LoopLayout(0, 2, 0, 4, stacks=("L", "L", "H", "L"))
    assert core_calls(stacks)["core.L.0"] == [0, 2, 6]
    # The only call of a stack is compared with nothing.
    assert MEASUREMENTS["successive_difference"].blocks(stacks, 8) == (2, 3, 6, 7)
    assert MEASUREMENTS["fixed_point_distance"].blocks(stacks, 8) == (0, 1, 2, 3)


def test_near_names_are_suggested():
    with pytest.raises(ValueError, match="did you mean 'mixing_score'"):
        find_measurement("mixing_scor")
    with pytest.raises(ValueError, match="known: sink_rate, "):
        find_measurement("qqq")


def test_what_a_model_lacks_is_named():
    def reason(name: str, cfg, layout) -> str | None:
        depth = 4 if layout is None else layout.n_layers
        return why_not(MEASUREMENTS[name], {}, cfg, layout, depth)

    looped = tiny_config("retrofitted")
    assert reason("sink_rate", looped, None) is None
    assert "no loop" in (reason("successive_cosine", looped, None) or "")
    assert "no loop" in (reason("exit_probability", looped, None) or "")
    assert "gate" in (reason("exit_probability", looped, looped.layout) or "")
    assert reason("exit_probability", tiny_config("ouro"), tiny_config("ouro").layout) is None
    once = looped.layout.with_iterations(1)
    assert "needs 2 iterations or more, but n_iterations is 1" in (
        reason("fixed_point_cosine", looped, once) or ""
    )


def test_summaries_stay_on_one_line():
    for measurement in MEASUREMENTS.values():
        assert "\n" not in inspect.cleandoc(measurement.summary)
