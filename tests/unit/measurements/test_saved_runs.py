"""What a saved run is a run of."""

import os

import pytest
import torch

from tests.models import tiny_model
from tests.unit.measurements.test_measure import FAST_METRICS, prompts, quiet
from tl_loops.errors import CheckpointError
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


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_checkpoint_that_is_no_file_is_neither_waited_for_nor_replaced(tmp_path, kind):
    path = tmp_path / "run.ckpt"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/null")
    with pytest.raises(ValueError, match=rf"is a {kind}"):
        quiet(tiny_model("ouro"), prompts(), FAST_METRICS, checkpoint=path)
    assert path.is_fifo() or path.is_symlink()


def test_a_half_done_run_of_the_intact_model_is_not_gone_on_with_by_another(tmp_path):
    path, model = tmp_path / "run.ckpt", tiny_model("ouro")
    quiet(model, prompts(), FAST_METRICS, batch_size=1, checkpoint=path)
    whole = path.read_bytes()
    half = path.read_bytes()[: -len(whole) // 4]
    model.blocks[1].hook_mlp_out.add_hook(lambda x, hook: 0 * x)
    for autocast in (False, True):
        path.write_bytes(half)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            pytest.raises(CheckpointError, match="hooks" if not autocast else "another run"),
        ):
            quiet(model, prompts(), FAST_METRICS, batch_size=1, checkpoint=path)
        assert path.read_bytes() == half
        model.reset_hooks()
    quiet(model, prompts(), FAST_METRICS, batch_size=1, checkpoint=path)
    assert path.read_bytes() == whole
