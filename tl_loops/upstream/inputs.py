"""What a model is fed: text or tokens in, token ids and the mask of real tokens out.

The mask of text comes from the tokenizer call. Ids cannot say it: where the padding token is also
the end of text, or BOS, a real token has the id of padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.utilities import (
    USE_DEFAULT_VALUE,
    get_attention_mask,
    get_input_with_manually_prepended_bos,
)

from tl_loops.upstream.bridges import is_bridge
from tl_loops.upstream.tokenizers import encode

TRUNCATE_TEXT = False
"""Whether text beyond ``cfg.n_ctx`` is cut where the caller does not say.

TransformerLens cuts it without a word. A run of the first part is no run of the text, so here it
raises; ``model.to_tokens`` still cuts, for those who want the first part.
"""


@dataclass(frozen=True, eq=False)
class ModelInput:
    """Token ids and which of them are real.

    Attributes:
        tokens: Token ids, int64 [batch, pos], on the model's device.
        mask: True at real tokens, False at padding; ``None``: no padding.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"] | None = None


def model_input(
    model: Any,
    input: Any,  # Checked below, with messages of its own.
    mask: Tensor | None = None,
    *,
    prepend_bos: bool | None = USE_DEFAULT_VALUE,
    padding_side: str | None = USE_DEFAULT_VALUE,
    truncate: bool = TRUNCATE_TEXT,
) -> ModelInput:
    """Token ids and mask of text or tokens, checked, for any model of TransformerLens or ours.

    Args:
        model: Has ``cfg``, ``tokenizer`` and parameters.
        input: Text, several texts, or integer tokens [pos] or [batch, pos].
        mask: [batch, pos], or [pos] for one row of tokens: 1 at real tokens, 0 at padding.
            ``None``: of the tokenizer for text; for tokens no padding, except that leading padding
            ids count as padding where the tokenizer pads on the left, as in TransformerLens.
        prepend_bos: Overrides ``cfg.default_prepend_bos``, for text.
        padding_side: Overrides the tokenizer's, for text.
        truncate: Whether text beyond ``cfg.n_ctx`` is cut. Tokens are never cut.

    Returns:
        The tokens, with a mask only where something is padding.

    Raises:
        ValueError: The input is neither, is empty, is longer than the context, has other axes or
            ids that the model does not have; there is no tokenizer for text; the mask does not fit,
            or has a row without a real token.
    """
    device = next(model.parameters()).device
    found: Tensor | None = None
    if isinstance(input, Tensor):
        tokens = _checked_tokens(input)
        if mask is None:
            found = _leading_padding(model, tokens.to(device))
        elif mask.ndim == 1 and input.ndim == 1:
            mask = mask[None]
    else:
        tokens, found = _tokenised(model, input, prepend_bos, padding_side, truncate)
    check_length(model.cfg, tokens.shape[1])
    check_ids("the prompts", tokens, number_of_ids(model.cfg))
    mask = found if mask is None else check_mask(mask, tokens.shape)
    if mask is not None:
        mask = None if bool(mask.all()) else mask.to(device)
    return ModelInput(tokens.to(device), mask)


def token_ids(model: Any, input: Tensor) -> Int[Tensor, "batch pos"]:
    """Token ids of any length, checked; what is padding among them is known elsewhere.

    Raises:
        ValueError: They are empty, have other axes, or ids that the model does not have.
    """
    tokens = _checked_tokens(input)
    check_ids("the prompts", tokens, number_of_ids(model.cfg))
    return tokens.to(next(model.parameters()).device)


def attention_needs(mask: Tensor | None, cfg: Any) -> bool:
    """Whether padding reaches a real token where attention is not given the mask.

    Right padding of a causal model does not, and TransformerLens leaves its mask out.
    """
    return mask is not None and (cfg.attention_dir != "causal" or not bool(mask[:, 0].all()))


def check_length(
    cfg: Any,
    n_tokens: int,
    n_past: int = 0,
    mask: Int[Tensor, "batch key"] | Bool[Tensor, "batch key"] | None = None,
) -> None:
    """Raise for a run beyond the context, of text and of tokens alike.

    Args:
        cfg: Says the context, ``n_ctx``.
        n_tokens: Number of new tokens.
        n_past: Number of tokens before them: in a key-value cache, or in the prompt.
        mask: 0 where a token, cached or new, is padding, which takes no position.

    Raises:
        ValueError: They are more than ``cfg.n_ctx``.
    """
    if n_past + n_tokens > cfg.n_ctx and mask is not None:
        longest = mask[mask.sum(-1).argmax()]
        n_tokens, n_past = int(longest[-n_tokens:].sum()), int(longest[:-n_tokens].sum())
    if n_past + n_tokens > cfg.n_ctx:
        after = f" after {n_past}" if n_past else ""
        raise ValueError(
            f"{n_tokens} tokens{after} do not fit the context of n_ctx={cfg.n_ctx} tokens: give "
            "less, cut text yourself (model.to_tokens(text) gives the first n_ctx tokens), or load "
            "the model with a larger n_ctx"
        )


def number_of_ids(cfg: Any) -> int:
    """How many token ids a model can embed: 0 to one below this number."""
    # After the vocabulary there may be more embeddings, and one more id that stands for zeros.
    n_extra = getattr(cfg, "n_extra_tokens", 0)
    return cfg.d_vocab + (n_extra + 1 if n_extra else 0)


