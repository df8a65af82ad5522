"""A checkpoint's tokenizer, from its local files."""

import warnings
from pathlib import Path
from typing import Any

from tl_loops.config.config import LoopedTransformerConfig
from tl_loops.errors import CheckpointError
from tl_loops.loading.files import Checkpoint
from tl_loops.loading.json_file import read_json
from tl_loops.loading.tokenizer_check import check_settings, check_tokenizer, tokenizer_errors
from tl_loops.upstream import remember

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TOKENIZER_FILES = (
    *_VOCABULARY_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
TOKENIZER_FOLDER = "tokenizer"
"""Where a checkpoint may have these files instead (xLLM)."""


def load_tokenizer(checkpoint: Checkpoint, cfg: LoopedTransformerConfig | None = None) -> Any:
    """The checkpoint's own tokenizer, from its local files alone; no remote code runs.

    As TransformerLens wants it, the tokenizer prepends BOS by itself where it can.

    Args:
        checkpoint: From :func:`tl_loops.loading.source.resolve`.
        cfg: The model's config; with it the tokenizer is tried, and its tokens are held against
            the model's.

    Returns:
        A Hugging Face tokenizer; ``None``, with a warning, where there are no tokenizer files.

    Raises:
        CheckpointError: The files are there but give no tokenizer, or none that works.
    """
    directory = checkpoint.directory
    folder = directory / TOKENIZER_FOLDER
    if not _has_vocabulary(directory) and _has_vocabulary(folder):
        directory = folder
    for name in TOKENIZER_FILES:
        if (directory / name).exists() and not (directory / name).is_file():
            raise CheckpointError(f"{directory / name} is no file; expected one, or nothing there")
    if not _has_vocabulary(directory):
        warnings.warn(
            f"{directory} has no tokenizer files: the model takes tokens, not strings, until "
            "set_tokenizer() gives it a tokenizer",
            stacklevel=2,
        )
        return None
    with tokenizer_errors(directory):
        tokenizer = _read_tokenizer(directory)
    if cfg is not None:
        check_tokenizer(tokenizer, directory, cfg.d_vocab, bool(cfg.default_prepend_bos))
    return tokenizer


def _has_vocabulary(directory: Path) -> bool:
    return any((directory / file).is_file() for file in _VOCABULARY_FILES)


def _read_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

    described = directory / "tokenizer_config.json"
    settings = read_json(described) if described.is_file() else {}
    check_settings(settings, described)
    arguments: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if "tokenizer_class" in settings or "auto_map" in settings:
        loader: Any = AutoTokenizer
        # An empty config, so that config.json is not read: it may name remote code, and
        # transformers knows no looped model type.
        arguments["config"] = PretrainedConfig()
    else:
        loader = PreTrainedTokenizerFast
    given = loader.from_pretrained(str(directory), **arguments)
    try:
        tokenizer = loader.from_pretrained(str(directory), add_bos_token=True, **arguments)
    except ValueError:
        # Some BOS tokens cannot be prepended by the tokenizer itself; TransformerLens then
        # prepends them as text. The mark keeps it from reloading the directory by config.json.
        tokenizer = loader.from_pretrained(str(directory), **arguments)
        tokenizer.init_kwargs["add_bos_token"] = True
    remember(tokenizer, given)
    return tokenizer
