"""What a saved run is a run of, and damage inside it."""

import random

import pytest
import torch

from tests.models import tiny_model
from tests.unit.measurements.test_measure import FAST_METRICS, prompts, quiet
from tl_loops.errors import CheckpointError
from tl_loops.runs.storage import load_progress, save_progress
from tl_loops.writing import FileInUseError, in_use


def test_a_run_with_hooks_has_no_checkpoint(tmp_path):
    path, model = tmp_path / "run.ckpt", tiny_model("ouro")
    quiet(model, prompts(), FAST_METRICS, checkpoint=path)
    model.blocks[1].hook_mlp_out.add_hook(lambda x, hook: 0 * x)
    with pytest.raises(CheckpointError, match=r"hooks \(at blocks\.1\.hook_mlp_out\)"):
        quiet(model, prompts(), FAST_METRICS, checkpoint=path)


@pytest.mark.parametrize("change", ["autocast", "training", "flag"])
def test_settings_that_change_numbers_are_part_of_a_run(tmp_path, change):
    path, model = tmp_path / "run.ckpt", tiny_model("ouro")
    quiet(model, prompts(), FAST_METRICS, checkpoint=path)
    model.train(change == "training")
    if change == "flag":
        model.set_use_split_qkv_input(True)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"),
        pytest.raises(CheckpointError, match="another run: settings"),
    ):
        quiet(model, prompts(), FAST_METRICS, checkpoint=path)


def test_fresh_initial_states_have_no_checkpoint(tmp_path):
    model = tiny_model("huginn", state_seed=None)
    with pytest.raises(CheckpointError, match="state_seed=None cannot be resumed"):
        quiet(model, prompts(), FAST_METRICS, checkpoint=tmp_path / "run.ckpt")


def test_one_run_at_a_time_has_a_checkpoint(tmp_path):
    path = tmp_path / "run.ckpt"
    with in_use(path), pytest.raises(FileInUseError, match=r"run\.ckpt is in use"):
        quiet(tiny_model("ouro"), prompts(), FAST_METRICS, checkpoint=path)


def test_a_flipped_bit_or_a_cut_is_one_clear_error(tmp_path):
    path, identity = tmp_path / "run.ckpt", {"weights": "abc"}
    save_progress(path, "measurement", identity, {"a.mean": torch.arange(4.0)}, 2)
    whole = path.read_bytes()
    assert load_progress(path, "measurement", identity, 3) is not None
    draw = random.Random(0)
    places = {8 * i + draw.randrange(8) for i in range(len(whole))}
    for bit in places:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"run\.ckpt"):
            load_progress(path, "measurement", identity, 3)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"run\.ckpt"):
            load_progress(path, "measurement", identity, 3)


@pytest.mark.parametrize("n_done", [-3, 4, 10**6])
def test_more_done_than_there_is_is_refused(tmp_path, n_done):
    path = tmp_path / "run.ckpt"
    save_progress(path, "measurement", {}, {"a.mean": torch.arange(4.0)}, n_done)
    with pytest.raises(CheckpointError, match=f"n_done is '{n_done}', expected 0 to 3"):
        load_progress(path, "measurement", {}, 3)
