"""The config of a HookedTransformer some of whose blocks repeat."""

import copy
import dataclasses
from typing import Any, SupportsIndex

from tl_loops.config.checks import UNSUPPORTED, whole_iterations
from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.config.describe_parts import block, embedding, parts, unembedding
from tl_loops.config.fields import computing
from tl_loops.config.ranges import check_depth
from tl_loops.errors import ConfigError
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.segments import Segment, named_segments
from tl_loops.upstream import POST_NORM_ARCHITECTURES, BaseConfig
from tl_loops.upstream.config_fields import DETAILS_OF_THE_UNSUPPORTED


@dataclasses.dataclass(repr=False, eq=False)
class RepeatedConfig(LoopedTransformerConfig):
    """The config of a HookedTransformer, with a layout in which some of its blocks repeat.

    Fields of TransformerLens keep the original's values (``n_layers`` is the unrolled depth); those
    of the loop say that nothing happens between iterations.

    Attributes:
        segments: With several loops, ``(start, stop, n_iterations)`` of each and of the blocks
            between them, in order; ``None``: one loop.

    Raises:
        ConfigError: The sizes or segments do not fit.
    """

    segments: Any = dataclasses.field(default=None, kw_only=True)

    @classmethod
    def of(cls, original: BaseConfig, layout: LoopLayout, n_params: int) -> "RepeatedConfig":
        """The config of ``original`` with another layout.

        Args:
            original: Of the model whose blocks repeat.
            layout: Of the looped model.
            n_params: Scalars of the original, which are all there are.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        given = copy.copy(vars(original))
        post_branch = given.get("original_architecture") in POST_NORM_ARCHITECTURES
        sandwich = given.get("use_normalization_before_and_after")
        given |= dict(
            block_norm="post_branch" if post_branch else "sandwich" if sandwich else "pre",
            attn_bias=True,
            unembed_bias=True,
            rotary_layout="interleaved" if given.get("rotary_adjacent_pairs") else "half",
            mlp_bias=not (given.get("attn_only") or given.get("num_experts")),
            n_params=n_params,
            n_prelude=layout.n_prelude,
            n_coda=layout.n_coda,
            n_iterations=layout.n_iterations,
        )
        if layout.segments is None:
            given["n_core"] = layout.n_core
        else:
            given["segments"] = tuple(dataclasses.astuple(part) for part in layout.segments)
        cfg = cls(**{name: value for name, value in given.items() if name in names})
        for name in given.keys() - names:  # TransformerLens may keep more than its fields.
            setattr(cfg, name, given[name])
        return cfg

    def __post_init__(self) -> None:
        # The fields are those of a model that exists: there is nothing to check but the layout.
        try:
            if self.segments is None:
                sizes = (self.n_prelude, self._given_n_core, self.n_coda, self.n_iterations)
                self._place(LoopLayout(*sizes))
            else:
                self.segments = tuple(tuple(part) for part in self.segments)
                parts = [Segment(*part) for part in self.segments]
                self._place(LoopLayout.of_segments(parts, self.n_coda))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the loops do not fit: {error}") from error

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.to_dict() == other.to_dict()

    def _place(self, layout: LoopLayout) -> None:
        self._layout = layout
        self.n_prelude, self.n_coda = layout.n_prelude, layout.n_coda
        self.n_iterations, self.n_layers = layout.n_iterations, layout.n_layers

    @property
    def layout(self) -> LoopLayout:
        """Coordinates and names of the unrolled blocks."""
        return self._layout

    @property
    def n_core(self) -> int:  # pyright: ignore  # a field of the base, here it follows
        """Blocks in one iteration.

        Raises:
            LoopedSemanticsError: Iterations differ.
        """
        return self._layout.n_core

    @n_core.setter
    def n_core(self, value: int) -> None:
        if "_layout" in vars(self):
            raise ConfigError(
                f"n_core follows from the layout, got {value}: call tl_loops.loop again"
            )
        self._given_n_core = value

    @property
    def own_keys(self) -> str:
        """Why iterations cannot share keys and values (``kv_sharing``)."""
        return (
            "an option of LoopedTransformer: the blocks of a looped HookedTransformer are "
            "TransformerLens's own, which know one cache entry per block"
        )

    @property
    def branch_norms(self) -> tuple[str, str]:
        """Names of the norms after the attention and after the MLP, where there are any."""
        return ("ln1", "ln2") if self.block_norm == "post_branch" else ("ln1_post", "ln2_post")

    def set_iterations(self, n_iterations: SupportsIndex) -> None:
        """Set ``n_iterations`` and with it ``n_layers``.

        Raises:
            ConfigError: ``n_iterations`` is not an integer of at least 1.
            LoopedSemanticsError: The layout has several loops.
        """
        n_iterations = whole_iterations(n_iterations)
        if self.segments is None:
            check_depth(self._depth(n_iterations))
        self._place(self._layout.with_iterations(n_iterations))

    def count_parameters(self) -> int:
        """Number of trained scalars, each physical weight counted once."""
        return int(self.n_params or 0)

    def to_dict(self) -> dict[str, Any]:
        """The fields; with several loops, ``segments`` says what ``n_core`` cannot."""
        names = [field.name for field in dataclasses.fields(self)]
        if self.segments is not None:
            names.remove("n_core")
        return {name: getattr(self, name) for name in names}

    def describe(self) -> str:
        """The data flow of one forward pass in a few lines."""
        layout, n_coda = self._layout, self.n_coda
        lines = [
            f"{self.model_name} {self.notation}, {self.n_params:,} parameters, all of the original",
            f"embed    x = {embedding(self)}",
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
        final = "x" if self.normalization_type is None else "ln_final(x)"
        lines.append(f"readout  logits = {unembedding(self, final)}")
        lines += [f"block    {self._block()}", *parts(self)]
        also = [f"{name}={value!r}" for name, value in self._further().items()]
        return "\n".join([*lines, *([f"also     {', '.join(also)}"] if also else [])])

    def _block(self) -> str:
        """A block of the original as formulas."""
        if self.attn_only:
            return block(self).partition(";")[0]
        said = block(self)
        return said.replace("_post", "") if self.block_norm == "post_branch" else said

    def _further(self) -> dict[str, Any]:
        """What decides the numbers and no config of a looped transformer may have."""
        fields = {field.name: field for field in dataclasses.fields(self)}
        further = DETAILS_OF_THE_UNSUPPORTED | UNSUPPORTED.keys()
        names = [name for name in computing(type(self)) if name in further]
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value != fields[name].default}


def _repeated(name: str, start: int, stop: int, n_iterations: int) -> str:
    blocks = f"block {start}" if stop == start + 1 else f"blocks {start} to {stop - 1}"
    return f"{name:<8} {n_iterations} x [ {blocks} ]"
