"""From text to tokens and back, for models on TransformerLens 4.x.

In 3.9 these methods belong to HookedTransformer, from 4.0 on to TransformerBridge alone. Arguments
and results are those of 3.9; the work is done by TransformerLens's tokenisation utilities.
"""

import random
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.utilities import (
    USE_DEFAULT_VALUE,
    get_input_with_manually_prepended_bos,
    get_tokens_with_bos_removed,
)

from tl_loops.upstream.defaults import LocallyOverridenDefaults
from tl_loops.upstream.tokenizers import encode, set_tokenizer


class TextMethods:
    """Tokenisation of a model with ``cfg``, ``tokenizer`` and ``dataset``."""

    cfg: Any
    tokenizer: Any
    dataset: Any

    set_tokenizer = set_tokenizer

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: str | None = USE_DEFAULT_VALUE,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Tokens of one or several texts, padded to one length.

        Args:
            input: Text or texts.
            prepend_bos: Overrides ``cfg.default_prepend_bos``.
            padding_side: Overrides the tokenizer's.
            move_to_device: Whether the tokens go to ``cfg.device``.
            truncate: Whether texts beyond ``cfg.n_ctx`` are cut.

        Raises:
            ValueError: There is no tokenizer.
        """
        tokenizer = _tokenizer_of(self, "to_tokens")
        with LocallyOverridenDefaults(self, prepend_bos=prepend_bos, padding_side=padding_side):
            wanted, by_itself = self.cfg.default_prepend_bos, self.cfg.tokenizer_prepends_bos
            if wanted and not by_itself:
                input = get_input_with_manually_prepended_bos(tokenizer.bos_token, input)
            texts = [input] if isinstance(input, str) else input
            tokens, _ = encode(tokenizer, texts, None, self.cfg.n_ctx if truncate else None)
            if by_itself and not wanted:
                tokens = get_tokens_with_bos_removed(tokenizer, tokens)
        return tokens.to(self.cfg.device) if move_to_device else tokens

    def to_string(self, tokens: Any) -> str | list[str]:
        """Text of tokens.

        Args:
            tokens: [pos] or [batch, pos], as a tensor, an array or lists.

        Returns:
            One string, or one per row.

        Raises:
            ValueError: There is no tokenizer, or more than two axes.
        """
        tokenizer = _tokenizer_of(self, "to_string")
        tokens = torch.as_tensor(tokens)
        if tokens.ndim > 2:
            raise ValueError(f"tokens must be [pos] or [batch, pos], got {tuple(tokens.shape)}")
        decode = tokenizer.batch_decode if tokens.ndim == 2 else tokenizer.decode
        return decode(tokens, clean_up_tokenization_spaces=False)

    def to_str_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: str | None = USE_DEFAULT_VALUE,
    ) -> list[Any]:
        """Each token of a text as a string.

        Args:
            input: Text, tokens [pos] or [1, pos] (tensor or array), or a list of those.
            prepend_bos: Overrides ``cfg.default_prepend_bos``, for text.
            padding_side: Overrides the tokenizer's, for text.

        Returns:
            One string per token; for a list, one such list per element.

        Raises:
            ValueError: There is no tokenizer, or the input is none of the above.
        """
        tokenizer = _tokenizer_of(self, "to_str_tokens")
        if isinstance(input, list):
            return [self.to_str_tokens(one, prepend_bos, padding_side) for one in input]
        if isinstance(input, str):
            input = self.to_tokens(input, prepend_bos=prepend_bos, padding_side=padding_side)
        if not isinstance(input, (Tensor, np.ndarray)):
            raise ValueError(f"input must be text, tokens or a list of them, got {type(input)}")
        tokens = torch.as_tensor(input).squeeze()
        if tokens.ndim > 1:
            raise ValueError(
                f"tokens must be [pos] or [1, pos], got {tuple(input.shape)}: give a list of rows"
            )
        ids = [[int(token)] for token in tokens.reshape(-1)]
        return tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token.

        Raises:
            AssertionError: It is several.
        """
        tokens = self.to_tokens(string, prepend_bos=False)
        if tokens.numel() != 1:
            raise AssertionError(f"{string!r} is {tokens.numel()} tokens, not one")
        return int(tokens.item())

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token id."""
        (text,) = self.to_str_tokens(torch.tensor([int_token]))
        assert isinstance(text, str)
        return text

    def get_token_position(
        self,
        single_token: Any,
        input: Any,
        mode: str = "first",
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: str | None = USE_DEFAULT_VALUE,
    ) -> int:
        """Where a token stands in a text.

        Args:
            single_token: Its text or id.
            input: Text, or tokens [pos] or [1, pos].
            mode: ``"first"`` or ``"last"``.
            prepend_bos: Overrides ``cfg.default_prepend_bos``, for text.
            padding_side: Overrides the tokenizer's, for text.

        Raises:
            AssertionError: The token does not occur.
            ValueError: Another mode.
        """
        if mode not in ("first", "last"):
            raise ValueError(f"mode must be 'first' or 'last', got {mode!r}")
        if isinstance(input, str):
            input = self.to_tokens(input, prepend_bos=prepend_bos, padding_side=padding_side)
        tokens = input.reshape(-1) if input.ndim == 2 and input.shape[0] == 1 else input
        if isinstance(single_token, str):
            single_token = self.to_single_token(single_token)
        places = (tokens == int(single_token)).nonzero().reshape(-1)
        assert len(places), "the token does not occur in the input"
        return int(places[0 if mode == "first" else -1])

    def load_sample_training_dataset(self, **kwargs: Any) -> Any:
        """Raises: no sample of the training data is known.

        Raises:
            ValueError: Always.
        """
        raise ValueError("no sample of the training data is known: set model.dataset to rows")

    def sample_datapoint(
        self,
        tokenize: bool = False,
        prepend_bos: bool | None = USE_DEFAULT_VALUE,
        padding_side: str | None = USE_DEFAULT_VALUE,
    ) -> str | Int[Tensor, "1 pos"]:
        """The text of a random row of ``model.dataset``.

        Args:
            tokenize: Whether to give its tokens [1, pos].
            prepend_bos: As for :meth:`to_tokens`.
            padding_side: As for :meth:`to_tokens`.
        """
        if self.dataset is None:
            self.load_sample_training_dataset()
        assert self.dataset is not None
        text = self.dataset[random.randrange(len(self.dataset))]["text"]
        if not tokenize:
            return text
        return self.to_tokens(text, prepend_bos=prepend_bos, padding_side=padding_side)


def _tokenizer_of(model: Any, method: str) -> Any:
    if model.tokenizer is None:
        raise ValueError(f"{method} needs a tokenizer: call model.set_tokenizer first")
    return model.tokenizer
