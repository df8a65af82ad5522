"""Config fields as data: what each may hold, and what it says about a model."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from tl_loops.mechanisms.iteration_weights import MAX_ITERATIONS
from tl_loops.mechanisms.mechanism import Mechanism, Setting

Class = TypeVar("Class", bound=type)


def of_mechanisms(mechanisms: Iterable[Mechanism]) -> Callable[[Class], Class]:
    """A class decorator that adds the fields of mechanisms, under ``@dataclass``.

    The class's docstring gets their descriptions.
    """

    def add(cls: Class) -> Class:
        settings = [s for mechanism in mechanisms for s in mechanism.settings] + [MAX_ITERATIONS]
        lines = []
        for setting in settings:
            cls.__annotations__[setting.name] = setting.kind
            setattr(cls, setting.name, as_field(setting))
            lines.append(f"        {setting.name}: {setting.about}\n")
        documented = cls.__doc__ or ""
        at = documented.find("\n    Raises:")
        cls.__doc__ = documented[:at] + "".join(["\n", *lines])[1:] + documented[at:]
        return cls

    return add


def setting(
    default: Any, choices: tuple[Any, ...] | None = None, of_the_weights: bool = True
) -> Any:
    """A dataclass field that a class writes down itself; see :class:`Setting`."""
    named = Setting("", Any, default, "", choices, of_the_weights=of_the_weights)
    return as_field(named)


def as_field(setting: Setting) -> Any:
    """The dataclass field of a setting; its metadata hold the setting."""
    return dataclasses.field(default=setting.default, kw_only=True, metadata={"setting": setting})


def setting_of(field: dataclasses.Field) -> Setting | None:
    """The setting of a field of ours; ``None`` for a field of TransformerLens."""
    return field.metadata.get("setting")


OF_THIS_RUN = frozenset(("device", "n_params", "n_layers", "seed", "tokenizer_prepends_bos"))
"""Fields of TransformerLens that follow from others, or say nothing about the model."""

CHANGES_NO_NUMBER = frozenset(
    (
        "device",
        "n_devices",
        "n_iterations",
        "n_layers",
        "seed",
        "init_weights",
        "use_attn_result",
        "use_split_qkv_input",
        "use_hook_mlp_in",
        "use_attn_in",
        "ungroup_grouped_query_attention",
    )
)
"""Fields that change no number of a model, or that a run states itself."""

_SHAPES = frozenset(
    (
        "d_model",
        "d_head",
        "n_heads",
        "n_key_value_heads",
        "d_mlp",
        "d_vocab",
        "d_vocab_out",
        "n_layers",
        "gated_mlp",
        "normalization_type",
        "positional_embedding_type",
        "tie_word_embeddings",
        "post_embedding_ln",
    )
)
"""Fields of TransformerLens that stored tensors fix."""


def fixed_by_weights(cls: type) -> frozenset[str]:
    """The fields of a config class that stored tensors fix, so that a caller cannot choose them."""
    own = {
        field.name
        for field in dataclasses.fields(cls)
        if (setting := setting_of(field)) is not None and setting.of_the_weights
    }
    return _SHAPES | own
