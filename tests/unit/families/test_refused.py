"""Published looped models that do not load say why, by themselves and in the documentation."""

from pathlib import Path

import pytest

from tl_loops import CheckpointError
from tl_loops.families.refused import REFUSED, refusal
from tl_loops.families.registry import FAMILIES, recognise

DOCUMENT = (Path(__file__).parents[3] / "docs" / "families.md").read_text()
EVERY = pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)


@EVERY
def test_a_known_model_that_does_not_load_says_what_is_missing(refused):
    configs = [{"model_type": kind} for kind in refused.model_types]
    configs += [{"model_type": "x", "architectures": [name]} for name in refused.architectures]
    for config in configs:
        with pytest.raises(CheckpointError) as raised:
            recognise(config, "config.json", list)
        assert str(raised.value).startswith(f"config.json: {refused.name} models do not load: ")
        assert refused.reason in str(raised.value)


@EVERY
def test_each_has_a_row_in_the_documentation(refused):
    for name in (*refused.models, *refused.model_types):
        assert f"`{name}`" in DOCUMENT, name


@EVERY
def test_no_family_reads_what_is_refused(refused):
    for kind in refused.model_types:
        assert not any(kind in family.model_types for family in FAMILIES)
        assert not any(
            family.matches({"model_type": kind, "architectures": [*refused.architectures]})
            for family in FAMILIES
        )


@pytest.mark.parametrize("architectures", [None, 3, [3, None], {}])
def test_odd_entries_are_no_known_model(architectures):
    assert refusal({"architectures": architectures}) is None


def test_every_family_has_a_row_in_the_documentation():
    for family in FAMILIES:
        if family.name not in ("native", "hrm-text-split"):
            assert f"`{family.name}`" in DOCUMENT, family.name


def test_every_repository_that_loads_by_name_is_told_in_the_documentation():
    owners = {known.name.split("/")[0] for family in FAMILIES for known in family.known}
    for owner in sorted(owners - {"tl-loops-tiny", "tl-loops-text"}):
        assert owner in DOCUMENT, owner
