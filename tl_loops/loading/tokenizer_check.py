"""Whether a checkpoint's tokenizer works, and fits the model's vocabulary."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tl_loops.errors import CheckpointError, shortened
from tl_loops.loading.json_file import read_json

_TRIED = ("", "a", "The first 2 words.", "é\n")
_SPECIAL = {
    "bos": "every text would begin with a token that the model does not know",
    "eos": "no generated text ends with it",
    "pad": "no text can be padded with it",
}
_MOST_NAMED = 3


_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "tokenizer_class": ((str,), "text"),
    "padding_side": ((str,), "text"),
    "model_max_length": ((int, float), "a number"),
    "added_tokens_decoder": ((dict,), "a mapping"),
    "init_inputs": ((list,), "a list"),
    **{f"{kind}_token": ((str, dict), "text or a mapping") for kind in (*_SPECIAL, "unk")},
}
"""Fields of ``tokenizer_config.json`` that the libraries read without looking at their type."""


def check_settings(settings: Mapping[str, Any], file: Path) -> None:
    """Raise on fields of ``tokenizer_config.json`` of the wrong type.

    Raises:
        CheckpointError: The message names file, field, expected and found.
    """
    for name, (kinds, expected) in _FIELDS.items():
        value = settings.get(name)
        wrong = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if value is not None and wrong:
            raise CheckpointError(f"{file}: {name!r} must be {expected}, found {shortened(value)}")


@contextmanager
def tokenizer_errors(directory: Path) -> Iterator[None]:
    """Whatever a tokenizer library raises becomes a CheckpointError that names the directory."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, CheckpointError):
        raise
    except BaseException as error:  # bare Exception for bad files; a panic in Rust is not even that
        reason = shortened(str(error), 300)[1:-1] or type(error).__name__
        if isinstance(error, (AttributeError, TypeError, LookupError)):
            reason = "a field is missing, or its value is none that the tokenizer library can use"
        raise CheckpointError(
            f"the tokenizer files in {directory} cannot be used: {reason}. Pass tokenizer=..., or "
            "remove them to load without one"
        ) from error


def check_tokenizer(tokenizer: Any, directory: Path, d_vocab: int, prepends_bos: bool) -> None:
    """Try a tokenizer once, and hold its vocabulary against the model's.

    Tokens that the model has no row for, and special tokens that are not in the vocabulary of the
    files, are named in a warning.

    Args:
        tokenizer: As loaded.
        directory: Where its files are.
        d_vocab: Number of tokens of the model.
        prepends_bos: Whether the model's texts begin with BOS.

    Raises:
        CheckpointError: The tokenizer does not work, or every text would begin with a BOS that the
            model does not know.
    """
    with tokenizer_errors(directory):
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise CheckpointError(
                f"the tokenizer files in {directory} give a {type(tokenizer).__name__}, expected a "
                "Hugging Face tokenizer. Pass tokenizer=..., or remove them to load without one"
            )
        for text in _TRIED:
            tokenizer.decode(tokenizer(text)["input_ids"])
        vocabulary = dict(tokenizer.get_vocab())
        special = {kind: _special(tokenizer, kind) for kind in _SPECIAL}
    stored = _stored_words(directory)
    for kind, (token, number) in special.items():
        known = number is not None and 0 <= number < d_vocab
        if token is None or (known and (stored is None or token in stored)):
            continue
        where = f"id {number} of {d_vocab}" if not known else "not in the files' vocabulary"
        message = (
            f"the tokenizer in {directory} has {kind}_token {shortened(token)}, which the model "
            f"does not know ({where}): {_SPECIAL[kind]}. Pass tokenizer=..., or correct its files"
        )
        if kind == "bos" and prepends_bos:
            raise CheckpointError(message)
        warnings.warn(message, stacklevel=4)
    beyond = sorted((n, word) for word, n in vocabulary.items() if n >= d_vocab)
    if beyond:
        named = ", ".join(f"{shortened(word)} (id {n})" for n, word in beyond[:_MOST_NAMED])
        more = f" and {len(beyond) - _MOST_NAMED} more" if len(beyond) > _MOST_NAMED else ""
        warnings.warn(
            f"the tokenizer in {directory} has words beyond the {d_vocab} tokens of the model, "
            f"which cannot be fed to it: {named}{more}",
            stacklevel=4,
        )


def _special(tokenizer: Any, kind: str) -> tuple[str | None, int | None]:
    token, number = getattr(tokenizer, f"{kind}_token"), getattr(tokenizer, f"{kind}_token_id")
    return (None if token is None else str(token)), number


def _stored_words(directory: Path) -> set[str] | None:
    """The words in ``tokenizer.json`` and beside it; ``None`` where there is no such file."""
    if not (directory / "tokenizer.json").is_file():
        return None
    stored = read_json(directory / "tokenizer.json")
    model = stored.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    words: set[str] = set()
    if isinstance(vocabulary, Mapping):
        words |= vocabulary.keys()
    elif isinstance(vocabulary, list):  # of words and their scores
        words |= {str(entry[0]) for entry in vocabulary if isinstance(entry, list) and entry}
    else:
        return None
    words |= _contents(stored.get("added_tokens"))
    if (directory / "added_tokens.json").is_file():
        words |= read_json(directory / "added_tokens.json").keys()
    if (directory / "tokenizer_config.json").is_file():
        added = read_json(directory / "tokenizer_config.json").get("added_tokens_decoder")
        words |= _contents(list(added.values()) if isinstance(added, Mapping) else None)
    return words


def _contents(tokens: Any) -> set[str]:
    tokens = tokens if isinstance(tokens, list) else []
    return {str(token.get("content")) for token in tokens if isinstance(token, Mapping)}
