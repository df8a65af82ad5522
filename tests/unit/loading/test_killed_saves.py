"""A save that is killed at any moment leaves the old checkpoint or the new one."""

import errno
import os
import random
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.kills import N_MOMENTS, killed_after, killed_before_event
from tests.models import tiny_model, tiny_tokens
from tests.unit.loading.test_loading import FIXTURES, load
from tl_loops.errors import CheckpointError
from tl_loops.loading.json_file import read_json
from tl_loops.loading.open import save_checkpoint
from tl_loops.loading.source import is_looped_name
from tl_loops.model.looped import LoopedTransformer
from tl_loops.writing import FileInUseError, in_use

WHOLE, SHARDS, OTHER_SHARDS = 10**9, 200_000, 150_000


class _Tokenizer:
    """One whose files say which save they come from."""

    def __init__(self, text):
        self.text = text

    def save_pretrained(self, directory):
        (directory / "added.txt").write_text(self.text)
        (directory / "templates").mkdir()
        (directory / "templates" / "one.jinja").write_text(self.text)


def _plain_weights(directory):
    """The weights as a reader finds them that knows nothing of a save that is under way."""
    if (directory / "model.safetensors").exists():
        return load_file(directory / "model.safetensors")
    if not (directory / "model.safetensors.index.json").exists():
        return None
    names = read_json(directory / "model.safetensors.index.json")["weight_map"]
    files = {file: load_file(directory / file) for file in {*names.values()}}
    return {key: files[file][key] for key, file in names.items()}


def _which(found, sets):
    """Which of the sets of tensors this is, whole."""
    (which,) = (
        name
        for name, tensors in sets.items()
        if found.keys() == tensors.keys() and all(torch.equal(found[k], tensors[k]) for k in found)
    )
    return which


@pytest.mark.parametrize(
    ("first", "second"),
    [(WHOLE, WHOLE), (SHARDS, SHARDS), (WHOLE, SHARDS), (OTHER_SHARDS, WHOLE), (None, SHARDS)],
)
def test_a_kill_before_any_file_operation_leaves_old_or_new(tmp_path, first, second):
    cfg, tensors = load(FIXTURES / "ouro")
    sets = {"old": tensors, "new": {key: tensor + 1 for key, tensor in tensors.items()}}
    start, directory = tmp_path / "start", tmp_path / "c"
    start.mkdir()
    (start / "notes.md").write_text("mine")
    if first is not None:
        save_checkpoint(start, cfg, tensors, _Tokenizer("old"), first)

    def save():
        save_checkpoint(directory, cfg, sets["new"], _Tokenizer("new"), second)

    seen, number, killed = [], 0, True
    step = 1 if N_MOMENTS > 20 else 2 if (first, second) == (WHOLE, WHOLE) else 5
    while killed:
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(start, directory)
        killed = killed_before_event(number, directory, save)
        plain = _plain_weights(directory)
        assert first is None if plain is None else _which(plain, sets)
        if is_looped_name(directory):
            seen.append(_which(load(directory)[1], sets))
        else:
            with pytest.raises(CheckpointError, match="c holds no config"):
                load(directory)
            assert first is None
            seen.append("old")
        assert (directory / "notes.md").read_text() == "mine"
        if number % 10 == 0:  # saving again, nothing of the kill is left
            save_checkpoint(directory, cfg, tensors, _Tokenizer("again"), first or WHOLE)
            assert _which(_plain_weights(directory), sets) == "old"
            assert not [file.name for file in directory.iterdir() if file.name.startswith(".")]
            assert (directory / "templates" / "one.jinja").read_text() == "again"
        number += step
    changed = seen.index("new")
    assert number > 20 and 0 < changed < len(seen) - 1
    assert {*seen[:changed]} == {"old"} and {*seen[changed:]} == {"new"}


def test_a_model_that_is_killed_at_random_moments_loads_with_old_or_new_numbers(tmp_path):
    model, tokens = tiny_model("ouro"), tiny_tokens()
    directory, draw = tmp_path / "c", random.Random(0)
    model.save_pretrained(directory)
    begin = time.perf_counter()
    model.save_pretrained(directory)
    duration = time.perf_counter() - begin
    with torch.no_grad():
        numbers = model(tokens)
        for _ in range(N_MOMENTS // 2):
            model.W_E.mul_(1.01)
            after = model(tokens)
            killed_after(draw.uniform(0, 1.5 * duration), lambda: model.save_pretrained(directory))
            found = LoopedTransformer.from_pretrained_no_processing(directory)(tokens)
            assert torch.equal(found, numbers) or torch.equal(found, after)
            numbers = found


def test_a_killed_save_is_read_by_the_name_of_its_directory(tmp_path):
    model = tiny_model("ouro")
    model.save_pretrained(tmp_path / "c")
    (tmp_path / "c" / ".saved").mkdir()
    for file in ("config.json", "model.safetensors"):
        os.rename(tmp_path / "c" / file, tmp_path / "c" / ".saved" / file)
    again = LoopedTransformer.from_pretrained_no_processing(tmp_path / "c")
    assert torch.equal(again(tiny_tokens()), model(tiny_tokens()))
    assert again.cfg.model_name == model.cfg.model_name


def test_a_directory_has_one_writer(tmp_path):
    model = tiny_model("ouro")
    model.save_pretrained(tmp_path / "c")
    before = {file.name: file.read_bytes() for file in (tmp_path / "c").iterdir()}
    with in_use(tmp_path / "c" / "config.json"), pytest.raises(FileInUseError, match="is in use"):
        model.save_pretrained(tmp_path / "c")
    assert {file.name: file.read_bytes() for file in (tmp_path / "c").iterdir()} == before


@pytest.mark.parametrize("kind", ["full", "no links"])
def test_other_file_systems(tmp_path, monkeypatch, kind):
    model, tokens = tiny_model("ouro"), tiny_tokens()
    model.save_pretrained(tmp_path / "c")
    before = model(tokens)

    def refused(*_):
        number = errno.ENOSPC if kind == "full" else errno.EPERM
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync" if kind == "full" else "link", refused)
    with torch.no_grad():
        model.W_E.mul_(2)
    if kind == "full":
        with pytest.raises(OSError, match=r"No space left on device.*/c'"):
            model.save_pretrained(tmp_path / "c")
        expected = before
    else:
        model.save_pretrained(tmp_path / "c")
        expected = model(tokens)
    assert {file.name for file in (tmp_path / "c").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    found = LoopedTransformer.from_pretrained_no_processing(tmp_path / "c")
    assert torch.equal(found(tokens), expected)
