"""Norms of what the heads give to ``W_O`` and the neurons to ``W_out`` (Dory)."""

from typing import Any

from torch import Tensor, nn

from tl_loops.layout.names import norm_specs
from tl_loops.mechanisms.block_parts import AttentionPart, Context, MLPPart
from tl_loops.mechanisms.mechanism import Config, Mechanism, Setting
from tl_loops.mechanisms.norm import Norm, norm_tensors
from tl_loops.mechanisms.tensors import Tensors


class _NormHeads(AttentionPart):
    """One norm over all heads of a position."""

    def __init__(self, attention: Any):
        self._attention = attention

    def heads(self, z: Tensor, query_input: Tensor) -> Tensor:
        return self._attention.heads_norm(z.flatten(-2)).view_as(z)


class _NormNeurons(MLPPart):
    def __init__(self, mlp: Any):
        self._mlp = mlp

    def neurons(self, post: Tensor) -> Tensor:
        return self._mlp.neurons_norm(post)


def _lengths(cfg: Config) -> dict[str, int]:
    """The norms of a layer, with the lengths that they act on."""
    return {"attn.heads_norm": cfg.n_heads * cfg.d_head, "mlp.neurons_norm": cfg.d_mlp}


class _InnerNorms(Mechanism):
    name = "inner_norms"
    settings = (
        Setting(
            "inner_norms",
            bool,
            False,
            "What the heads give to W_O is normed over all heads together, after a gate, and what "
            "the neurons give to W_out over all neurons (Dory).",
        ),
    )
    points = (
        *norm_specs("attn.heads_norm", "block", ("batch", "pos", "heads_and_d_head")),
        *norm_specs("mlp.neurons_norm", "block", ("batch", "pos", "d_mlp")),
    )

    def describe(self, cfg: Config) -> list[str]:
        return ["inside   all heads are normed together before W_O, all neurons before W_out"]

    def block_weights(self, cfg: Config, number: int) -> Tensors:
        found: Tensors = {}
        for name, length in _lengths(cfg).items():
            found |= norm_tensors(cfg, name, length)
        return found

    def block_modules(self, cfg: Config, number: int, device: Any = None) -> dict[str, nn.Module]:
        return {name: Norm(cfg, length, device) for name, length in _lengths(cfg).items()}

    def attention_part(self, attention: Any, context: Context) -> AttentionPart:
        return _NormHeads(attention)

    def mlp_part(self, mlp: Any) -> MLPPart:
        return _NormNeurons(mlp)

    def effective(self, block: Any, weight: str, W: Tensor) -> Tensor:
        if weight == "W_O":
            gain = block.attn.heads_norm.w
            return W if gain is None else W * gain.view(*W.shape[:2], 1)
        if weight == "W_out":
            gain = block.mlp.neurons_norm.w
            return W if gain is None else W * gain[:, None]
        return W

    def keeps_value_biases(self, cfg: Config) -> str:
        return "inner_norms scale what they add"


INNER_NORMS = _InnerNorms()
