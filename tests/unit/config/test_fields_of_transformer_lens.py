"""No field of TransformerLens's config is accepted and then ignored."""

import dataclasses
import re
from pathlib import Path

import pytest

import tl_loops
from tests.models import tiny_config
from tl_loops import ConfigError
from tl_loops.config.checks import CHOICES, UNSUPPORTED
from tl_loops.upstream import BaseConfig
from tl_loops.upstream.config_fields import DETAILS_OF_THE_UNSUPPORTED, SAYS_NOTHING_OF_A_RUN


def test_every_field_is_read_or_refused_or_says_nothing():
    root = Path(tl_loops.__file__).parent
    elsewhere = ("upstream/base_config.py", "upstream/config_fields.py", "model/repeated")
    code = "\n".join(
        path.read_text()
        for path in root.rglob("*.py")
        if not path.relative_to(root).as_posix().startswith(elsewhere)
    )
    read = set(re.findall(r"\.(\w+)\b", code))
    says_nothing = SAYS_NOTHING_OF_A_RUN | DETAILS_OF_THE_UNSUPPORTED
    unread = {f.name for f in dataclasses.fields(BaseConfig)} - read - says_nothing
    assert unread <= {*UNSUPPORTED, *CHOICES}


@pytest.mark.parametrize(
    ("name", "value"), [("attn_scores_soft_cap", 20.0), ("use_hook_tokens", True)]
)
def test_a_field_without_an_effect_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value!r} is not supported"):
        tiny_config("ouro", **{name: value})
