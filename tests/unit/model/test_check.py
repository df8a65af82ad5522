"""Checks of checkpoints: what holds is reported, and each kind of fault is found."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import ARCHITECTURES, tiny_model
from tl_loops.cli import main
from tl_loops.errors import CheckpointError, UnknownModelError
from tl_loops.model.check import check, check_model

FIXTURES = Path(__file__).parents[2] / "parity" / "fixtures"
CHECKS = (
    "finite weights",
    "finite activations",
    "causality",
    "batch independence",
    "left padding",
    "cached decoding",
    "restart at each iteration",
    "decomposition",
    "gradients",
)


def failures(model) -> set[str]:
    return {finding.name for finding in check_model(model) if finding.status == "failed"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_holds_of_every_architecture(architecture):
    findings = list(check_model(tiny_model(architecture)))
    assert [finding.name for finding in findings] == list(CHECKS)
    assert {finding.status for finding in findings} == {"ok"}, findings


@pytest.mark.parametrize("name", ["huginn", "ouro", "retrofitted_olmo_default"])
def test_released_formats_pass(name, capsys):
    report = check(FIXTURES / name)
    assert report.passed
    assert report.family == {"retrofitted_olmo_default": "retrofitted-olmo"}.get(name, name)
    assert main(["check", str(FIXTURES / name)]) == 0
    out = capsys.readouterr().out
    assert f"family {report.family}" in out and out.endswith("all checks passed\n")
    assert "not guaranteed" in out and "no tokenizer" in out


def test_the_embedded_model_passes_by_name_and_in_other_types():
    assert check("tl-loops-tiny", n_iterations=2).passed
    assert check("tl-loops-tiny", n_iterations=2, dtype="bfloat16").passed
    exact = check("tl-loops-tiny", n_iterations=2, dtype="float64")
    assert exact.passed and "state_seed=0" in " ".join(exact.limits)


# Faults of a model.


def broken(point, edit, architecture="retrofitted"):
    model = tiny_model(architecture)
    model.add_hook(point, lambda x, hook: edit(x), is_permanent=True)
    return model


def test_a_look_at_later_tokens_is_no_causality():
    found = failures(broken("iter.1.hook_state_out", lambda x: x + x.flip(1)))
    assert {"causality", "left padding", "cached decoding"} <= found
    assert "batch independence" not in found


def test_a_look_at_other_rows_is_no_batch_independence():
    found = failures(broken("iter.1.hook_state_out", lambda x: x + x.mean(0, keepdim=True)))
    assert "batch independence" in found and "causality" not in found


def test_absolute_places_break_padding_and_decoding():
    def by_place(x):
        return x * (1 + torch.arange(x.shape[1])[:, None])

    found = failures(broken("iter.1.0.hook_attn_out", by_place))
    assert {"left padding", "cached decoding"} <= found and "causality" not in found


def test_a_cut_gradient_is_found():
    found = list(check_model(broken("iter.0.hook_state_in", torch.Tensor.detach, "ouro")))
    cut = next(finding for finding in found if finding.name == "gradients")
    assert cut.status == "failed" and "embed.W_E" in cut.detail


def test_a_weight_that_stops_others_is_found():
    model = tiny_model("retrofitted")
    with torch.no_grad():
        model.blocks[1].attn.W_O.zero_()
    found = next(f for f in check_model(model) if f.name == "gradients")
    assert found.status == "failed"
    assert "core.0.attn.W_Q" in found.detail and "is a weight after it zero?" in found.detail


def test_overflow_is_located():
    found = list(check_model(broken("iter.2.1.hook_mlp_out", lambda x: x * 1e38 * 1e38)))
    overflow = next(finding for finding in found if finding.name == "finite activations")
    assert overflow.status == "failed" and "iter.2.1.hook_resid_post" in overflow.detail


def test_an_edit_of_the_stream_breaks_restart_or_decomposition():
    assert "decomposition" in failures(broken("iter.1.1.hook_resid_mid", lambda x: 2 * x))
    calls = []

    def once(x):
        calls.append(x)
        return x * len(calls)

    assert "restart at each iteration" in failures(broken("iter.0.hook_state_in", once))


def test_what_the_config_does_not_promise_does_not_apply():
    model = tiny_model("retrofitted", attention_dir="bidirectional")
    statuses = {finding.name: finding.status for finding in check_model(model)}
    assert statuses["causality"] == statuses["cached decoding"] == "not applicable"
    assert "failed" not in statuses.values()


# Faults of a checkpoint.


@pytest.fixture
def directory(tmp_path):
    copied = tmp_path / "ouro"
    copied.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / "ouro" / name, copied / name)
    return copied


def rewrite(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def says(capsys, directory) -> tuple[int, str, str]:
    code = main(["check", str(directory)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_weight_that_is_not_a_number_fails_with_code_1(capsys, directory):
    rewrite(directory, lambda t: t["model.norm.weight"].fill_(float("nan")))
    code, out, err = says(capsys, directory)
    assert code == 1 and not err
    assert "finite weights             failed: not finite: ln_final.w" in out
    assert out.splitlines()[-1].startswith("failed: finite weights, finite activations")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "'model.norm.weight' is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "'extra' of shape (2,) is unexpected"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
            "'model.norm.weight' has shape (3,), expected",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)}),
            "is stored as I8",
        ),
    ],
)
def test_wrong_tensors_are_named_in_one_line_with_code_2(capsys, directory, change, message):
    rewrite(directory, change)
    code, out, err = says(capsys, directory)
    assert code == 2 and not out
    assert message in err and err.count("\n") == 1


def test_a_truncated_file_ends_with_code_2(capsys, directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    code, _, err = says(capsys, directory)
    assert code == 2 and "truncated" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="mamba", architectures=None), "no known family"),
        (dict(use_sliding_window=True), "'use_sliding_window' is True"),
        (dict(hidden_size=None), "'hidden_size' is missing"),
        (dict(total_ut_steps=0), "n_iterations must be at least 1"),
    ],
)
def test_a_config_that_cannot_be_read_ends_with_code_2(capsys, directory, changes, message):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))
    code, _, err = says(capsys, directory)
    assert code == 2 and message in err and err.count("\n") == 1


def test_pickles_and_missing_files_end_with_code_2(capsys, directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    code, _, err = says(capsys, directory)
    assert code == 2 and "pytorch_model.bin" in err
    (directory / "config.json").unlink()
    code, _, err = says(capsys, directory)
    assert code == 2 and "config.json" in err
    assert says(capsys, directory / "nowhere")[0] == 2
    assert main(["check", "tl-loops-tiny", "--n-iterations", "0"]) == 2
    with pytest.raises(UnknownModelError):
        check(directory / "nowhere")
    with pytest.raises(CheckpointError):
        check(directory)


def test_a_tokenizer_with_too_many_tokens_fails(tmp_path):
    from tl_loops import LoopedTransformer

    model = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny", n_iterations=1)
    model.tokenizer.add_tokens(["more", "than", "fit"])
    model.save_pretrained(tmp_path / "saved")
    report = check(tmp_path / "saved")
    assert not report.passed
    found = next(finding for finding in report.findings if finding.name == "tokenizer")
    assert found.detail == "38 tokens, but the embedding has 35 rows"
