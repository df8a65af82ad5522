"""Ways to damage a checkpoint directory, by kind; each is drawn by a seeded generator."""

import json
import os
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Mutation = Callable[[Path, random.Random], bool]
"""Damages a directory in place; says whether the result must be refused."""

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 1.5, -0.5, 1e-300, 1e308, 10**18, -(10**18)),
    *(2**31, 2**63, 10**400, float("nan"), float("inf"), "", "x", "7", "\ud800", "a" * 5000),
    *([], {}, [1, 2], [[1]], ["full_attention"], {"type": "linear"}, {"rope_type": 3}),
)


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(file: Path, header: Any, data: bytes) -> None:
    """The same back to a file; bytes as a header stay as they are."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def weights(directory: Path) -> Path:
    """The weight file."""
    return directory / "model.safetensors"


def a_key(header: dict[str, Any], rng: random.Random) -> str:
    """Some tensor."""
    return rng.choice(sorted(key for key in header if key != "__metadata__"))


def flipped_bytes(directory: Path, rng: random.Random) -> bool:
    content = bytearray(weights(directory).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    end = rng.choice((8, header, len(content)))
    for _ in range(rng.choice((1, 1, 2, 8))):
        content[rng.randrange(end)] ^= 1 << rng.randrange(8)
    weights(directory).write_bytes(content)
    return False


def cut_or_longer(directory: Path, rng: random.Random) -> bool:
    content = weights(directory).read_bytes()
    at = rng.randrange(len(content))
    changed = (content[:at], content[at:], content + bytes(at % 9 + 1), content[:at] + b"\0" * 8)
    weights(directory).write_bytes(rng.choice(changed))
    return False


def header_fields(directory: Path, rng: random.Random) -> bool:
    header, data = header_of(weights(directory))
    entry = header[a_key(header, rng)]
    field = rng.choice(("dtype", "shape", "data_offsets"))
    odd = rng.choice((*ODD_VALUES, "F64", "BF16", "F16", "I32", [0, 4], [8, 4], [10**18, 10**18]))
    if field != "dtype" and rng.random() < 0.5:
        entry[field] = [odd, *entry[field][1:]]
    else:
        entry[field] = odd
    write(weights(directory), header, data)
    return False


def wrong_shapes(directory: Path, rng: random.Random) -> bool:
    header, data = header_of(weights(directory))
    entry = header[a_key(header, rng)]
    shape = entry["shape"]
    entry["shape"] = rng.choice(([*shape, 1], [1, *shape], [*reversed(shape), 1], [len(data)]))
    write(weights(directory), header, data)
    return True


def places(directory: Path, rng: random.Random) -> bool:
    """Overlaps, holes, shifts, and data in another order than their offsets say."""
    header, data = header_of(weights(directory))
    one, other = a_key(header, rng), a_key(header, rng)
    kind = rng.choice(("overlap", "shift", "hole"))
    if kind == "overlap":
        header["extra"] = {**header[one]}
    elif kind == "shift":
        for entry in header.values():
            if "data_offsets" in entry:
                entry["data_offsets"] = [at + 4 for at in entry["data_offsets"]]
        data += b"\0" * 4
    else:
        begin, end = header.pop(other)["data_offsets"]
        assert begin < end
    write(weights(directory), header, data)
    return True


def duplicate_keys(directory: Path, rng: random.Random) -> bool:
    header, data = header_of(weights(directory))
    key = a_key(header, rng)
    again = {**header[key], "data_offsets": header[a_key(header, rng)]["data_offsets"], "x": 1}
    text = json.dumps(header)
    write(
        weights(directory), f"{text[:-1]}, {json.dumps(key)}: {json.dumps(again)}}}".encode(), data
    )
    return True


def odd_headers(directory: Path, rng: random.Random) -> bool:
    header, data = header_of(weights(directory))
    text = json.dumps(header)
    key = a_key(header, rng)
    choices = (
        text.encode("utf-16"),
        text.encode("utf-8-sig"),
        b"[" * rng.choice((10, 100_000)),
        text.replace(key, key + "\\ud800").encode(),
        text.replace(key, "\u0000".join(key)).encode("utf-8"),
        json.dumps({**header, "__metadata__": rng.choice(([], 5, {"a": 1}))}).encode(),
        text.replace("}", "}}", 1).encode(),
        text.encode() + b"x",
    )
    write(weights(directory), rng.choice(choices), data)
    return True


def no_numbers(directory: Path, rng: random.Random) -> bool:
    header, data = header_of(weights(directory))
    begin, end = header[a_key(header, rng)]["data_offsets"]
    at = begin + 4 * rng.randrange((end - begin) // 4)
    value = rng.choice((float("nan"), float("inf"), float("-inf")))
    changed = bytearray(data)
    changed[at : at + 4] = struct.pack("<f", value)
    write(weights(directory), header, bytes(changed))
    return True


def missing_and_extra(directory: Path, rng: random.Random) -> bool:
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights(directory))
    key = rng.choice(sorted(tensors))
    tensor = tensors.pop(key)
    if rng.random() < 0.5:
        tensors[rng.choice((f"{key}.1", f"module.{key}", "", "é" * 300))] = tensor
    save_file(tensors, weights(directory))
    return True


def indices(directory: Path, rng: random.Random) -> bool:
    header, _ = header_of(weights(directory))
    place = rng.choice(
        ("../model.safetensors", "/dev/zero", "..", ".", "", "x" * 5000, "a\0b", 3, None, "absent")
    )
    name = "model-00001-of-00001.safetensors"
    weight_map: Any = {key: name for key in header if key != "__metadata__"}
    weight_map[rng.choice((a_key(header, rng), "new"))] = place
    weight_map = rng.choice((weight_map, weight_map, weight_map, [], {}, "x", None))
    weights(directory).rename(directory / name)
    index = json.dumps({"weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)
    return True


def other_files(directory: Path, rng: random.Random) -> bool:
    """Pickles, pipes, devices, directories and pointers under the name of the weights."""
    file = weights(directory)
    kind = rng.choice("pickle torch pipe directory device link pointer".split())
    file.unlink()
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"a": list(range(rng.randrange(500)))}))
    elif kind == "torch":
        torch.save({"a": torch.zeros(rng.randrange(1, 9))}, file)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    else:
        file.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    return True


def config_values(directory: Path, rng: random.Random) -> bool:
    file = directory / "config.json"
    document = json.loads(file.read_text())
    target = document["config"] if rng.random() < 0.8 and "config" in document else document
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(sorted(target))
        nested = target[key]
        if isinstance(nested, dict) and nested and rng.random() < 0.7:
            nested[rng.choice(sorted(nested))] = rng.choice(ODD_VALUES)
        else:
            target[key] = rng.choice(ODD_VALUES)
    file.write_text(json.dumps(document))
    return False


def config_keys(directory: Path, rng: random.Random) -> bool:
    file = directory / "config.json"
    document = json.loads(file.read_text())
    target = document["config"] if rng.random() < 0.8 and "config" in document else document
    key = rng.choice(sorted(target))
    value = target.pop(key)
    if rng.random() < 0.5:
        target[rng.choice((key.upper(), f"{key}s", "quantization_config", ""))] = value
    file.write_text(json.dumps(document))
    return False


def config_bytes(directory: Path, rng: random.Random) -> bool:
    file = directory / "config.json"
    content = bytearray(file.read_bytes())
    kind = rng.choice(("flip", "cut", "nest", "double", "utf-16"))
    if kind == "flip":
        for _ in range(rng.choice((1, 4))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        content = content[: rng.randrange(len(content))]
    elif kind == "nest":
        content = bytearray(b'{"a":' * rng.choice((50, 100_000)))
    elif kind == "double":
        content = content.replace(b'": ', b'": 1, "model_type": ', 1)
    else:
        content = bytearray(content.decode().encode("utf-16"))
    file.write_bytes(content)
    return kind in ("nest", "utf-16")


def tokenizer_fields(directory: Path, rng: random.Random) -> bool:
    file = directory / rng.choice(("tokenizer.json", "tokenizer_config.json"))
    document = json.loads(file.read_text())
    target = document
    while True:
        key = rng.choice(sorted(target))
        if isinstance(target[key], dict) and target[key] and rng.random() < 0.5:
            target = target[key]
            continue
        break
    target[key] = rng.choice(ODD_VALUES)
    if file.name == "tokenizer_config.json" and rng.random() < 0.3:
        document["tokenizer_class"] = rng.choice(
            ("GPT2Tokenizer", "LlamaTokenizer", "BertTokenizerFast", "T5Tokenizer", "Nobody", 5)
        )
    file.write_text(json.dumps(document))
    return False


def tokenizer_bytes(directory: Path, rng: random.Random) -> bool:
    file = directory / rng.choice(("tokenizer.json", "tokenizer_config.json"))
    content = bytearray(file.read_bytes())
    kind = rng.choice(("flip", "cut", "nest", "pipe", "directory"))
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        content = content[: rng.randrange(len(content))]
    elif kind == "nest":
        content = bytearray(b'{"a":' * 100_000)
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        file.write_bytes(content)
    return kind in ("pipe", "nest")


def side_files(directory: Path, rng: random.Random) -> bool:
    name = rng.choice(
        (
            *("adapter_config.json", "adapter_model.safetensors", "generation_config.json"),
            *("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja"),
            *("model-00002.safetensors", "modeling_own.py", "pytorch_model.bin", "vocab.json"),
        )
    )
    (directory / name).write_bytes(
        rng.choice(
            (b"", b"{}", b"[]", b"\xff\xfe", b"\0" * 64, b"raise SystemExit(1)", b'{"a": 3}')
        )
    )
    return False


KINDS: dict[str, Mutation] = {
    "flipped bytes": flipped_bytes,
    "cut or longer": cut_or_longer,
    "header fields": header_fields,
    "wrong shapes": wrong_shapes,
    "overlaps and holes": places,
    "duplicate keys": duplicate_keys,
    "odd headers": odd_headers,
    "NaN and infinity": no_numbers,
    "missing and extra tensors": missing_and_extra,
    "shard indices": indices,
    "pickles, pipes, devices": other_files,
    "config values": config_values,
    "config keys": config_keys,
    "config bytes": config_bytes,
    "tokenizer fields": tokenizer_fields,
    "tokenizer bytes": tokenizer_bytes,
    "side files": side_files,
}
