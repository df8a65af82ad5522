"""How the report tells a change along the loop."""

import pytest
import torch

from tl_loops.report.answers import _change


@pytest.mark.parametrize(
    ("values", "is_share", "said"),
    [
        ([0.5], True, "N is 50.0% after 1 iteration"),
        ([0.5, 0.5], True, "N is 50.0% after every iteration"),
        ([0.25, 0.5, 1.0], True, "N rises from 25.0% after 1 iteration to 100.0% after 3"),
        ([0.25, 1.0, 1.0], True,
         "N rises from 25.0% after 1 iteration to 100.0% after 2 and stays there"),
        ([0.25, 1.0, 0.5], True,
         "N rises from 25.0% after 1 iteration to 100.0% after 2; after 3 it is 50.0%"),
        ([1.0, 0.5], True, "N is best after 1 iteration, 100.0%, and 50.0% after 2"),
        ([2.0, 1.0], False, "N falls from 2.000 nats after 1 iteration to 1.000 nats after 2"),
    ],
)  # fmt: skip
def test_a_change_is_told_in_one_sentence(values, is_share, said):
    assert _change(torch.tensor(values), "N", is_share) == said
