"""Methods of HookedTransformer that assume distinct blocks: exact ones, or errors."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.errors import LoopedSemanticsError
from tl_loops.model.start import start_run
from tl_loops.upstream import USE_DEFAULT_VALUE, KeyValueCache, LocallyOverridenDefaults

_BLOCK = re.compile(r"^blocks\.(\d+)\.(.+)$")
_FINAL_NORM = re.compile(r"^(?:iter\.\d+\.norm|ln_coda)\.(.+)$")

StateDict = dict[str, Tensor]


_PROCESSING = (
    "works on a state dict with weights of its own for every block, but here blocks share them: "
)

NOT_SUPPORTED: dict[str, str] = {
    "fold_layer_norm": f"{_PROCESSING}call model.process_weights_(fold_ln=True)",
    "fold_value_biases": f"{_PROCESSING}call model.process_weights_(fold_value_biases=True)",
    "center_writing_weights": (
        f"{_PROCESSING}leave it out; where it is exact it changes no output"
    ),
    "center_unembed": (
        f"{_PROCESSING}take logits - logits.mean(-1, keepdim=True), which is the same"
    ),
    "refactor_factored_attn_matrices": (
        "is not exact with rotary positions or a query-key norm; read the circuits from model.QK "
        "and model.OV instead"
    ),
    "fill_missing_keys": (
        f"{_PROCESSING}call model.load_physical_state_dict, which names what is missing"
    ),
    "load_sample_training_dataset": (
        "is not supported, as TransformerLens knows no sample of this model's training data: set "
        "model.dataset to rows with a 'text' field, and sample_datapoint() draws from it"
    ),
}
"""Methods of HookedTransformer that raise on a looped model: their name, why and what instead."""

Class = TypeVar("Class", bound=type)


def without_unsupported(cls: Class) -> Class:
    """Give a class of models a method that raises for every entry of ``NOT_SUPPORTED``."""
    for name, sentence in NOT_SUPPORTED.items():
        setattr(cls, name, _raising(name, sentence))
    return cls


def _raising(name: str, sentence: str) -> Callable[..., NoReturn]:
    def method(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise LoopedSemanticsError(f"{name} {sentence}")

    method.__name__ = name
    method.__doc__ = f"Raises LoopedSemanticsError: {name} {sentence}."
    return method


def load_and_process_state_dict(
    self: Any,
    state_dict: StateDict,
    fold_ln: bool = True,
    center_writing_weights: bool = True,
    center_unembed: bool = True,
    fold_value_biases: bool = True,
    refactor_factored_attn_matrices: bool = False,
) -> None:
    """Load weights and process them as ``process_weights_`` does.

    Args:
        self: The looped model.
        state_dict: ``state_dict()`` or ``physical_state_dict()`` of a model of this
            architecture; of the former, with any number of iterations.
        fold_ln: As for ``process_weights_``.
        center_writing_weights: Likewise.
        center_unembed: Likewise.
        fold_value_biases: Likewise.
        refactor_factored_attn_matrices: Not supported.

    Raises:
        ValueError: Names are missing or unexpected, shapes differ, or blocks that share their
            weights in this model differ; nothing is then loaded.
        LoopedSemanticsError: ``refactor_factored_attn_matrices=True``.
    """
    if refactor_factored_attn_matrices:
        self.refactor_factored_attn_matrices(state_dict)
    self.load_physical_state_dict(physical_entries(self, state_dict))
    self.process_weights_(
        fold_ln=fold_ln,
        center_writing_weights=center_writing_weights,
        center_unembed=center_unembed,
        fold_value_biases=fold_value_biases,
    )


def check_fits(model: Any, state_dict: Mapping[str, Tensor], strict: bool) -> None:
    """Raise for a state dict that would be loaded in part, or to iterations that differ.

    Raises:
        RuntimeError: Names are missing or unexpected (with ``strict``), shapes differ, or entries
            of one shared weight do; as torch raises it.
    """
    own = model.state_dict()
    problems = [
        f"size mismatch for {name}: expected {tuple(own[name].shape)}, got {tuple(tensor.shape)}"
        for name, tensor in state_dict.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if strict:
        problems += [f"missing key {name!r}" for name in own if name not in state_dict]
        problems += [f"unexpected key {name!r}" for name in state_dict if name not in own]
    if problems:
        shown = "; ".join(problems[:12]) + (" ..." if len(problems) > 12 else "")
        raise RuntimeError(f"the state dict does not fit, nothing was loaded: {shown}")
    try:
        physical_entries(model, {name: x for name, x in state_dict.items() if name in own})
    except ValueError as error:
        raise RuntimeError(f"the state dict does not fit, nothing was loaded: {error}") from error


def physical_entries(model: Any, state_dict: StateDict) -> StateDict:
    """A state dict with each weight once, under its physical name."""
    layout, cfg = model.layout, model.cfg
    blocks = {int(match.group(1)) for match in map(_BLOCK.match, state_dict) if match}
    if blocks and max(blocks) + 1 != layout.n_layers:
        core, rest = 0, 0
        if layout.segments is None:
            in_core = max(blocks) + 1 - layout.n_prelude - layout.n_coda
            core, rest = divmod(in_core, layout.n_core)
        if core < 1 or rest:
            raise ValueError(
                f"{max(blocks) + 1} blocks are no whole number of iterations of {cfg.notation}"
            )
        layout = layout.with_iterations(core)
    physical: StateDict = {}
    first: dict[str, str] = {}
    for name, tensor in state_dict.items():
        block, final = _BLOCK.match(name), _FINAL_NORM.match(name)
        own = name
        if block:
            own = f"{layout.physical_name(int(block.group(1)))}.{block.group(2)}"
        elif final:
            own = f"ln_final.{final.group(1)}"
        elif name == "unembed.W_U" and cfg.tie_word_embeddings:
            own, tensor = "embed.W_E", tensor.T
        if own in physical and not _same(physical[own], tensor):
            raise ValueError(f"{name} differs from {first[own]}, but this model ties them")
        first.setdefault(own, name)
        physical.setdefault(own, tensor)
    return physical


def input_to_embed(
    self: Any,
    input: str | list[str] | Int[Tensor, "*batch pos"],
    prepend_bos: bool | None = USE_DEFAULT_VALUE,
    padding_side: str | None = USE_DEFAULT_VALUE,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    past_kv_cache: KeyValueCache | None = None,
) -> tuple[Tensor, Tensor, None, Tensor | None]:
    """The first residual stream of an input.

    ``model(residual, start_at_layer=0, attention_mask=attention_mask)`` is ``model(input)``.

    Args:
        self: The looped model.
        input: Text or tokens.
        prepend_bos: Overrides ``cfg.default_prepend_bos`` for text.
        padding_side: Overrides the tokenizer's side for text.
        attention_mask: 1 for tokens, 0 for padding.
        past_kv_cache: Not supported.

    Returns:
        The residual stream [batch, pos, d_model], the tokens [batch, pos], ``None``, and the
        attention mask [batch, pos] or ``None``.

    Raises:
        LoopedSemanticsError: With a key-value cache.
    """
    if past_kv_cache is not None:
        raise LoopedSemanticsError(
            "input_to_embed would append to the cache's mask, which the forward pass does "
            "itself: call model(tokens, past_kv_cache=...)"
        )
    with LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
        start = start_run(self, input, attention_mask=attention_mask)
    assert start.tokens is not None
    return start.resid, start.tokens, None, start.mask


def get_residual(
    self: Any,
    embed: Float[Tensor, "batch pos d_model"],
    pos_offset: int,
    prepend_bos: bool | None = USE_DEFAULT_VALUE,
    attention_mask: Int[Tensor, "batch key"] | None = None,
    tokens: Int[Tensor, "batch pos"] | None = None,
    return_shortformer_pos_embed: bool = True,
    device: str | torch.device | None = None,
) -> tuple[Tensor, None] | Tensor:
    """The first residual stream of an embedding: with learned positions, if there are any.

    Args:
        self: The looped model.
        embed: What ``hook_embed`` gives.
        pos_offset: Number of tokens in a key-value cache.
        prepend_bos: Not used, as in TransformerLens.
        attention_mask: 1 for tokens, 0 for padding, over cached and new tokens.
        tokens: Not used.
        return_shortformer_pos_embed: Also return ``None``.
        device: Not used: the embedding stays where it is.

    Returns:
        [batch, pos, d_model], and ``None`` if asked for.
    """
    residual = embed
    if self.cfg.positional_embedding_type == "standard":
        if attention_mask is None:
            ends = pos_offset + embed.shape[1]
            positions = torch.arange(pos_offset, ends, device=embed.device)
            positions = positions.expand(embed.shape[:2])
        else:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, pos_offset:]
        residual = embed + self.hook_pos_embed(self.pos_embed.at(positions))
    return (residual, None) if return_shortformer_pos_embed else residual


def _same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr() == b.data_ptr() and a.shape == b.shape) or torch.equal(a, b)
