"""What a family is: which checkpoints it recognises, and how their fields and tensors map."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import CheckpointError, shortened

View = Callable[[Tensor], Tensor]
Shape = tuple[int, ...]
Empty = Callable[[Shape, torch.dtype, torch.device | str | None], Tensor]
Released = Mapping[str, Any]
"""The content of a released ``config.json``."""

Table = Literal["cos and sin", "cos", "sin"]
"""What a stored rotary table [1, pos, 1, pair(, 2)] holds."""

_REQUIRED = object()

_ABOVE_ZERO = frozenset(
    "d_model d_head d_mlp d_vocab n_heads n_key_value_heads n_ctx n_core "
    "rotary_base rotary_scaling_factor".split()
)
"""Config fields that mean nothing at 0."""

_LONGEST = 400
"""Characters of a problem that a message shows: files may hold values of any length."""

_MOST = 2**31 - 1
_LARGEST = 3e38
"""The largest integer and float that any field may have: what 32 bits hold."""

COMMON_FLAGS: dict[str, tuple[Any, ...]] = {
    "quantization_config": (),
    "quantization": (),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_softcap": (),
    "partial_rotary_factor": (1.0,),
    "clip_qkv": (),
    "pretraining_tp": (1,),
}
"""Flags that change the mathematics in any family, with the values that are implemented."""

_TRAINING, _FORM, _IDS = "training only", "form of the output", "generation and tokenizers only"
_NAME, _STORED = "a name", "the type is chosen at loading"

COMMON_WITHOUT_EFFECT: dict[str, str] = {
    **dict.fromkeys(("attention_dropout", "dropout", "initializer_range"), _TRAINING),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict"), _FORM),
    **dict.fromkeys(("id2label", "label2id", "problem_type"), "of classifiers"),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _IDS),
    **dict.fromkeys(("dtype", "torch_dtype"), _STORED),
    **dict.fromkeys(("_name_or_path", "transformers_version", "auto_map"), _NAME),
    **dict.fromkeys(("use_cache", "chunk_size_feed_forward"), "changes no number"),
    "is_encoder_decoder": "no encoder in any family",
}
"""Keys of any ``config.json`` that change no number, with the reason."""


@dataclass(frozen=True)
class Field:
    """Where a field of :class:`LoopedTransformerConfig` stands in ``config.json``.

    Attributes:
        keys: Names it may have there; the first that is present and not null counts.
        kind: ``int``, ``float``, ``bool`` or ``str``.
        default: Its value where no key is present; without it the field is required.
    """

    keys: tuple[str, ...]
    kind: type
    default: Any = _REQUIRED


def read(*keys: str, kind: type = int, default: Any = _REQUIRED) -> Field:
    """A :class:`Field` under one or several names."""
    return Field(keys, kind, default)


def row_major(shape: Shape, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """An uninitialised tensor with the usual strides."""
    return torch.empty(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class Part:
    """Some rows of a stored tensor that become one physical weight.

    Attributes:
        name: Physical name, e.g. ``"core.0.attn.W_Q"``.
        rows: How many rows of the stored tensor it takes, counted from the end of the part before.
        view: Turns these rows in memory into the physical weight, without a copy.
        empty: Allocates the memory that they are read into, for a shape, type and device.
    """

    name: str
    rows: int
    view: View
    empty: Empty = row_major


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a checkpoint must hold: its key, its shape, and what it becomes.

    Attributes:
        key: Its key.
        shape: Its shape.
        parts: The weights that it becomes.
        groups: Its rows come in so many groups, each with some rows of every part in turn.
        turned: A matrix is stored as ``[in, out]``: the rows of the parts are its columns.
    """

    key: str
    shape: Shape
    parts: tuple[Part, ...]
    groups: int = 1
    turned: bool = False


