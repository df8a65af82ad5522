"""The model card that is saved beside a checkpoint."""

from huggingface_hub import ModelCard, ModelCardData

from tl_loops.config.config import LoopedTransformerConfig

CARD_FILE = "README.md"

_TAGS = [
    "looped-transformer",
    "recurrent-depth",
    "mechanistic-interpretability",
    "transformer-lens",
]


def model_card(cfg: LoopedTransformerConfig) -> str:
    """What the model is and how to load it, as Markdown with the metadata that the hub reads."""
    data = ModelCardData(
        library_name="tl_loops", pipeline_tag="text-generation", tags=_TAGS, model_name=None
    )
    text = f"""---
{data.to_yaml()}
---

# {cfg.model_name}

A looped transformer language model, {cfg.notation}, with {cfg.n_params:,} parameters, in the format
of tl_loops.

```
{cfg.describe()}
```

Load it with TransformerLens's tools, every pass through the loop under a name of its own:

```python
from tl_loops import LoopedTransformer

model = LoopedTransformer.from_pretrained_no_processing("REPOSITORY OR DIRECTORY")
logits, cache = model.run_with_cache("Some text")
cache["iter.0.hook_state_out"]
```
"""
    return str(ModelCard(text))
