"""A stream that moves towards the normed output of a branch, rather than adding it (nGPT, Dory)."""

from typing import Any

from torch import Tensor, nn

from tl_loops.errors import ConfigError
from tl_loops.mechanisms.block_parts import BlockPart, Branch, Context
from tl_loops.mechanisms.mechanism import Config, Mechanism, Setting
from tl_loops.mechanisms.norm import OUTPUT_NORMED
from tl_loops.mechanisms.tensors import Scale, Tensors, vector
from tl_loops.mechanisms.words import exactly


class _Move(BlockPart):
    """``x = (1 - r)·x + r·branch``."""

    def __init__(self, rates: dict[Branch, Tensor]):
        self._rates = rates

    def keep(self, branch: Branch, resid: Tensor) -> Tensor:
        # Not (1 - r)·x, whose factor bfloat16 would round.
        return resid - self._rates[branch] * resid

    def add(self, branch: Branch, out: Tensor) -> Tensor:
        return self._rates[branch] * out


class _ResidualRate(Mechanism):
    name = "residual_rate"
    settings = (
        Setting(
            "residual_rate",
            float | None,
            None,
            "c of the rate ``r = |c w|``, with a trained w per dimension and branch, at which the "
            "stream moves towards the normed output of a branch: (1 - r)·x + r·branch (nGPT, "
            "2410.01131). ``None``: branches are added.",
            above=0,
        ),
    )

    def active(self, cfg: Config) -> bool:
        return cfg.residual_rate is not None

    def check(self, cfg: Config) -> None:
        if cfg.residual_rate is not None and cfg.block_norm not in OUTPUT_NORMED:
            raise ConfigError(
                f"residual_rate needs norms on what the branches write: block_norm must be one of "
                f"{', '.join(map(repr, OUTPUT_NORMED))}, got {cfg.block_norm!r}"
            )

    def describe(self, cfg: Config) -> list[str]:
        c = exactly(cfg.residual_rate)
        return [f"rate     where a branch b is added, x = (1 - r)·x + r·b; r = |{c}·w|"]

    def block_weights(self, cfg: Config, number: int) -> Tensors:
        return {f"{branch}_rate.w": vector(cfg.d_model) for branch in ("attn", "mlp")}

    def block_modules(self, cfg: Config, number: int, device: Any = None) -> dict[str, nn.Module]:
        return {
            name.removesuffix(".w"): Scale(weight, cfg.residual_rate, cfg.dtype, device)
            for name, weight in self.block_weights(cfg, number).items()
        }

    def block_part(self, block: Any, context: Context) -> BlockPart:
        return _Move({branch: self.added(block, branch) for branch in ("attn", "mlp")})

    def added(self, block: Any, branch: Branch) -> Tensor:
        return (block.attn_rate if branch == "attn" else block.mlp_rate)().abs()

    def kept(self, block: Any, branch: Branch) -> Tensor:
        return 1 - self.added(block, branch)


RESIDUAL_RATE = _ResidualRate()