@dataclass(frozen=True)
class KnownModel:
    """A checkpoint that loads by name.

    Attributes:
        name: Its repository on the Hugging Face hub, or the name of the packaged model.
        aliases: Short names.
        released: The fields of its ``config.json`` that matter, for listing it without network.
            Loading reads the file itself.
        unverified: Those of them that were not seen in the released file.
        silent: Fields that its ``config.json`` does not hold, for loading it by name.
        packaged: Its directory inside the package, where it ships with tl_loops.
        pickled: Whether its repository holds the weights as pickles, as far as is known.
    """

    name: str
    aliases: tuple[str, ...] = ()
    released: Released = field(default_factory=dict)
    unverified: tuple[str, ...] = ()
    silent: Released = field(default_factory=dict)
    packaged: str | None = None
    pickled: bool = False


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one model family are read.

    Attributes:
        name: Short name, e.g. ``"ouro"``.
        paper: Where the architecture is described.
        model_types: Values of ``model_type`` in ``config.json``.
        architectures: Values in the list ``architectures`` there; the first is what
            ``cfg.original_architecture`` says where the list is missing.
        fields: Config fields that are read from ``config.json``.
        fixed: Config fields that are the same for the whole family.
        flags: Keys that may be absent or null, or have one of these values; others raise.
        without_effect: Further keys that the reference knows and that change no number of a
            forward pass, with the reason. Every key that a reference reads is read here, in
            ``flags``, or in this list.
        derive: Further config fields from ``config.json``; raises CheckpointError.
        tensors: What a checkpoint must hold for a config.
        has_tensors: Tells from the keys of the stored tensors whether they are of this family,
            for families that share a model type.
        ignored: Keys of stored tensors that are no weights; ``*`` stands for anything.
        spellings: Other beginnings of stored keys, each with the one that ``tensors`` has for it:
            older names of a part, a wrapper around the model.
        tables: Keys of stored rotary tables, which the original rotates by: they must be those
            that the config gives.
        tied: Keys of the unembedding and of the embedding: where the config ties them, a
            checkpoint may repeat the embedding under the first.
        known: Checkpoints that load by name.
        signs: Tells from the content of ``config.json`` that it is of this family, for families
            whose files carry no model type.
        spread: Gives the content of ``config.json`` with all fields at the top, for families that
            nest them.
        feedforward: Whether the model has no loop of its own, so that loading may give it one.
    """

    name: str
    paper: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    fields: Mapping[str, Field]
    fixed: Mapping[str, Any]
    flags: Mapping[str, tuple[Any, ...]]
    derive: Callable[[Released], dict[str, Any]]
    tensors: Callable[[LoopedTransformerConfig], Iterable[TensorSpec]]
    has_tensors: Callable[[Collection[str]], bool] | None = None
    without_effect: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    tables: Mapping[str, Table] = field(default_factory=dict)
    tied: tuple[str, str] | None = None
    known: tuple[KnownModel, ...] = ()
    signs: Callable[[Released], bool] | None = None
    spread: Callable[[Released], Released] | None = None
    feedforward: bool = False

    def matches(self, released: Released) -> bool:
        """Whether ``config.json`` names this family by model type or architecture."""
        architectures = released.get("architectures")
        named = architectures if isinstance(architectures, list) else []
        return (
            released.get("model_type") in self.model_types
            or any(architecture in self.architectures for architecture in named)
            or (self.signs is not None and self.signs(released))
        )

    def ignores(self, key: str) -> bool:
        """Whether a stored tensor is no weight."""
        return any(fnmatchcase(key, pattern) for pattern in self.ignored)

    def spelled(self, key: str) -> str:
        """A stored key as :attr:`tensors` spells it."""
        for found, expected in self.spellings:
            if key.startswith(found):
                return expected + key.removeprefix(found)
        return key

    def config_fields(self, released: Released, where: str) -> dict[str, Any]:
        """The fields of :class:`LoopedTransformerConfig` that a ``config.json`` gives.

        Args:
            released: Content of the file.
            where: The file, for messages.

        Raises:
            CheckpointError: Fields are missing, of the wrong type, or ask for mathematics that is
                not implemented; all of them are named at once.
        """
        if self.spread is not None:
            try:
                released = self.spread(released)
            except CheckpointError as problem:
                raise CheckpointError(f"{where}: {problem}") from None
        problems = [
            _flag_problem(key, released[key], allowed)
            for key, allowed in {**COMMON_FLAGS, **self.flags}.items()
            if released.get(key) is not None and not _among(released[key], allowed)
        ]
        values: dict[str, Any] = {}
        for target, source in self.fields.items():
            try:
                values[target] = _value(source, released, target in _ABOVE_ZERO)
            except CheckpointError as problem:
                problems.append(str(problem))
        if not problems:
            try:
                found = {**self.fixed, **values, **self.derive(released)}
            except CheckpointError as problem:
                problems.append(str(problem))
            else:
                problems += [
                    f"the fields give {name} = {shortened(found[name])}, expected a number above 0 "
                    f"and at most {_MOST if isinstance(found[name], int) else _LARGEST:,}"
                    for name in sorted(_ABOVE_ZERO & found.keys())
                    if isinstance(found[name], (int, float)) and not _in_range(found[name], True)
                ]
                if not problems:
                    return found
        lines = "".join(f"\n  {problem[:_LONGEST]}" for problem in problems)
        raise CheckpointError(f"{where} cannot be read as a config of family {self.name}:{lines}")


def _value(source: Field, released: Released, above_zero: bool) -> Any:
    key = next((key for key in source.keys if released.get(key) is not None), None)
    if key is None:
        if source.default is _REQUIRED:
            raise CheckpointError(
                f"the required field {' or '.join(map(repr, source.keys))} is missing"
            )
        return source.default
    return checked(key, released[key], source.kind, above_zero)


def checked(key: str, value: Any, kind: type, above_zero: bool = False) -> Any:
    """``value`` as ``kind``; an integer is accepted where a float is wanted.

    Args:
        key: Its name in messages.
        value: What ``config.json`` says.
        kind: ``int``, ``float``, ``bool`` or ``str``.
        above_zero: Whether a number must be above 0, not only at least 0.

    Raises:
        CheckpointError: It is of another type, negative, not finite, or absurdly large.
    """
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        fits = True
    if not fits:
        raise CheckpointError(f"{key!r} must be of type {kind.__name__}, found {shortened(value)}")
    if kind in (int, float) and not _in_range(value, above_zero):
        least = "above 0" if above_zero else "of at least 0"
        raise CheckpointError(
            f"{key!r} must be a number {least} and at most "
            f"{_MOST if kind is int else _LARGEST:,}, found {shortened(value)}"
        )
    return float(value) if kind is float else value


def _in_range(value: int | float, above_zero: bool) -> bool:
    most = _MOST if isinstance(value, int) else _LARGEST
    return value <= most and (value > 0 if above_zero else value >= 0)


def _among(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(type(value) is type(a) and value == a for a in allowed) or (
        # 0 and 0.0 are the same number, but 0 and False are not the same flag.
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and any(not isinstance(a, (bool, str)) and value == a for a in allowed)
    )


def _flag_problem(key: str, value: Any, allowed: tuple[Any, ...]) -> str:
    expected = " or ".join(map(repr, allowed)) if allowed else "its absence"
    return f"{key!r} is {shortened(value)}, which is not implemented; expected {expected}"


def as_is(stored: Tensor) -> Tensor:
    """The stored tensor itself: embeddings, norms, biases."""
    return stored


def transposed(stored: Tensor) -> Tensor:
    """``[out, in]`` as ``[in, out]``."""
    return stored.T


def heads_in(d_head: int) -> View:
    """View ``[head * d_head, d_model]`` as ``[head, d_model, d_head]`` (W_Q, W_K, W_V)."""
    return lambda stored: stored.view(-1, d_head, stored.shape[1]).transpose(1, 2)


def heads_out(d_head: int) -> View:
    """View ``[d_model, head * d_head]`` as ``[head, d_head, d_model]`` (W_O)."""
    return lambda stored: stored.T.unflatten(0, (-1, d_head))


def head_bias(d_head: int) -> View:
    """View ``[..., head, d_head]`` or ``[head * d_head]`` as ``[head, d_head]``."""
    return lambda stored: stored.view(-1, d_head)


def whole(key: str, shape: Shape, name: str, view: View = as_is) -> TensorSpec:
    """A stored tensor that is one physical weight."""
    return TensorSpec(key, shape, (Part(name, shape[0], view),))


def fused(key: str, n_in: int, *parts: Part, groups: int = 1) -> TensorSpec:
    """A stored ``[out, n_in]`` matrix whose rows are those of several weights, in order."""
    return TensorSpec(key, (sum(part.rows for part in parts), n_in), parts, groups)


def fused_bias(key: str, *parts: Part, groups: int = 1) -> TensorSpec:
    """A stored vector that holds several biases, in order."""
    return TensorSpec(key, (sum(part.rows for part in parts),), parts, groups)


def turned(key: str, n_in: int, *parts: Part) -> TensorSpec:
    """A stored ``[n_in, out]`` matrix whose columns are those of several weights, in order."""
    return TensorSpec(key, (n_in, sum(part.rows for part in parts)), parts, turned=True)
