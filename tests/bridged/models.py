"""The parity checkpoints behind TransformerBridge."""

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import HrmTextConfig, HrmTextForCausalLM

from tests.bridged.ouro import OuroConfig, OuroForCausalLM
from tests.bridged.raven import RavenConfig, RavenForCausalLM

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
CLASSES: dict[str, Any] = {
    "hrm_text": (HrmTextConfig, HrmTextForCausalLM),
    "ouro": (OuroConfig, OuroForCausalLM),
    "huginn": (RavenConfig, RavenForCausalLM),
}
_NOT_FOR_THE_CLASS = ("architectures", "auto_map", "model_type", "dtype")


def build_bridge(model: Any, config: Any, tokenizer: Any = None) -> Any:
    """A TransformerBridge around a Hugging Face model, by the adapter of its class name."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = type(model).__name__
        return build_bridge_from_module(model, name, hf_config=config, tokenizer=tokenizer)


def bridged(family: str, **changes: Any) -> Any:
    """A fresh bridge of a family's parity checkpoint, with changes to its config."""
    config_class, model_class = CLASSES[family]
    released = json.loads((FIXTURES / family / "config.json").read_text())
    fields = {k: v for k, v in released.items() if k not in _NOT_FOR_THE_CLASS}
    config = config_class(**{**fields, **changes})
    model = model_class(config).eval()
    if family == "hrm_text":  # transformers splits the fused matrices of the file while loading.
        model = model_class.from_pretrained(FIXTURES / family, config=config).eval()
        return build_bridge(model, config)
    stored = load_file(FIXTURES / family / "model.safetensors")
    absent, unexpected = model.load_state_dict(stored, strict=False)
    assert not unexpected and set(absent) <= {"freqs_cis", "lm_head.weight"}
    model.tie_weights()
    return build_bridge(model, config)


def reference(family: str) -> dict[str, Tensor]:
    """The numbers that the released implementation gave."""
    return load_file(FIXTURES / family / "expected.safetensors")
