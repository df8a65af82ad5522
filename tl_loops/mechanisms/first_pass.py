"""Attention of later iterations to the keys and values of iteration 0 (IQuest-Coder Loop)."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_loops.errors import ConfigError
from tl_loops.layout.names import spec
from tl_loops.mechanisms.block_parts import Attend, AttentionPart, Context
from tl_loops.mechanisms.mechanism import (
    DECIDES_KEYS,
    Config,
    Mechanism,
    OnPath,
    Part,
    Run,
    Setting,
)
from tl_loops.mechanisms.tensors import PhysicalTensor, Tensors, add_parameters
from tl_loops.mechanisms.windows import windowed
from tl_loops.upstream import HookPoint


class FirstPassGate(nn.Module):
    """How much each head takes of iteration 0: ``sigmoid(q · W + b)``, q after the rotation.

    From iteration 1 on a head writes ``g · A(q, K₀, V₀) + (1 - g) · A_window(q, K, V)``.

    Hook points, which fire from iteration 1 on: ``hook_gate`` [batch, pos, head];
    ``hook_attn_scores`` and ``hook_pattern`` [batch, head, query, key] of the attention to
    iteration 0 (those of the attention itself are of the window).
    """

    W: nn.Parameter
    b: nn.Parameter

    def __init__(self, cfg: Config, device: torch.device | str | None = None):
        super().__init__()
        weights = FIRST_PASS.block_weights(cfg, 0)
        add_parameters(self, weights, "attn.first_pass", cfg.dtype, device)
        self.hook_gate = HookPoint()
        self.hook_attn_scores = HookPoint()
        self.hook_pattern = HookPoint()

    def forward(self, q: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head"]:
        return self.hook_gate(torch.sigmoid((q * self.W).sum(-1) + self.b))


class _Keep(Part):
    """Keeps keys and values of iteration 0, by layer, and tells a block where it stands."""

    def __init__(self, run: Run):
        super().__init__(run)
        self._first: dict[int, tuple[Tensor, Tensor]] = {}

    def context(self, t: int, layer: int, context: Any, x: Tensor) -> Any:
        return replace(context, notes={**context.notes, FIRST_PASS.name: (t, layer, self._first)})


class _AttendToFirst(AttentionPart):
    def __init__(self, attention: Any, window: int, note: Any):
        self._gate: FirstPassGate = attention.first_pass
        self._window = window
        self._iteration, self._layer, self._first = note

    def attend(
        self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, context: Context, hooks: Any
    ) -> Tensor:
        if self._iteration == 0:
            self._first[self._layer] = k, v
            return attend(q, k, v, context, hooks)
        near = windowed(context, self._window)
        own = attend(q, k, v, near, hooks)
        first = (self._gate.hook_attn_scores, self._gate.hook_pattern)
        everything = attend(q, *self._first[self._layer], context, first)
        gate = self._gate(q).unsqueeze(-1)
        return gate * everything + (1 - gate) * own


class _FirstPass(Mechanism):
    name = "first_pass_window"
    settings = (
        Setting(
            "first_pass_window",
            int | None,
            None,
            "From iteration 1 on, heads mix by a gate full attention to iteration 0's keys and "
            "values with attention to their own of this many positions (IQuest).",
            at_least=1,
        ),
    )
    points = (
        spec("attn.first_pass.hook_gate", "block", "batch pos head", first_iteration=1),
        spec(
            "attn.first_pass.hook_attn_scores", "block", "batch head query key", first_iteration=1
        ),
    )
    with_stacks = False
    own_keys = "later iterations of this model read the first one's keys already, by a trained gate"

    def decides(self, cfg: Config) -> dict[str, str]:
        return DECIDES_KEYS

    def check(self, cfg: Config) -> None:
        if cfg.first_pass_window is not None and cfg.attention_dir != "causal":
            raise ConfigError("first_pass_window needs causal attention and no router")

    def describe(self, cfg: Config) -> list[str]:
        return [
            "heads    t > 0: z = g·A(q, K_0, V_0) + (1 - g)·A(q, K_t, V_t; last "
            f"{cfg.first_pass_window}), g = σ(q·w + b)"
        ]

    def block_weights(self, cfg: Config, number: int) -> Tensors:
        return {
            "attn.first_pass.W": PhysicalTensor((cfg.n_heads, cfg.d_head)),
            "attn.first_pass.b": PhysicalTensor((cfg.n_heads,)),
        }

    def block_modules(self, cfg: Config, number: int, device: Any = None) -> dict[str, nn.Module]:
        return {"attn.first_pass": FirstPassGate(cfg, device)}

    def part(self, run: Run) -> Part:
        return _Keep(run)

    def attention_part(self, attention: Any, context: Context) -> AttentionPart | None:
        note = context.notes.get(self.name)  # blocks outside the loop have none
        window = attention.cfg.first_pass_window
        return None if note is None else _AttendToFirst(attention, window, note)

    def path(self, cfg: Config) -> OnPath:
        return OnPath()  # it acts inside the attention

    def carries(self, cfg: Config) -> str:
        return "keys of iteration 0"


FIRST_PASS = _FirstPass()