def _tokenised(
    model: Any,
    input: Any,
    prepend_bos: bool | None,
    padding_side: str | None,
    truncate: bool,
) -> tuple[Tensor, Tensor]:
    """Tokens as ``model.to_tokens`` gives them, and the tokenizer's mask."""
    texts = [input] if isinstance(input, str) else list(input) if _is_list(input) else None
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            "the prompts must be text (a string or a list of strings) or integer tokens [batch, "
            f"pos], got {_kinds(input)}"
        )
    if not texts:
        raise ValueError("the prompts are empty: got a list without texts")
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("this model has no tokenizer: give tokens instead of text")
    cfg, bridge = model.cfg, is_bridge(model)
    wanted = getattr(cfg, "default_prepend_bos", True) if prepend_bos is None else prepend_bos
    by_itself = getattr(cfg, "tokenizer_prepends_bos", True)
    if wanted and not by_itself and not (bridge and _in_pieces(tokenizer, tokenizer.bos_token)):
        texts = get_input_with_manually_prepended_bos(tokenizer.bos_token, texts)
    tokens, mask = encode(tokenizer, texts, padding_side, cfg.n_ctx if truncate else None)
    if bridge and getattr(cfg, "tokenizer_appends_eos", False):
        while tokens.shape[1] > 1 and bool((tokens[:, -1] == tokenizer.eos_token_id).all()):
            tokens, mask = tokens[:, :-1], mask[:, :-1]
    if by_itself and not wanted:
        tokens, mask = _without_first(tokens, mask)
    if not tokens.numel():
        raise ValueError(
            f"the prompts are empty (no tokens): got tokens of shape {tuple(tokens.shape)}"
        )
    # A text of no tokens among others is a row of padding: its padding ids are what is fed.
    mask = mask | ~mask.any(-1, keepdim=True)
    return tokens, mask


def _in_pieces(tokenizer: Any, bos: str | None) -> bool:
    """Whether BOS is several tokens: a TransformerBridge then leaves it out."""
    return bos is None or len(tokenizer(bos, add_special_tokens=False)["input_ids"]) != 1


def _without_first(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both without each row's first real token, which is the BOS of the tokenizer."""
    if not tokens.shape[1]:
        return tokens, mask
    keep = torch.ones_like(mask)
    keep.scatter_(1, mask.int().argmax(-1, keepdim=True), False)
    shape = (tokens.shape[0], tokens.shape[1] - 1)
    return tokens[keep].reshape(shape), mask[keep].reshape(shape)


def _checked_tokens(tokens: Tensor) -> Tensor:
    """Tokens [batch, pos] as int64."""
    number = tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool
    if number or tokens.ndim not in (1, 2):
        raise ValueError(
            "the prompts must be text or integer tokens [batch, pos], got a "
            f"{tokens.dtype} tensor of shape {tuple(tokens.shape)}"
        )
    if not tokens.numel():
        raise ValueError(
            f"the prompts are empty (no tokens): got tokens of shape {tuple(tokens.shape)}"
        )
    return (tokens[None] if tokens.ndim == 1 else tokens).long()


def _leading_padding(model: Any, tokens: Tensor) -> Tensor | None:
    """The mask that TransformerLens finds for tokens whose tokenizer pads on the left."""
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.padding_side != "left" or tokenizer.pad_token_id is None:
        return None
    return get_attention_mask(tokenizer, tokens, bool(model.cfg.default_prepend_bos)).bool()


def check_ids(
    what: str, ids: int | Sequence[int] | Tensor, n_ids: int, where: str = "the model embeds"
) -> None:
    """Raise for ids of tokens that a model does not have.

    Args:
        what: What holds them, for the message.
        ids: One or several.
        n_ids: Number of ids that it has.
        where: What it has them for, for the message.

    Raises:
        ValueError: There is one.
    """
    if isinstance(ids, Tensor):
        low, high = (int(end) for end in ids.aminmax())
    else:
        listed = [ids] if isinstance(ids, int) else [*ids]
        low, high = min(listed, default=0), max(listed, default=0)
    if low < 0 or high >= n_ids:
        held = f"={low}" if isinstance(ids, int) else f" hold ids from {low} to {high}"
        raise ValueError(f"{what}{held}, but {where} 0 to {n_ids - 1}")


def check_mask(mask: Tensor, shape: Sequence[int]) -> Bool[Tensor, "batch pos"]:
    """A mask of prompts as booleans.

    Args:
        mask: 1 at real tokens, 0 at padding.
        shape: Of the prompts, [batch, pos].

    Raises:
        ValueError: It has other axes, holds other numbers, or a row without a real token.
    """
    if mask.shape != torch.Size(shape):
        raise ValueError(
            f"attention_mask must be [batch, pos] = {list(shape)}, got {list(mask.shape)}"
        )
    mask = zeros_and_ones(mask)
    if not bool(mask.any(-1).all()):
        raise ValueError("attention_mask has a row without a real token")
    return mask


def zeros_and_ones(mask: Tensor) -> Bool[Tensor, "..."]:
    """A mask as booleans.

    Raises:
        ValueError: It holds something else than 1 at tokens and 0 at padding.
    """
    real = mask.bool()
    if not bool((real == mask).all()):
        raise ValueError("attention_mask must be 1 at tokens and 0 at padding, got other numbers")
    return real


def _is_list(input: Any) -> bool:
    return isinstance(input, Sequence) and not isinstance(input, bytes)


def _kinds(input: Any) -> str:
    if not _is_list(input):
        return type(input).__name__
    kinds = sorted({type(one).__name__ for one in input})
    return f"a {type(input).__name__} of {', '.join(kinds)}"
