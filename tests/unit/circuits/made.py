"""Circuits, prompts and a metric that the tests of this room share."""

from typing import Any

import torch
from torch import Tensor

from tests.models import tiny_model, tiny_tokens
from tl_loops.circuits import Circuit, EdgeGraph

TOKENS, REFERENCE = tiny_tokens(3, 5), tiny_tokens(3, 5, seed=9)
WHOLE: dict[str, bool] = {}
HEADS = {"heads": True}
SPLIT = {"heads": True, "split_qkv": True}


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 3] - logits[:, -2, 5]).mean()


def made(architecture: str, **changes: Any) -> tuple[Any, Any]:
    """A model and the cache of the reference prompts."""
    model = tiny_model(architecture, initializer_range=0.15, **changes)
    with torch.no_grad():
        return model, model.run_with_cache(REFERENCE)[1]


def drawn(graph: EdgeGraph, seed: int = 0, share: float = 0.5) -> Circuit:
    """A random circuit."""
    generator = torch.Generator().manual_seed(seed)
    return Circuit(
        graph, graph.exists & (torch.rand(graph.exists.shape, generator=generator) < share)
    )
