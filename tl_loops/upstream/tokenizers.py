"""Tokenizers as they are: whatever special tokens they have or lack, none is made up."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.utilities import get_tokenizer_with_bos
from transformers import PreTrainedTokenizerBase

_WITHOUT_BOS = ("OlmoForCausalLM", "OlmoeForCausalLM", "Olmo2ForCausalLM")
"""Architectures whose tokenizer TransformerLens 3.9 does not reload to make it prepend BOS."""

_AS_GIVEN = "_tl_loops_as_given"
_NO_PADDING_ID = 0
"""What fills shorter rows where a tokenizer has no padding token; the mask says that it does."""


def set_tokenizer(self: Any, tokenizer: Any, default_padding_side: str | None = None) -> None:
    """Give a model its tokenizer, made to prepend BOS where it can.

    TransformerLens gives a tokenizer without EOS the text ``"<|endoftext|>"`` for EOS, BOS and
    padding, which most vocabularies do not have. Here a missing padding token becomes EOS or BOS,
    a missing BOS becomes EOS (as there), and what the tokenizer lacks altogether stays missing.

    Args:
        self: Has ``cfg`` and takes ``tokenizer``.
        tokenizer: A Hugging Face tokenizer.
        default_padding_side: ``"left"`` or ``"right"``; ``None``: the tokenizer's.

    Raises:
        ValueError: An argument is neither.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer must be a Hugging Face tokenizer, got {type(tokenizer)}")
    if default_padding_side not in ("left", "right", None):
        raise ValueError(
            f"default_padding_side must be 'left', 'right' or None, got {default_padding_side!r}"
        )
    cfg, given = self.cfg, as_given(tokenizer)
    if given is tokenizer:
        given = copy.deepcopy(tokenizer)
    # TransformerLens reloads a tokenizer from its path. One that was made in memory has none: it
    # is taken as it is, and BOS is prepended as text.
    if tokenizer.init_kwargs.get("name_or_path") and cfg.original_architecture not in _WITHOUT_BOS:
        tokenizer = get_tokenizer_with_bos(tokenizer)
    remember(tokenizer, given)
    tokenizer.padding_side = default_padding_side or tokenizer.padding_side or "right"
    # Found out before special tokens are filled in.
    bos = tokenizer.bos_token_id
    cfg.tokenizer_prepends_bos = bos is not None and tokenizer.encode("")[:1] == [bos]
    if tokenizer.bos_token is None and tokenizer.eos_token is not None:
        tokenizer.bos_token = tokenizer.eos_token
    if tokenizer.pad_token is None and tokenizer.bos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.bos_token
    self.tokenizer = tokenizer
    if cfg.d_vocab == -1:
        cfg.d_vocab = max(tokenizer.get_vocab().values()) + 1
    if cfg.d_vocab_out == -1:
        cfg.d_vocab_out = cfg.d_vocab


def remember(tokenizer: Any, given: Any) -> None:
    """Note what a tokenizer was before it was made to prepend BOS and its tokens were filled in."""
    if given is not tokenizer:
        setattr(tokenizer, _AS_GIVEN, given)


def as_given(tokenizer: Any) -> Any:
    """The tokenizer as it was given to the model; itself, once its vocabulary was changed."""
    given = getattr(tokenizer, _AS_GIVEN, None)
    return tokenizer if given is None or len(given) != len(tokenizer) else given


def encode(
    tokenizer: Any,
    texts: Sequence[str],
    padding_side: str | None,
    max_length: int | None,
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Token ids of texts, padded to one length, and which of them are real.

    A single text needs no padding token, nor do several: the mask says what is padding.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: One or more texts.
        padding_side: ``"left"`` or ``"right"``; ``None``: the tokenizer's.
        max_length: Longer texts are cut to this many tokens; ``None``: none is cut.
    """
    side = tokenizer.padding_side if padding_side is None else padding_side
    encoded = tokenizer(
        list(texts), truncation=max_length is not None, max_length=max_length, padding=False
    )
    rows = [torch.tensor(ids, dtype=torch.int64) for ids in encoded["input_ids"]]
    fill = tokenizer.pad_token_id
    shape = (len(rows), max((len(row) for row in rows), default=0))
    tokens = torch.full(shape, _NO_PADDING_ID if fill is None else fill)
    mask = torch.zeros(shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        place = slice(shape[1] - len(row), None) if side == "left" else slice(len(row))
        tokens[number, place], mask[number, place] = row, True
    return tokens, mask
