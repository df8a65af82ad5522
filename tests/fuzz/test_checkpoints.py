"""A fixed sample of damaged checkpoints; the full run is ``python -m tests.fuzz.checkpoints``."""

from tests.fuzz.checkpoints import run
from tests.fuzz.mutations import KINDS


def test_damaged_checkpoints_end_in_a_right_model_or_one_clear_error():
    outcomes = run(6 * len(KINDS))
    assert {outcome.kind for outcome in outcomes} == set(KINDS)
    assert [outcome for outcome in outcomes if not outcome.fine] == []
