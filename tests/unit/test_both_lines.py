"""The numbers of a checkpoint do not depend on the release of TransformerLens."""

import json

import pytest

from tests.both_lines import CHECKPOINTS, STORED, numbers

EXPECTED = json.loads(STORED.read_text())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_numbers_are_those_of_every_other_line(name):
    found = numbers(name)
    assert found.keys() == EXPECTED[name].keys()
    for what, values in found.items():
        assert values == pytest.approx(EXPECTED[name][what], rel=1e-6, abs=1e-6), what
