"""Writing a checkpoint: config, physical weights and tokenizer, whole or not at all."""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from tl_loops.config.config import LoopedTransformerConfig, dtype_name
from tl_loops.config.weights import physical_tensors
from tl_loops.errors import CheckpointError, ConfigError
from tl_loops.families.native import FORMAT_VERSION, MODEL_TYPE
from tl_loops.loading.card import CARD_FILE, model_card
from tl_loops.loading.files import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from tl_loops.loading.json_file import read_json
from tl_loops.loading.replacing import readable, replaced
from tl_loops.mechanisms.tensors import FLOATS
from tl_loops.upstream import as_given
from tl_loops.upstream.config_fields import OF_THIS_RUN

_OWN_WEIGHTS = re.compile(r"model(-[0-9a-f]{16})?(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def config_to_json(cfg: LoopedTransformerConfig) -> dict[str, Any]:
    """The fields of a config that differ from their defaults, and its dtype, as JSON can hold them.

    Raises:
        ConfigError: A field holds something that JSON cannot; it is named.
    """
    fields = {}
    for described in dataclasses.fields(cfg):
        value = getattr(cfg, described.name)
        differs = value != described.default or described.name == "dtype"
        if differs and described.name not in OF_THIS_RUN:
            fields[described.name] = _plain(described.name, value)
    return fields


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, (list, tuple)):
        return [_plain(name, element) for element in value]
    finite = not isinstance(value, float) or math.isfinite(value)
    if isinstance(value, (bool, int, float, str, type(None))) and finite:
        return value
    raise ConfigError(f"config field {name}={value!r} cannot be saved as JSON")


def save_checkpoint(
    directory: str | os.PathLike[str],
    cfg: LoopedTransformerConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a checkpoint in tl_loops's own format, which every loading function reads.

    A kill at any moment leaves the old checkpoint or the new one: see
    :mod:`tl_loops.loading.replacing`. A reader of the weights alone finds old or new ones too: they
    are one file, or files named after their content with an index that is replaced at once. Other
    files of the directory stay. At most one tensor is copied at a time.

    Args:
        directory: Created if need be. An earlier checkpoint in this format is replaced.
        cfg: The config; its dtype and name are saved, its device is not.
        tensors: All physical weights by name (``model.physical_state_dict()``).
        tokenizer: Saved beside the weights if given (``save_pretrained``).
        max_shard_bytes: Weights beyond this size go into several files with an index.

    Raises:
        CheckpointError: ``directory`` holds something else, or the tensors are not those of the
            config; every missing, unexpected and misshapen one is named.
        ConfigError: A config field cannot be written as JSON.
        FileInUseError: Another process or thread saves into the directory.
        OSError: The disk is full or may not be written; the message names the directory.
    """
    target = Path(directory)
    _check_target(target)
    _check_tensors(cfg, tensors)
    document = {
        "model_type": MODEL_TYPE,
        "format_version": FORMAT_VERSION,
        "config": config_to_json(cfg),
    }
    with replaced(target, CONFIG_FILE, _place_in_order, _is_own_weights) as staging:
        # In the order of physical_tensors, so that equal models give equal files.
        ordered = {name: tensors[name] for name in physical_tensors(cfg)}
        _write_weights(staging, ordered, max_shard_bytes)
        if tokenizer is not None:
            as_given(tokenizer).save_pretrained(staging)
        if _card_is_ours(target):
            (staging / CARD_FILE).write_text(model_card(cfg), encoding="utf-8")
        (staging / CONFIG_FILE).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _place_in_order(name: str) -> tuple[bool, bool, bool, str]:
    """The config last, and before it what makes weights the current ones, after what it names."""
    return name == CONFIG_FILE, not _is_own_weights(name), name in (INDEX_FILE, WEIGHTS_FILE), name


def _is_own_weights(name: str) -> bool:
    return _OWN_WEIGHTS.fullmatch(name) is not None


def _card_is_ours(target: Path) -> bool:
    """Whether there is no model card, or the one of the checkpoint that is replaced, unedited."""
    card, config = (readable(target) / name for name in (CARD_FILE, CONFIG_FILE))
    if not card.exists():
        return True
    if not config.exists():
        return False
    earlier = LoopedTransformerConfig.from_dict(read_json(config)["config"])
    return card.read_text(encoding="utf-8", errors="replace") == model_card(earlier)


def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; give a directory to save into")
    if not target.is_dir():
        return
    config = readable(target) / CONFIG_FILE
    if config.exists():
        if read_json(config).get("model_type") != MODEL_TYPE:
            raise CheckpointError(
                f"{target} holds a checkpoint of another format; save into another directory"
            )
    elif any(target.glob("*.safetensors")):
        raise CheckpointError(
            f"{target} holds weights without {CONFIG_FILE}; save into another directory"
        )


def _check_tensors(cfg: LoopedTransformerConfig, tensors: Mapping[str, Tensor]) -> None:
    expected = physical_tensors(cfg)
    problems = [
        f"{name!r} is missing, expected shape {tensor.shape}"
        for name, tensor in expected.items()
        if name not in tensors
    ]
    problems += [f"{name!r} is not a weight of this config" for name in tensors.keys() - expected]
    problems += [
        f"{name!r} has shape {tuple(tensors[name].shape)}, expected {tensor.shape}"
        for name, tensor in expected.items()
        if name in tensors and tuple(tensors[name].shape) != tensor.shape
    ]
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise CheckpointError(f"the tensors to save are not those of the config:{lines}")


def _write_weights(directory: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    # Not by storage, as for PyTorch's state dicts: weights that are views of one tensor are written
    # each on their own, so that each counts.
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
        filename_pattern=WEIGHTS_FILE.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_shard_bytes,
    )
    weight_map = {}
    for file, names in split.filename_to_tensors.items():
        digest = hashlib.blake2b(digest_size=8) if split.is_sharded else None
        write_safetensors(directory / file, [(name, tensors[name]) for name in names], digest)
        if digest is not None:
            # No file of earlier weights has this name and another content: while the files are
            # replaced, an index never names files of two sets.
            written, file = file, file.replace("model-", f"model-{digest.hexdigest()}-", 1)
            os.rename(directory / written, directory / file)
        weight_map |= dict.fromkeys(names, file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def write_safetensors(
    file: Path, tensors: Iterable[tuple[str, Tensor]], digest: Any = None
) -> None:
    """Write tensors as a safetensors file, copying at most one of them at a time.

    Args:
        file: Path to create.
        tensors: Keys and floating-point tensors, on any device and with any strides.
        digest: A hash object of ``hashlib`` that takes in what is written.

    Raises:
        CheckpointError: A tensor has a type that checkpoints do not hold.
    """
    names = {dtype: name for name, dtype in FLOATS.items()}
    # Wide types first: so every tensor starts at a multiple of its item size.
    ordered = sorted(tensors, key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, tensor in ordered:
        if tensor.dtype not in names:
            raise CheckpointError(f"key {key!r} has type {tensor.dtype}; expected a floating type")
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(file, "wb") as stream:
        for part in itertools.chain(
            (len(encoded).to_bytes(8, "little"), encoded),
            (_row_major(tensor) for _, tensor in ordered),
        ):
            stream.write(part)
            if digest is not None:
                digest.update(part)


def _row_major(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().view(-1)
    flat = flat.as_strided(flat.shape, (1,))  # a single number may have any stride
    return flat.view(torch.uint8).numpy().data
