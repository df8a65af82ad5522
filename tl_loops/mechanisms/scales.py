"""Trained scales of queries, neurons and logits, in units of their own (nGPT, Dory)."""

from typing import Any

from torch import Tensor, nn

from tl_loops.errors import ConfigError
from tl_loops.layout.names import spec
from tl_loops.mechanisms.block_parts import AttentionPart, Context, MLPPart
from tl_loops.mechanisms.mechanism import Config, Mechanism, Setting
from tl_loops.mechanisms.tensors import PhysicalTensor, Scale, Tensors, vector
from tl_loops.mechanisms.words import exactly
from tl_loops.upstream import HookPoint


class _ScaleQueries(AttentionPart):
    """``q · (c w)²`` after norm and rotation."""

    def __init__(self, attention: Any):
        self._attention = attention

    def queries(self, q: Tensor) -> Tensor:
        return self._attention.hook_scaled_q(q * self._attention.query_scale().square())


class _ScaleNeurons(MLPPart):
    """``x W_gate · c w`` and ``x W_in · c w``, each with a w of its own."""

    def __init__(self, mlp: Any):
        self._mlp = mlp

    def pre(self, x: Tensor) -> Tensor:
        return x * self._mlp.gate_scale()

    def linear(self, x: Tensor) -> Tensor:
        return x * self._mlp.in_scale()


class _Scales(Mechanism):
    name = "scales"
    settings = (
        Setting(
            "query_scale",
            float | None,
            None,
            "c of ``(c w)²``, by which queries are multiplied after norm and rotation, with a "
            "trained w per head and dimension (nGPT, 2410.01131, section 2.6). ``None``: they are "
            "not.",
            above=0,
        ),
        Setting(
            "neuron_scale",
            float | None,
            None,
            "c of ``c w``, by which both linear maps of a gated MLP are multiplied, with a trained "
            "w per neuron for each (likewise). ``None``: they are not.",
            above=0,
        ),
        Setting(
            "logit_scale",
            float | None,
            None,
            "c of ``c w``, by which logits are multiplied, with a trained w per token (likewise). "
            "``None``: they are not.",
            above=0,
        ),
    )
    points = (spec("attn.hook_scaled_q", "block", "batch pos head d_head"),)

    def active(self, cfg: Config) -> bool:
        scales = (cfg.query_scale, cfg.neuron_scale, cfg.logit_scale)
        return any(scale is not None for scale in scales)

    def check(self, cfg: Config) -> None:
        if cfg.neuron_scale is not None and not cfg.gated_mlp:
            raise ConfigError("neuron_scale needs gated_mlp=True, both of whose maps it scales")
        if cfg.logit_scale is not None and cfg.unembed_bias:
            raise ConfigError("logit_scale and unembed_bias exclude each other")

    def describe(self, cfg: Config) -> list[str]:
        said = []
        if cfg.query_scale is not None:
            said.append(f"q·({exactly(cfg.query_scale)}·w)² after norm and rotation")
        if cfg.neuron_scale is not None:
            c = exactly(cfg.neuron_scale)
            said.append(f"(x W_gate)·{c}·w and (x W_in)·{c}·w'")
        if cfg.logit_scale is not None:
            said.append(f"logits·{exactly(cfg.logit_scale)}·w, before a soft cap")
        return [f"scales   {'; '.join(said)}"]

    def weights(self, cfg: Config) -> Tensors:
        if cfg.logit_scale is None:
            return {}
        return {"unembed.w": vector(cfg.d_vocab_out)}

    def block_weights(self, cfg: Config, number: int) -> Tensors:
        found: Tensors = {}
        if cfg.query_scale is not None:
            found["attn.query_scale.w"] = PhysicalTensor((cfg.n_heads, cfg.d_head))
        if cfg.neuron_scale is not None:
            found["mlp.gate_scale.w"] = found["mlp.in_scale.w"] = vector(cfg.d_mlp)
        return found

    def block_modules(self, cfg: Config, number: int, device: Any = None) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {}
        for name, weight in self.block_weights(cfg, number).items():
            factor = cfg.query_scale if name.startswith("attn.") else cfg.neuron_scale
            modules[name.removesuffix(".w")] = Scale(weight, factor, cfg.dtype, device)
        if cfg.query_scale is not None:
            modules["attn.hook_scaled_q"] = HookPoint()  # [batch, pos, head, d_head]
        return modules

    def attention_part(self, attention: Any, context: Context) -> AttentionPart | None:
        return None if attention.cfg.query_scale is None else _ScaleQueries(attention)

    def mlp_part(self, mlp: Any) -> MLPPart | None:
        return _ScaleNeurons(mlp) if hasattr(mlp, "in_scale") else None

    def effective(self, block: Any, weight: str, W: Tensor) -> Tensor:
        cfg = block.cfg
        if weight == "W_Q" and cfg.query_scale is not None:
            return W * block.attn.query_scale().square().unsqueeze(1)
        if weight in ("W_gate", "W_in") and cfg.neuron_scale is not None:
            scale = block.mlp.gate_scale if weight == "W_gate" else block.mlp.in_scale
            return W * scale()
        return W


SCALES = _Scales()
