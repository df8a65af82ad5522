"""Where a checkpoint lies: a known name, a hub id or a directory."""

import os
import re
from pathlib import Path
from typing import Any

from tl_loops.errors import (
    CheckpointError,
    ConfigError,
    UnknownModelError,
    first_line,
    shortened,
)
from tl_loops.families.base import KnownModel
from tl_loops.families.registry import is_looped_config
from tl_loops.loading.catalogue import find_known, near_names, packaged_directory
from tl_loops.loading.files import (
    ADAPTER_FILES,
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    conversion,
)
from tl_loops.loading.json_file import read_json
from tl_loops.loading.replacing import readable
from tl_loops.loading.tokenizer import TOKENIZER_FILES, TOKENIZER_FOLDER

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""What the name of a repository of the hub looks like."""


def is_looped_name(name: Any) -> bool:
    """Whether a name or directory is a looped model, without network and without exceptions.

    Args:
        name: What a user gave to ``from_pretrained``.

    Returns:
        ``True`` for the known names and aliases (in any case of letters, as TransformerLens takes
        them) and for directories whose ``config.json`` names a looped family.
    """
    if not isinstance(name, (str, os.PathLike)):
        return False
    directory = _local_directory(name)
    if directory is not None:
        try:
            return is_looped_config(read_json(directory / CONFIG_FILE))
        except CheckpointError:
            return False
    return isinstance(name, str) and find_known(name) is not None


def is_broken(name: Any) -> bool:
    """Whether a name is a directory whose ``config.json`` nobody can read.

    Args:
        name: What a user gave to ``from_pretrained``.
    """
    try:
        directory = _local_directory(name)
        if directory is not None and (directory / CONFIG_FILE).exists():
            read_json(directory / CONFIG_FILE)
    except CheckpointError:
        return True
    except TypeError:  # no name of anything
        return False
    return False


def resolve(
    name_or_directory: Any,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    read_as: str | None = None,
) -> Checkpoint:
    """Find the files of a checkpoint, downloading them where needed.

    From the hub only ``config.json``, safetensors files and tokenizer files are taken: never
    pickles, never code.

    Args:
        name_or_directory: A directory with ``config.json``, a known name or alias, or another
            repository of the hub, ``"owner/name"``. A directory wins over a name. Text or a path.
        revision: Branch, tag or commit of a hub repository.
        token: Hub token, as for ``huggingface_hub.snapshot_download``.
        cache_dir: Hub cache, as there.
        local_files_only: Use the hub cache alone, as there.
        read_as: The family to read it as; ``None``: what its ``config.json`` says.

    Returns:
        The checkpoint directory.

    Raises:
        TypeError: It is neither text nor a path.
        UnknownModelError: Neither a directory, nor a known name, nor a repository that can be had.
        CheckpointError: A directory without ``config.json``, or the download failed.
        ConfigError: ``revision`` for files that have none.
    """
    if not isinstance(name_or_directory, (str, os.PathLike)):
        raise TypeError(
            "expected the name of a model or the path of a directory, got "
            f"{shortened(name_or_directory)}"
        )
    directory = _local_directory(name_or_directory)
    if directory is not None:
        _refuse_revision(revision, str(directory))
        if not (directory / CONFIG_FILE).is_file():
            raise CheckpointError(f"{directory} holds no {CONFIG_FILE}")
        return Checkpoint(
            directory, _given_directory(name_or_directory).resolve().name, read_as=read_as
        )
    name = os.fspath(name_or_directory)
    entry = find_known(name) if isinstance(name_or_directory, str) else None
    known = entry.known if entry is not None else KnownModel(name)
    if entry is None and _REPOSITORY.fullmatch(name) is None:
        raise _unknown(name)
    if known.packaged is not None:
        _refuse_revision(revision, known.name)
        directory = packaged_directory(known.packaged)
        if not (directory / CONFIG_FILE).is_file():
            raise CheckpointError(
                f"{known.name} is missing from the installed package: {directory}"
            )
        return Checkpoint(directory, known.name, read_as=read_as)
    try:
        directory = _download(
            known.name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    except CheckpointError as error:
        if entry is None:
            raise _unknown(name, str(error)) from error
        raise
    if not any(directory.glob("*.safetensors")):
        raise CheckpointError(
            f"{known.name} holds no safetensors files; other files of weights (.bin, .pt) are not "
            f"fetched. {conversion(['FILE'])}, with the names of the files that you downloaded; "
            f"then load the directory that holds {WEIGHTS_FILE} and {CONFIG_FILE}"
        )
    return Checkpoint(directory, known.name.split("/")[-1], known.silent, read_as)


def _local_directory(name: str | os.PathLike[str]) -> Path | None:
    """A directory with a config, or any directory that is not also a known name."""
    path = os.path.expanduser(os.fspath(name))
    if isinstance(path, bytes) or not os.path.isdir(path):
        return None
    directory = readable(Path(path))
    if (directory / CONFIG_FILE).is_file():
        return directory
    known = isinstance(name, str) and find_known(name) is not None
    return None if known else directory


def _given_directory(name: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(os.fspath(name)))


def _unknown(name: str, reason: str = "") -> UnknownModelError:
    if os.path.isfile(os.path.expanduser(name)):
        return UnknownModelError(f"{name!r} is a file; give the directory that holds {CONFIG_FILE}")
    near = near_names(name)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    tried = f". As a repository of the hub: {reason}" if reason else ""
    return UnknownModelError(
        f"{name!r} is neither a directory nor a known looped model.{hint} Other checkpoints of the "
        "known families load from a local directory, e.g. from huggingface_hub.snapshot_download, "
        f"or by their repository 'owner/name'{tried}"
    )


def _refuse_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise ConfigError(f"revision={revision!r} means a version on the hub, but {what} is local")


def _download(repository: str, **arguments: Any) -> Path:
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(
            repository,
            allow_patterns=[
                CONFIG_FILE,
                "*.safetensors",
                INDEX_FILE,
                ADAPTER_FILES[0],
                *TOKENIZER_FILES,
                *(f"{TOKENIZER_FOLDER}/{name}" for name in TOKENIZER_FILES),
            ],
            ignore_patterns=["*/*.safetensors"],
            **arguments,
        )
    except Exception as error:  # errors of hub, network and file system have no common base
        raise CheckpointError(
            f"{repository} could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {first_line(error)}). A local directory with {CONFIG_FILE}, "
            "safetensors and tokenizer files loads without network"
        ) from error
    return Path(directory)
