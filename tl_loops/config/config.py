"""The architecture of a looped transformer as data."""

import dataclasses
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, SupportsIndex

import torch

from tl_loops.config.checks import check_values, whole_iterations
from tl_loops.config.describe import data_flow
from tl_loops.config.fields import of_mechanisms, setting
from tl_loops.config.ranges import check_depth
from tl_loops.config.readout import Readout
from tl_loops.config.types import check_types
from tl_loops.config.weights import physical_tensors
from tl_loops.errors import ConfigError, did_you_mean, shortened
from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.segments import Segment
from tl_loops.mechanisms import MECHANISMS, Mechanism
from tl_loops.mechanisms.iteration_weights import check_rows
from tl_loops.mechanisms.norm import OUTPUT_NORMED, SUM_NORMED
from tl_loops.upstream import BaseConfig


@dataclass(repr=False)
@of_mechanisms(MECHANISMS)
class LoopedTransformerConfig(BaseConfig):
    """A ``HookedTransformerConfig`` with the fields that describe the loop.

    All fields of the TransformerLens config keep their meaning; ``n_layers`` (the unrolled depth)
    follows from the sizes and need not be given. Defaults describe a Llama-style block (RMSNorm,
    rotary positions, gated SiLU MLP). The fields after ``padded_vocab`` are those of the
    mechanisms (:mod:`tl_loops.mechanisms`).

    Attributes:
        n_prelude: Blocks before the loop.
        n_core: Blocks in one iteration of the loop.
        n_coda: Blocks after the loop.
        n_iterations: Passes through the core.
        block_norm: Where a block normalises. ``"pre"``: the branch inputs (Llama).
            ``"sandwich"``: pre-norm, plus a norm on each branch's output before the add (Ouro).
            ``"post_residual"``: pre-norm, plus a norm on the sum after each add (Huginn).
            ``"post_branch"``: only the branch outputs (OLMo-2). ``"post_norm"``: only the sum
            after each add (the original and the Universal Transformer). ``"stream"``: the stream
            itself before each branch, which is added to the normed stream, and its output (Dory).
        block_norm_weight: Whether the norms of blocks have gains, where norms have any.
        norm_between_iterations: The final norm is applied to the state after every iteration
            (Ouro). Without a coda the last of these is the final norm itself.
        own_norm_between_iterations: With ``norm_between_iterations``, the norm after every
            iteration is one without a gain, and not the final norm (IFM's Huginn-Linear).
        norm_before_coda: The final norm is also applied once between core and coda (Huginn).
        final_norm: Whether the final norm is applied; without it what leaves the last block is read
            out as it is (HRM).
        rotary_layout: ``"half"`` pairs dimension i with i + d/2, ``"interleaved"`` 2i with 2i + 1.
        rotary_reversed: Queries and keys are rotated by the negative angle (nanochat).
        rotary_table_dtype: Cosines and sines are rounded to this type, e.g. ``"bfloat16"``
            (nanochat), before they are used in float32; ``None``: not rounded.
        qk_norm: Norm of queries and keys. ``"full"``: over the whole projection with a weight,
            before heads are split and rotated (OLMo-2). ``"head"``: weightless per head, after
            the rotation (Parcae). ``"head_weight"``: per head with a weight that all heads share,
            before the rotation (Qwen3); weightless where norms have no weights (Dory).
        qk_bias: Queries and keys have a bias (``b_Q``, ``b_K``), added before the rotation.
        value_bias: Values have a bias (``b_V``), with ``qk_bias`` as in Qwen2.
        attn_bias: Queries, keys, values and the attention output have biases.
        mlp_bias: The MLP has biases (``b_in``, ``b_out``).
        unembed_bias: The unembedding has a bias (``b_U``).
        embed_scale: Factor on the token embedding.
        padded_vocab: Token ids from this one on are padding of the vocabulary; ``None``: none are.

    Raises:
        ConfigError: A field is missing, out of range, contradicts another one, or asks for
            something that is not supported; the message names it and what to use instead.
    """

    n_layers: int = field(default=-1, kw_only=True)
    n_prelude: int = setting(0, at_least=0)
    n_core: int = setting(1, at_least=1)
    n_coda: int = setting(0, at_least=0)
    n_iterations: int = setting(1, of_the_weights=False, at_least=1)
    block_norm: str = setting(
        "pre", choices=("pre", "sandwich", "post_residual", "post_branch", "post_norm", "stream")
    )
    block_norm_weight: bool = setting(True)
    norm_between_iterations: bool = setting(False, of_the_weights=False)
    own_norm_between_iterations: bool = setting(False, of_the_weights=False)
    norm_before_coda: bool = setting(False, of_the_weights=False)
    final_norm: bool = setting(True)
    rotary_layout: str = setting("half", choices=("half", "interleaved"), of_the_weights=False)
    rotary_reversed: bool = setting(False, of_the_weights=False)
    rotary_table_dtype: str | None = setting(
        None, choices=(None, "bfloat16", "float16"), of_the_weights=False
    )
    qk_norm: str | None = setting(None, choices=(None, "full", "head", "head_weight"))
    qk_bias: bool = setting(False)
    value_bias: bool = setting(False)
    attn_bias: bool = setting(False)
    mlp_bias: bool = setting(False)
    unembed_bias: bool = setting(False)
    embed_scale: float = setting(1.0, of_the_weights=False)
    padded_vocab: int | None = setting(None, of_the_weights=False, at_least=1)
    # Llama-style values for fields that TransformerLens defaults to GPT-2's.
    act_fn: str | None = "silu"
    gated_mlp: bool = True
    normalization_type: str | None = "RMS"
    positional_embedding_type: str = "rotary"
    eps: float = 1e-6
    segments: ClassVar[Any] = None  # of SegmentedConfig alone

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The fields that mechanisms add."""

    def __post_init__(self) -> None:
        check_values(self)
        check_depth(self._depth(self.n_iterations))
        try:
            layout = self.layout
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if self.n_layers not in (-1, layout.n_layers):
            raise ConfigError(
                f"n_layers={self.n_layers} contradicts n_prelude + n_iterations * n_core + n_coda "
                f"= {layout.n_layers}; leave n_layers out"
            )
        self.n_layers = layout.n_layers
        if self.max_iterations is None and any(m.has_rows(self) for m in self.mechanisms):
            self.max_iterations = self.n_iterations
        if self.n_key_value_heads == self.n_heads:
            self.n_key_value_heads = None
        # The base class accepts its own activation functions alone; ours were checked above.
        act_fn, self.act_fn = self.act_fn, "relu"
        super().__post_init__()
        self.act_fn = act_fn
        self.n_params = self.count_parameters()

    def _depth(self, n_iterations: int) -> int:
        return self.n_prelude + n_iterations * self.n_core + self.n_coda

    @property
    def layout(self) -> LoopLayout:
        """Coordinates and names of the unrolled blocks."""
        stacks = None
        if self.stacks is not None:
            stacks = self.stacks * (self.n_iterations // len(self.stacks))
        sizes = self.n_prelude, self.n_core, self.n_coda, self.n_iterations
        return LoopLayout(*sizes, stacks, self.shared_stacks, self.layer_repeats)

    @property
    def slow_stack(self) -> str | None:
        """The stack whose state is read out; ``None`` without ``stacks``."""
        return None if self.stacks is None else self.stacks[-1]

    @property
    def notation(self) -> str:
        """The paper's notation, e.g. ``"(2, 4⊗8, 2)_I"`` (2604.11791, section 3)."""
        return self.layout.notation(injected=self.injection is not None)

    @property
    def n_physical_layers(self) -> int:
        """Number of distinct sets of block weights; does not grow with the iterations."""
        return self.layout.n_physical_layers

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """What the loop does besides running its core, from the core outwards."""
        return tuple(mechanism for mechanism in MECHANISMS if mechanism.active(self))

    @property
    def readout(self) -> Readout:
        """What ends an iteration, and what stands between the loop and the logits."""
        return Readout.of(self)

    @property
    def carried(self) -> tuple[str, ...]:
        """What goes from an iteration to the next besides the state (and the injection)."""
        return tuple(what for m in self.mechanisms if (what := m.carries(self)) is not None)

    @property
    def state_is_whole(self) -> bool:
        """Whether the state (with the injection) is all that goes from an iteration to the next.

        Where it is not, a run cannot start in the middle of the loop; ``carried`` says what else.
        """
        return not self.carried

    @property
    def own_keys(self) -> str | None:
        """Why iterations cannot share keys and values (``kv_sharing``); ``None``: they can."""
        if self.segments is not None:
            return (
                "for models of one loop: iterations of different loops run different layers, so "
                "they have no keys in common"
            )
        for mechanism in self.mechanisms:
            if mechanism.own_keys is not None:
                return f"excluded by {mechanism.name}: {mechanism.own_keys}"
        return None

    @property
    def norms_outputs(self) -> bool:
        """Whether a norm stands between a branch and the add."""
        return self.block_norm in OUTPUT_NORMED

    @property
    def norms_sums(self) -> bool:
        """Whether a norm stands after each add, on the sum."""
        return self.block_norm in SUM_NORMED

    @property
    def branch_norms(self) -> tuple[str, str]:
        """Names of the norms after the attention and after the MLP, where there are any."""
        return "ln1_post", "ln2_post"

    @property
    def norm_has_weight(self) -> bool:
        """Whether norms carry a trained gain (``"RMS"``, ``"LN"``) or not (``"...Pre"``)."""
        return self.normalization_type in ("RMS", "LN")

    def set_iterations(self, n_iterations: SupportsIndex) -> None:
        """Set ``n_iterations`` and with it ``n_layers``.

        Raises:
            ConfigError: ``n_iterations`` is not an integer of at least 1.
        """
        n_iterations = whole_iterations(n_iterations)
        for mechanism in self.mechanisms:
            mechanism.check_iterations(self, n_iterations)
        check_rows(self, self.mechanisms, n_iterations)
        check_depth(self._depth(n_iterations))
        layout = self.layout.with_iterations(n_iterations)
        self.n_iterations, self.n_layers = n_iterations, layout.n_layers

    def count_parameters(self) -> int:
        """Number of trained scalars, each physical weight counted once."""
        return sum(math.prod(tensor.shape) for tensor in physical_tensors(self).values())

    def describe(self) -> str:
        """The data flow of one forward pass, and all else that decides its numbers.

        Two configs that compute something else from the same weights and input are never described
        alike. A line is for a part: embedding, prelude, core, coda, readout, block, mechanisms,
        norms, attention, positions, MLP, sizes.
        """
        return data_flow(self)

    def set_seed_everywhere(self, seed: int) -> None:
        """Leave the global random state alone: ``seed`` feeds the model's own generator."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as a new dictionary; ``from_dict(to_dict())`` gives an equal config."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "LoopedTransformerConfig":
        """Build a config from a dictionary of fields; with ``segments`` a :class:`SegmentedConfig`.

        Raises:
            ConfigError: A key is not a field (near matches are suggested), a required one is
                missing, or a value is of another type than its field.
        """
        if cls is LoopedTransformerConfig and config_dict.get("segments") is not None:
            return SegmentedConfig.from_dict(config_dict)
        names = [f.name for f in dataclasses.fields(cls)]
        for key in config_dict:
            if key not in names:
                hint = did_you_mean(key, names, "see LoopedTransformerConfig")
                raise ConfigError(f"unknown config field {key!r}; {hint}")
        required = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        missing = [name for name in required if name not in config_dict]
        if missing:
            raise ConfigError(f"config lacks the required field(s) {', '.join(missing)}")
        lists = {key: tuple(v) for key, v in config_dict.items() if isinstance(v, list)}
        fields = {**config_dict, **lists}  # JSON has no tuples
        check_types(cls, fields)
        return cls(**fields)

    @property
    def between_blocks(self) -> tuple[str, ...]:
        """The settings of what does something where prelude, loop and coda meet."""
        acts = [
            mechanism.said(self)
            for mechanism in self.mechanisms
            if mechanism.phrases(self) or type(mechanism).part is not Mechanism.part
        ]
        if self.initial_state == "embed":  # The state before the loop is the stream itself.
            acts.remove("initial_state")
        norms = ("norm_between_iterations", "norm_before_coda")
        return *acts, *(name for name in norms if getattr(self, name))

    def __repr__(self) -> str:
        return f"{type(self).__name__}:\n{self.describe()}"


@dataclass(repr=False)
class SegmentedConfig(LoopedTransformerConfig):
    """A looped transformer with several loops, one after the other.

    Between prelude, loops and coda stands nothing but blocks. ``n_prelude`` and ``n_iterations``
    (of all loops together) follow from the segments and need not be given; ``n_core`` is no field,
    and there is one only where all iterations run equally many blocks.

    Attributes:
        segments: ``(start, stop, n_iterations)`` of each loop and of the blocks between two loops,
            which run once: in order and without gaps.

    Raises:
        ConfigError: As :class:`LoopedTransformerConfig`; or the segments do not follow each other,
            or something would stand between them.
    """

    segments: Any = field(default=(), kw_only=True)
    n_core: ClassVar[int]  # pyright: ignore  # a field of the base, here it follows

    def __post_init__(self) -> None:
        try:
            parts = [Segment(*map(operator.index, part)) for part in self.segments]
            depth = sum(part.n_layers * part.n_iterations for part in parts)
            check_depth(depth, f"segments={self.segments}: the sum of layers * iterations")
            self._layout = layout = LoopLayout.of_segments(parts, self.n_coda)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"segments={shortened(self.segments)} do not fit: {error}") from error
        self.segments = tuple(map(dataclasses.astuple, parts))
        for name, default in (("n_prelude", 0), ("n_iterations", 1)):
            given, follows = getattr(self, name), getattr(layout, name)
            if given not in (default, follows):
                raise ConfigError(f"{name}={given} contradicts segments, which give {follows}")
            setattr(self, name, follows)
        super().__post_init__()
        if self.between_blocks:
            raise ConfigError(
                f"{', '.join(self.between_blocks)} cannot be with segments: several loops have "
                "nothing but blocks between them"
            )

    def _depth(self, n_iterations: int) -> int:
        return self._layout.n_layers

    @property
    def layout(self) -> LoopLayout:
        """Coordinates and names of the unrolled blocks."""
        return self._layout

    @property
    def n_core(self) -> int:
        """Blocks in one iteration.

        Raises:
            LoopedSemanticsError: Iterations differ.
        """
        return self._layout.n_core

    def set_iterations(self, n_iterations: SupportsIndex) -> None:
        """Take the number that there is.

        Raises:
            ConfigError: ``n_iterations`` is not an integer of at least 1.
            LoopedSemanticsError: Another number, which does not say of which loop.
        """
        self._layout.with_iterations(whole_iterations(n_iterations))


def with_layout(fields: Mapping[str, Any], layout: LoopLayout) -> dict[str, Any]:
    """The fields of a config with another layout of its blocks.

    Args:
        fields: Of a config of one loop.
        layout: Of as many physical layers.
    """
    given = {**fields, "n_coda": layout.n_coda}
    for name in ("n_layers", "n_prelude", "n_core", "n_iterations"):
        given.pop(name, None)
    if layout.segments is not None:
        return given | {"segments": tuple(map(dataclasses.astuple, layout.segments))}
    names = ("n_prelude", "n_core", "n_iterations")
    return given | {name: getattr(layout, name) for name in names}


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` for ``torch.float32``: the form that JSON can hold."""
    return str(dtype).removeprefix("torch.")
