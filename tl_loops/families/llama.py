"""Llama and Mistral: feedforward models, which loading may loop."""

from typing import Any

from tl_loops.errors import CheckpointError
from tl_loops.families.base import Released, checked
from tl_loops.families.shared import feedforward


def _derive_mistral(released: Released) -> dict[str, Any]:
    window = released.get("sliding_window")
    longest = released["max_position_embeddings"]
    if window is not None and checked("sliding_window", window, int) < longest:
        raise CheckpointError(
            f"'sliding_window' = {window} is below 'max_position_embeddings' = {longest}: windows "
            f"are not implemented. Texts of up to {window} tokens never meet the window: set "
            f"'max_position_embeddings' to {window} in config.json to load the model for them"
        )
    return feedforward.derive(released)


_FLAGS = {"hidden_act": ("silu", "swish")}

LLAMA = feedforward.of_llama_kind(
    "llama", "2302.13971", "Llama", flags={**_FLAGS, **feedforward.BIASES}
)

MISTRAL = feedforward.of_llama_kind(
    "mistral", "2310.06825", "Mistral", flags=_FLAGS, derive=_derive_mistral
)
