"""The findings run quickly, and what they found can be read from their committed results."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FINDINGS = ROOT / "demos" / "findings"
PAGE = ROOT / "docs" / "findings" / "index.md"
NOT_A_FINDING = {"finding", "train_text"}
NAMES = sorted({path.stem for path in FINDINGS.glob("*.py")} - NOT_A_FINDING)


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Run a finding with ``--quick`` in a directory of its own."""
    monkeypatch.syspath_prepend(str(FINDINGS))

    def run(name):
        module = importlib.import_module(name)
        results = module.main(["--quick", "--out", str(tmp_path), "--pictures", str(tmp_path)])
        assert json.loads((tmp_path / f"{name}.json").read_text()) == results
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        return results

    return run


def committed(name):
    return json.loads((FINDINGS / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_every_finding_has_results_a_picture_and_a_row(name):
    results = committed(name)
    assert results["command"] == f"python demos/findings/{name}.py"
    assert results["seed"] == 0 and results["seconds"] > 0
    assert (ROOT / "docs" / "images" / "findings" / f"{name}.png").exists()
    assert f"findings/{name}.py" in PAGE.read_text("utf-8")


def test_random_stacks(quick):
    """With injection small weights settle; without, every layer leaves the state where it is."""
    for rows in (quick("random_stacks")["rows"], committed("random_stacks")["rows"]):
        small = {
            (r["norm"], r["injection"]): r for r in rows if (r["depth"], r["scale"]) == (4, 0.02)
        }
        assert small["pre", True]["step"]["high"] < 1e-5
        assert small["pre", True]["step"]["high"] < small["pre", False]["step"]["low"]
        assert small["pre", False]["lowest_cosine"]["low"] > 0.999


def test_propositions(quick):
    for models in (quick("propositions")["models"], committed("propositions")["models"]):
        for name, of in models.items():
            assert 0 < of["share_of_the_bound"]["largest"] <= 1, name
            if name.startswith("random"):
                for row in of["rotated"]:
                    assert 0 < row["step_over_bound"] <= 1.01, name


def test_trajectories(quick):
    for models in (quick("trajectories")["models"], committed("trajectories")["models"]):
        for of in models.values():
            for row in of["grid"]:
                assert sum(s["mean"] for s in row["share"].values()) == pytest.approx(1, abs=1e-4)
            by_rho = [r["share"]["fixed_point"]["mean"] for r in of["grid"] if r["tau"] == 0.05]
            assert by_rho == sorted(by_rho, reverse=True), "a higher rho makes fewer fixed points"


def test_iterations_at_test_time(quick):
    for results in (quick("test_time_iterations"), committed("test_time_iterations")):
        loss = results["curves"]["loss"]
        assert len(loss["mean"]) == results["n_iterations"]
        assert loss["mean"][results["best_iteration"] - 1] == min(loss["mean"])
        above = results["above_the_best"]["mean"]
        assert above[results["best_iteration"] - 1] == 0


def test_stages(quick):
    for results in (quick("stages"), committed("stages")):
        for of in results["models"].values():
            for row in of.values():
                blocks = row["blocks"]
                for low, mean, high in zip(
                    blocks["low"], blocks["mean"], blocks["high"], strict=True
                ):
                    assert low - 1e-6 <= mean <= high + 1e-6
                assert row["repetition"]["correlation"] is None or (
                    -1 <= row["repetition"]["correlation"] <= 1 and row["repetition"]["p"] > 0
                )
