"""Weight files that break a rule of the safetensors format, and what is no file at all."""

import json
import os
import pickle

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.unit.loading.files_of import raw_file, stored, written
from tl_loops.errors import CheckpointError
from tl_loops.loading.header import read_header
from tl_loops.loading.open import load_config, open_tensors
from tl_loops.loading.source import resolve


def entry(begin, end, dtype="F32", shape=None):
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TWO = {"a": entry(0, 8), "b": entry(8, 16)}
BYTES = bytes(range(16))

FORBIDDEN = {
    "two keys over the same bytes": (raw_file({**TWO, "c": entry(8, 16)}, BYTES), "'c' overlap"),
    "offsets shifted": (
        raw_file({"a": entry(4, 12), "b": entry(12, 20)}, BYTES + b"1234"),
        "'a' leave a hole",
    ),
    "a hole": (raw_file({"a": entry(0, 4), "b": entry(8, 16)}, BYTES), "'b' leave a hole"),
    "bytes beyond": (raw_file(TWO, BYTES + b"more"), "bytes beyond its tensors"),
    "too few bytes": (raw_file(TWO, BYTES[:-1]), "truncated"),
    "a header in UTF-16": (raw_file(json.dumps(TWO).encode("utf-16"), BYTES), "begin with"),
    "a header that is not UTF-8": (raw_file(b'{"\xff": 1}'), "utf-8"),
    "a byte-order mark": (raw_file(b"\xef\xbb\xbf" + json.dumps(TWO).encode(), BYTES), "begin"),
    "a header that begins with a space": (
        raw_file(b" " + json.dumps(TWO).encode(), BYTES),
        "begin",
    ),
    "a key twice": (
        raw_file(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            b'"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
            BYTES,
        ),
        "'a' is there twice",
    ),
    "half of a surrogate pair": (raw_file(b'{"a\\ud800":{}}'), "surrogate"),
    "an unknown type": (raw_file({"a": entry(0, 16, "F31")}, BYTES), "no type 'F31'"),
    "a type that is a list": (raw_file({"a": entry(0, 16, [])}, BYTES), "no type []"),
    "a negative offset": (raw_file({"a": entry(-16, 0)}, BYTES), "offsets for key 'a'"),
    "offsets in reverse": (raw_file({"a": entry(16, 0, shape=[4])}, BYTES), "does not fit"),
    "an absurd shape": (raw_file({"a": entry(0, 16, shape=[10**18])}, BYTES), "does not fit"),
    "a shape beyond all numbers": (
        raw_file({"a": entry(0, 16, shape=[10**4000])}, BYTES),
        "shape or offsets for key 'a'",
    ),
    "a shape that overflows": (
        raw_file({"a": entry(0, 16, shape=[2**63, 2, 4])}, BYTES),
        "does not fit",
    ),
    "metadata that is no text": (raw_file({"__metadata__": {"a": 1}, **TWO}, BYTES), "text"),
    "metadata that is a list": (raw_file({"__metadata__": [], **TWO}, BYTES), "text"),
    "nested brackets": (raw_file(b'{"a":' + b"[" * 100_000, BYTES), "nested too deeply"),
    "an absurd header length": (b"\xff" * 8 + b"{}", "not a safetensors file"),
    "a pickle": (pickle.dumps({"a": list(range(500))}), "pickle"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_the_format_forbids_is_refused_with_file_and_key(tmp_path, what):
    content, message = FORBIDDEN[what]
    file = tmp_path / "weights.safetensors"
    file.write_bytes(content)
    if what != "a header that begins with a space":  # which the library reads all the same
        with pytest.raises((SafetensorError, OSError, ValueError)):
            load_file(file)
    with pytest.raises(CheckpointError) as error:
        read_header(file)
    assert str(error.value).startswith("weights.safetensors: ") and message in str(error.value)
    assert len(str(error.value)) < 300


def test_what_the_format_allows_is_read(tmp_path):
    file = tmp_path / "weights.safetensors"
    header = json.dumps({"b": entry(8, 16), "__metadata__": {"format": "pt"}, "a": entry(0, 8)})
    file.write_bytes(raw_file(header.encode() + b"   ", BYTES))
    found = {tensor.key: tensor for tensor in read_header(file)}
    assert list(found) == ["a", "b"] and found["b"].offset == found["a"].offset + 8
    assert load_file(file).keys() == found.keys()
    save_file({"none": torch.zeros(0, 3), "one": torch.zeros(1)}, file)
    assert {tensor.key for tensor in read_header(file)} == {"none", "one"}


def refusal(directory):
    with pytest.raises(CheckpointError) as error:
        checkpoint = resolve(directory)
        list(open_tensors(checkpoint, load_config(checkpoint, device="cpu")))
    return str(error.value)


def place(kind, path):
    path.unlink(missing_ok=True)
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize("kind", ["a named pipe", "a directory", "a device"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_what_is_no_file_is_neither_read_nor_waited_for(tmp_path, kind, name):
    directory = written(tmp_path / "c", "ouro")
    (directory / "model.safetensors").unlink()
    place(kind, directory / name)
    message = refusal(directory)
    assert f"is {kind}, expected a file" in message and name in message


def test_a_link_to_nowhere_is_refused(tmp_path):
    directory = written(tmp_path / "c", "ouro")
    place("a link", directory / "model.safetensors")
    assert "model.safetensors: is not a readable safetensors file" in refusal(directory)


@pytest.mark.parametrize(
    "name",
    ["..", ".", "../up.safetensors", "/etc/passwd", "a/b", "x" * 5000, "a\0b", "a\nb", "", 3, None],
)
def test_index_entries_that_are_no_file_beside_it_are_refused(tmp_path, name):
    directory = written(tmp_path / "c", "ouro")
    index = {"weight_map": {key: name for key in stored("ouro")}}
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(directory)
    assert "expected the name of a file beside it" in message and len(message) < 500


def test_a_pickle_under_a_safetensors_name_is_refused_and_not_opened(tmp_path):
    directory = written(tmp_path / "c", "ouro")
    torch.save(stored("ouro"), directory / "model.safetensors")
    message = refusal(directory)
    assert "model.safetensors: is not a safetensors file but a pickle" in message
