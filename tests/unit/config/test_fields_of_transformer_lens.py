"""No field of TransformerLens's config is accepted and then ignored."""

import dataclasses
import re
from pathlib import Path

import pytest

import tl_loops
from tests.models import tiny_config
from tl_loops import ConfigError
from tl_loops.config.checks import _CHOICES, _UNSUPPORTED
from tl_loops.upstream import BaseConfig

SAYS_NOTHING = {
    # About where a model comes from.
    *("checkpoint_index", "checkpoint_label_type", "checkpoint_value", "from_checkpoint"),
    *("decoder_start_token_id", "tokenizer_name", "train_seq_length", "trust_remote_code"),
    # TransformerLens fills them in for its own use.
    *("uses_rms_norm", "layer_norm_folding"),
    # Details of mechanisms whose switch is refused.
    *("norm_topk_prob", "relative_attention_max_distance", "relative_attention_num_buckets"),
    *("yarn_factor", "yarn_attention_factor", "yarn_beta_fast", "yarn_beta_slow"),
    *("yarn_original_max_position_embeddings", "yarn_truncate", "yarn_global_attn_only"),
}


def test_every_field_is_read_or_refused_or_says_nothing():
    root = Path(tl_loops.__file__).parent
    elsewhere = ("upstream/base_config.py", "upstream/config_fields.py", "model/repeated")
    code = "\n".join(
        path.read_text()
        for path in root.rglob("*.py")
        if not path.relative_to(root).as_posix().startswith(elsewhere)
    )
    read = set(re.findall(r"\.(\w+)\b", code))
    unread = {f.name for f in dataclasses.fields(BaseConfig)} - read - SAYS_NOTHING
    assert unread <= {*_UNSUPPORTED, *_CHOICES}


@pytest.mark.parametrize(
    ("name", "value"), [("attn_scores_soft_cap", 20.0), ("use_hook_tokens", True)]
)
def test_a_field_without_an_effect_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value!r} is not supported"):
        tiny_config("ouro", **{name: value})
