"""The config of a HookedTransformer some of whose blocks repeat."""

import copy
import dataclasses
from typing import Any, SupportsIndex

from tl_loops.config.checks import whole_iterations
from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import ConfigError
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.segments import named_segments
from tl_loops.upstream import POST_NORM_ARCHITECTURES, BaseConfig


@dataclasses.dataclass(repr=False)
class RepeatedConfig(LoopedTransformerConfig):
    """The config of a HookedTransformer, with a layout in which some of its blocks repeat.

    Made by :meth:`of`. Fields of TransformerLens keep the original's values (``n_layers`` is the
    unrolled depth); those of the loop say that nothing happens between iterations.
    """

    @classmethod
    def of(cls, original: BaseConfig, layout: LoopLayout, n_params: int) -> "RepeatedConfig":
        """The config of ``original`` with another layout.

        Args:
            original: Of the model whose blocks repeat.
            layout: Of the looped model.
            n_params: Scalars of the original, which are all there are.
        """
        cfg = object.__new__(cls)
        for field in dataclasses.fields(LoopedTransformerConfig):
            if field.default is not dataclasses.MISSING:
                cfg.__dict__[field.name] = field.default
        cfg.__dict__.update(copy.copy(vars(original)))
        post_branch = cfg.original_architecture in POST_NORM_ARCHITECTURES
        sandwich = cfg.use_normalization_before_and_after
        cfg.block_norm = "post_branch" if post_branch else "sandwich" if sandwich else "pre"
        cfg.attn_bias = cfg.unembed_bias = True
        cfg.mlp_bias = not (cfg.attn_only or cfg.num_experts)
        cfg.n_params = n_params
        cfg._place(layout)
        return cfg

    def _place(self, layout: LoopLayout) -> None:
        self._layout = layout
        self.n_prelude, self.n_coda = layout.n_prelude, layout.n_coda
        self.n_iterations, self.n_layers = layout.n_iterations, layout.n_layers

    @property
    def layout(self) -> LoopLayout:
        """Coordinates and names of the unrolled blocks."""
        return self._layout

    @property
    def n_core(self) -> int:  # type: ignore[override]
        """Blocks in one iteration; refused where iterations differ."""
        return self._layout.n_core

    @n_core.setter
    def n_core(self, value: int) -> None:
        raise ConfigError(f"n_core follows from the layout, got {value}: call tl_loops.loop again")

    @property
    def branch_norms(self) -> tuple[str, str]:
        """Names of the norms behind the attention and behind the MLP, where there are any."""
        return ("ln1", "ln2") if self.block_norm == "post_branch" else ("ln1_post", "ln2_post")

    def set_iterations(self, n_iterations: SupportsIndex) -> None:
        """Set ``n_iterations`` and with it ``n_layers``.

        Raises:
            ConfigError: ``n_iterations`` is not an integer of at least 1.
            LoopedSemanticsError: The layout has several loops.
        """
        self._place(self._layout.with_iterations(whole_iterations(n_iterations)))

    def count_parameters(self) -> int:
        """Number of trained scalars, each physical weight counted once."""
        return int(self.n_params or 0)

    def to_dict(self) -> dict[str, Any]:
        """The fields; with several loops, ``segments`` says what ``n_core`` cannot."""
        if self._layout.segments is None:
            return super().to_dict()
        names = [f.name for f in dataclasses.fields(self) if f.name != "n_core"]
        segments = [dataclasses.astuple(segment) for segment in self._layout.segments]
        return {**{name: getattr(self, name) for name in names}, "segments": segments}

    def describe(self) -> str:
        """The data flow of one forward pass in a few lines."""
        layout, n_coda = self._layout, self.n_coda
        lines = [
            f"{self.model_name} {self.notation}, {self.n_params:,} parameters, all of the original",
            "embed    x = embedding of the original, with its positions",
        ]
        first = layout.n_prelude
        if first:
            lines.append(f"prelude  blocks 0 to {first - 1}")
        if layout.segments is not None:
            for name, segment in named_segments(layout.segments):
                lines.append(
                    _repeated(f"core {name}", segment.start, segment.stop, segment.n_iterations)
                )
            first = layout.segments[-1].stop
        else:
            lines.append(_repeated("core", first, first + layout.n_core, self.n_iterations))
            first += layout.n_core
        if n_coda:
            lines.append(f"coda     blocks {first} to {first + n_coda - 1}")
        lines.append("readout  logits = final norm and unembedding of the original")
        return "\n".join(lines)


def _repeated(name: str, start: int, stop: int, n_iterations: int) -> str:
    blocks = f"block {start}" if stop == start + 1 else f"blocks {start} to {stop - 1}"
    return f"{name:<8} {n_iterations} x [ {blocks} ]"
