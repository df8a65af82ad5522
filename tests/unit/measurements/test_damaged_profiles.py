"""Saved results that lost rows, or of which something was changed, raise when they are loaded."""

import csv
import json
import random

import pandas
import pytest
import torch

from tests.unit.measurements.test_profile import ENDINGS, assert_identical, profile, samples
from tl_loops.lens.tuned import TunedLens
from tl_loops.measurements.profile import LoopProfile
from tl_loops.measurements.seal import SEAL
from tl_loops.runs.storage import load_artefact


def _change(path, change):
    """Let ``change`` make other rows of the rows of a file, and write these back."""
    if path.suffix == ".json":
        whole = json.loads(path.read_text())
        whole["rows"] = change(whole["rows"])
        path.write_text(json.dumps(whole))
    elif path.suffix == ".csv":
        with path.open(newline="") as stream:
            names, *rows = csv.reader(stream)
        with path.open("w", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows([names, *change(rows)])
    else:
        table = pandas.read_parquet(path)
        table.iloc[change(list(range(len(table))))].to_parquet(path, index=False)


def _unseal(path):
    """Take a file back to the form of before there were seals."""
    if path.suffix == ".json":
        whole = json.loads(path.read_text())
        whole = {name: value for name, value in whole.items() if name not in SEAL}
        path.write_text(json.dumps({**whole, "format": "tl_loops profile 1"}))
    elif path.suffix == ".csv":
        with path.open(newline="") as stream:
            rows = list(csv.reader(stream))
        kept = [i for i, name in enumerate(rows[0]) if name not in SEAL]
        with path.open("w", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows([[r[i] for i in kept] for r in rows])
    else:
        pandas.read_parquet(path).drop(columns=list(SEAL)).to_parquet(path, index=False)


LOST = {
    "the last row": lambda rows: rows[:-1],
    "the last metric": lambda rows: rows[:-9],
    "a row between": lambda rows: rows[:3] + rows[4:],
    "all but one": lambda rows: rows[:1],
    "a row twice": lambda rows: [*rows, rows[-1]],
    "another order": lambda rows: rows[::-1],
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("lost", LOST)
def test_lost_rows_raise(tmp_path, ending, lost):
    path = tmp_path / f"p{ending}"
    profile(samples(3)).save(path)
    _change(path, lambda rows: list(rows))
    assert_identical(LoopProfile.load(path), profile(samples(3)))
    _change(path, LOST[lost])
    with pytest.raises(ValueError, match=f"p{ending} holds no whole profile of tl_loops: it"):
        LoopProfile.load(path)


def test_a_csv_file_cut_at_any_byte_raises(tmp_path):
    path = tmp_path / "p.csv"
    profile(samples(3)).save(path)
    whole = path.read_bytes()
    n_first = whole.index(b"\n") + 1
    for length in random.Random(0).sample(range(n_first, len(whole) - 1), 60):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"p\.csv holds no whole profile"):
            LoopProfile.load(path)
    path.write_bytes(whole[:-1])  # only the last line feed
    assert_identical(LoopProfile.load(path), profile(samples(3)))


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_flipped_bit_raises_or_changes_nothing(tmp_path, ending):
    path = tmp_path / f"p{ending}"
    profile(samples(2)).save(path)
    whole, draw, n_refused = path.read_bytes(), random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(whole)
        bit = draw.randrange(8 * len(whole))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            loaded = LoopProfile.load(path)
        except ValueError as error:
            assert f"p{ending} holds no whole profile" in str(error)
            n_refused += 1
        else:
            assert_identical(loaded, profile(samples(2)))
    assert n_refused > 20


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_from_before_seals_load_and_are_judged_by_what_they_hold(tmp_path, ending):
    path = tmp_path / f"p{ending}"
    profile(samples(3)).save(path)
    _unseal(path)
    assert_identical(LoopProfile.load(path), profile(samples(3)))
    _change(path, lambda rows: rows[:-1])
    with pytest.raises(ValueError, match=r"successive_cosine lacks its row.* at block.* \[13\]"):
        LoopProfile.load(path)


def test_a_sealed_json_file_without_its_seal_raises(tmp_path):
    path = tmp_path / "p.json"
    profile(samples(3)).save(path)
    whole = json.loads(path.read_text())
    del whole["checksum"]
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="'checksum'"):
        LoopProfile.load(path)


def test_a_trained_lens_that_is_damaged_raises(tmp_path):
    path = tmp_path / "lens.safetensors"
    weight = torch.randn(2, 3, 3)
    lens = TunedLens(("a", "b"), weight, torch.randn(2, 3), torch.rand(4, 2), {"d_model": 3})
    lens.save(path)
    names = ("weight", "bias", "losses")
    whole, draw = path.read_bytes(), random.Random(0)
    expected = load_artefact(path, "tuned_lens", names)
    for place in range(0, len(whole), 2):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            tensors, metadata = load_artefact(path, "tuned_lens", names)
        except ValueError as error:
            assert "lens.safetensors" in str(error)
        else:  # the name of the checksum is damaged, and nothing else
            assert all(torch.equal(tensors[name], expected[0][name]) for name in names)
            assert metadata == expected[1]
    for length in range(0, len(whole), 5):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"lens\.safetensors"):
            TunedLens.load(path)
