"""Tokens to follow: ids for every prompt, from ids or from text, with several spellings."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_loops.layout.model import Model

Spellings = int | str | Sequence[int | str]
TrackedTokens = int | str | Sequence[Spellings] | Tensor

ABSENT = -1
"""Fills rows of prompts that have fewer spellings than others."""


def tracked_ids(
    model: Model, name: str, value: TrackedTokens, batch: int
) -> Int[Tensor, "batch spelling"]:
    """Ids of a tracked token for every prompt.

    Args:
        model: Its tokenizer turns text to ids, its vocabulary bounds them.
        name: What the token is called, for messages.
        value: An id or a single token's text for all prompts; a list with one entry per prompt,
            each an id, a text or a list of spellings; or ids [batch] or [batch, spelling].
        batch: Number of prompts.

    Returns:
        [batch, spelling], -1 where a prompt has fewer spellings than another.

    Raises:
        ValueError: The wrong number of prompts, an id outside of the vocabulary, a prompt without
            a spelling or with one twice, text that is not a single token, or an unknown word.
    """
    if isinstance(value, (int, str)):
        rows = [[_id(model, name, value)]] * batch
    elif isinstance(value, Tensor):
        if value.is_floating_point() or value.ndim not in (1, 2):
            raise ValueError(f"tracked {name!r} must be ids [batch] or [batch, spelling]")
        rows = value.reshape(value.shape[0], -1).tolist()
    else:
        rows = [
            [_id(model, name, entry)]
            if isinstance(entry, (int, str))
            else [_id(model, name, spelling) for spelling in entry]
            for entry in value
        ]
    if len(rows) != batch:
        raise ValueError(f"tracked {name!r} has {len(rows)} entries, but there are {batch} prompts")
    width = max((len(row) for row in rows), default=0)
    last = (model.cfg.padded_vocab or model.cfg.d_vocab_out) - 1
    for number, row in enumerate(rows):
        ids = [token for token in row if token != ABSENT]
        if not ids:
            raise ValueError(f"tracked {name!r} has no token for prompt {number}")
        if len(set(ids)) < len(ids):
            raise ValueError(f"tracked {name!r} has one token twice for prompt {number}: {ids}")
        if min(ids) < 0 or max(ids) > last:
            raise ValueError(
                f"tracked {name!r} has ids {ids} for prompt {number}, expected 0 to {last}"
            )
    padded = [row + [ABSENT] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long, device=model.embed.W_E.device)


def _id(model: Model, name: str, token: int | str) -> int:
    if not isinstance(token, str):
        return token
    if model.tokenizer is None:
        raise ValueError(
            f"tracked {name!r} is the text {token!r}, but this model has no tokenizer: give ids"
        )
    ids = model.to_tokens(token, prepend_bos=False)[0].tolist()
    if len(ids) != 1:
        raise ValueError(
            f"tracked {name!r} is the text {token!r}, which is {len(ids)} tokens ({ids}); give the "
            "id of the one to follow, for example the first"
        )
    check_known(model, f"tracked {name!r}", token, ids)
    return ids[0]


def check_known(model: Any, what: str, text: str, ids: Sequence[int]) -> None:
    """Raise for text that the vocabulary does not have: its id stands for all unknown words.

    Args:
        model: Has a tokenizer.
        what: What the text is, for the message.
        text: The text.
        ids: Its token ids.

    Raises:
        ValueError: One of the ids is the unknown token's, and the text does not ask for it.
    """
    unknown = getattr(model.tokenizer, "unk_token", None)
    if unknown is None or unknown in text or model.tokenizer.unk_token_id not in ids:
        return
    raise ValueError(
        f"{what} is the text {text!r}, which the vocabulary of this model does not have (it reads "
        f"{unknown!r}, as for every unknown word): give another spelling, or ids"
    )
