"""Layers that attend to the last positions alone, with a rotary base of their own (Dory)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tl_loops.errors import ConfigError
from tl_loops.mechanisms.block_parts import Context
from tl_loops.mechanisms.mechanism import (
    DECIDES_KEYS,
    Config,
    Mechanism,
    OnPath,
    Part,
    Run,
    Setting,
)
from tl_loops.mechanisms.words import exactly


def windowed(context: Context, window: int) -> Context:
    """The same with each query seeing its own position and the ``window - 1`` before it alone."""
    n_new, device = context.positions.shape[-1], context.positions.device
    key = torch.arange(context.n_past + n_new, device=device)
    query = key[context.n_past :, None]
    near = ((key <= query) & (key > query - window))[None, None]
    if context.allowed is None:
        return replace(context, allowed=near)  # each query sees itself
    allowed = near & context.allowed
    return replace(context, allowed=allowed, blind=~allowed.any(-1, keepdim=True))


class _Window(Part):
    """Gives the layers with a window a context of their own, made once a run."""

    def __init__(self, run: Run):
        super().__init__(run)
        layers, names = run.cfg.attn_window_layers, run.layout.physical_names()
        self._names = set(names if layers is None else (names[layer] for layer in layers))
        self._fields: dict[str, Tensor | None] | None = None

    def layer_context(self, index: int, context: Any) -> Any:
        if self.run.layout.physical_name(index) not in self._names:
            return context
        if self._fields is None:
            self._fields = self._made(context)
        return replace(context, **self._fields)

    def _made(self, context: Any) -> dict[str, Tensor | None]:
        cfg = self.run.cfg
        near = windowed(context, cfg.attn_window)
        fields = {"allowed": near.allowed, "blind": near.blind}
        if cfg.attn_window_rotary_base is not None:
            table = self.run.model._further_rotary[cfg.attn_window_rotary_base]
            fields["cos"], fields["sin"] = table(context.positions)
        return fields


class _Windows(Mechanism):
    name = "attn_window"
    settings = (
        Setting(
            "attn_window",
            int | None,
            None,
            "In some layers a query sees so many positions alone, its own among them. ``None``: "
            "all layers see everything before.",
            at_least=1,
            of_the_weights=False,
        ),
        Setting(
            "attn_window_layers",
            tuple[int, ...] | None,
            None,
            "The physical layers with that window, counted through prelude, core and coda. "
            "``None``: all.",
            of_the_weights=False,
        ),
        Setting(
            "attn_window_rotary_base",
            float | None,
            None,
            "Their rotary base, scaled as ``rotary_base`` is. ``None``: ``rotary_base``.",
            above=0,
            of_the_weights=False,
        ),
    )

    def active(self, cfg: Config) -> bool:
        return cfg.attn_window is not None

    def decides(self, cfg: Config) -> dict[str, str]:
        return DECIDES_KEYS

    def check(self, cfg: Config) -> None:
        layers, base = cfg.attn_window_layers, cfg.attn_window_rotary_base
        if cfg.attn_window is None:
            if layers is not None or base is not None:
                raise ConfigError(
                    "attn_window_layers and attn_window_rotary_base need attn_window, the number "
                    "of positions that these layers see"
                )
            return
        if cfg.attention_dir != "causal" or cfg.prefix_mask:
            raise ConfigError("attn_window needs causal attention without prefix_mask")
        if base is not None and cfg.positional_embedding_type != "rotary":
            raise ConfigError("attn_window_rotary_base needs positional_embedding_type='rotary'")
        depth = cfg.n_physical_layers
        if layers is not None and not _are_layers(layers, depth):
            raise ConfigError(
                f"attn_window_layers must be different physical layers in ascending order, each "
                f"at least 0 and below {depth}, got {layers!r}"
            )

    def describe(self, cfg: Config) -> list[str]:
        layers, base = cfg.attn_window_layers, cfg.attn_window_rotary_base
        where = "all layers" if layers is None else f"physical layers {', '.join(map(str, layers))}"
        rotary = "" if base is None else f", with rotary base {exactly(base)}"
        return [f"window   of {cfg.attn_window} positions in {where}{rotary}"]

    def rotary_bases(self, cfg: Config) -> tuple[float, ...]:
        base = cfg.attn_window_rotary_base
        return () if base is None else (base,)

    def part(self, run: Run) -> Part:
        return _Window(run)

    def path(self, cfg: Config) -> OnPath:
        return OnPath()  # it acts inside the attention


def _are_layers(layers: Any, depth: int) -> bool:
    return (
        isinstance(layers, tuple)
        and bool(layers)
        and all(type(layer) is int and 0 <= layer < depth for layer in layers)
        and list(layers) == sorted(set(layers))
    )


WINDOWS = _Windows()
