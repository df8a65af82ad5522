"""``docs/metrics.md`` knows every metric, and its numbers are those of the embedded model."""

import importlib.util
import inspect
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tl_loops import LoopedTransformer, metrics, tasks
from tl_loops.measurements import MEASUREMENTS

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "metrics.md").read_text("utf-8")
RERUN = "run `python demos/metrics_table.py`"

# check_pattern refuses bad patterns and measures nothing; the document says so in its rules.
NOT_MEASUREMENTS = {"check_pattern"}
FUNCTIONS = sorted(
    name
    for name in metrics.__all__
    if inspect.isfunction(getattr(metrics, name)) and name not in NOT_MEASUREMENTS
)
# Rounding errors are amplified by discrete choices (clusters, splits, labels) and in eigenvalues of
# a matrix far from normal: another processor gives slightly other numbers.
AMPLIFIED = {
    "successive_difference.late",
    "fixed_point_slope",
    "path_independence.distance",
    *(f"classify_trajectory.{x}" for x in (*metrics.TRAJECTORY_LABELS, "speed", "verdict")),
    "label_co_occurrence",
    "label_co_occurrence.pair",
    *("loop_spectrum", "loop_spectrum.period", "operator_norm", "lyapunov_exponents"),
    *("jacobian_norm", "jacobian_norm.error", "fixed_point_sensitivity", "recurrence_lag"),
    *("cluster_paths", "reasoning_graph", "reasoning_graph.diameter", "shuffled_graphs", "kmeans"),
    *("step_decodability", "step_decodability.last"),
}
# What is near 0, where the state has come to rest.
SMALL = ("successive_difference.late", "path_independence.distance", "classify_trajectory.speed")
DECIMAL = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def _script():
    path = ROOT / "demos" / "metrics_table.py"
    spec = importlib.util.spec_from_file_location("metrics_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = _script()
SHOWN = {key: text for key, text in script.NUMBER.findall(DOCUMENT)}


def _sections() -> dict[str, str]:
    """Text below each heading ``### `name```, up to the next heading."""
    parts = re.split(r"^##+ (.*)$", DOCUMENT, flags=re.M)
    headings = zip(parts[1::2], parts[2::2], strict=True)
    return {title.strip("`"): body for title, body in headings if title.startswith("`")}


SECTIONS = _sections()


@pytest.fixture(scope="module")
def computed():
    torch.set_num_threads(1)
    return script.compute()


def _unit(number: float) -> float:
    """One unit in the last of three printed digits; of large numbers all are printed."""
    if number == 0:
        return 1e-7
    return 10.0 ** min(math.floor(math.log10(abs(number))) - 2, 0)


def _agrees(shown: str, found: str) -> bool:
    """The same words, and numbers that differ by one unit of the last printed digit at most."""
    if DECIMAL.sub("#", shown) != DECIMAL.sub("#", found):
        return False
    pairs = zip(DECIMAL.findall(shown), DECIMAL.findall(found), strict=True)
    numbers = ((float(a), float(b)) for a, b in pairs)
    return all(abs(a - b) <= 1.01 * max(_unit(a), _unit(b)) for a, b in numbers)


def test_agreement_is_to_the_printed_digits():
    for same in (("0.123", "0.124"), ("1", "0.999"), ("3642", "3643"), ("0", "0"), ("a 1", "a 1")):
        assert _agrees(*same), same
    for other in (("0.123", "0.126"), ("1", "1.5"), ("6", "7"), ("3642", "3644"), ("0", "0.01")):
        assert not _agrees(*other), other
    assert not _agrees("1.2 more", "1.2 less")


def test_every_function_has_an_entry_and_no_entry_is_of_another_time():
    assert sorted(SECTIONS) == FUNCTIONS


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_entry_says_formula_source_range_and_number(name):
    body = SECTIONS[name]
    labels = re.findall(r"^- \*\*([^*]+)\*\* \S", body, flags=re.M)
    assert labels == ["Formula", "Source", "Range", "tl-loops-tiny"]
    measured = body.split("**tl-loops-tiny**")[1]
    assert script.NUMBER.search(measured), "no number of the embedded model"
    meaning = script.NUMBER.sub("", measured)
    assert (
        ":" in meaning
        or name in {"exit_distribution", "expected_exit_iteration"}
        or (len(meaning.split()) >= 5)
    ), "nothing says what the number means"


def test_no_line_starts_with_a_comment_which_would_end_a_paragraph():
    assert not re.findall(r"^ *<!--(?:n |/n).*", DOCUMENT, flags=re.M)


def test_every_measurement_has_a_row():
    table = script.TABLE.search(DOCUMENT)[0]
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", table, flags=re.M))
    assert list(rows) == list(MEASUREMENTS)
    for name, row in rows.items():
        cells = [cell.strip() for cell in row.split("|")]
        entry = MEASUREMENTS[name]
        assert cells[:3] == [entry.summary, entry.unit, entry.source]
        without = ("none: it reads the halting gate", "none: no prompt has one")
        assert DECIMAL.search(cells[3]) or cells[3].startswith(without)


def test_every_exit_criterion_has_a_row():
    rows = re.findall(r"^\| `([\w-]+)` \|", SECTIONS["exit_iteration"], flags=re.M)
    assert rows == list(metrics.EXIT_CRITERIA)


def test_numbers_are_those_of_the_model(computed):
    numbers, _ = computed
    assert set(SHOWN) == set(numbers), RERUN
    wrong = {
        key: (SHOWN[key], found)
        for key, found in numbers.items()
        if key not in AMPLIFIED and not _agrees(SHOWN[key], found)
    }
    assert not wrong, f"{wrong}: {RERUN}"


def test_numbers_that_amplify_rounding_are_close(computed):
    numbers, _ = computed
    assert set(numbers) >= AMPLIFIED
    wrong = {}
    for key in AMPLIFIED:
        a, b = DECIMAL.findall(SHOWN[key]), DECIMAL.findall(numbers[key])
        near = len(a) == len(b) and all(
            abs(float(x) - float(y)) <= 0.05 + 0.1 * abs(float(y))
            for x, y in zip(a, b, strict=True)
        )
        if not near:
            wrong[key] = (SHOWN[key], numbers[key])
    assert not wrong, f"{wrong}: {RERUN}"


@pytest.mark.parametrize("key", SMALL)
def test_small_numbers_are_of_the_same_size(computed, key):
    found = float(computed[0][key])
    assert 0 < found < 1e-3
    assert found / 2 <= float(SHOWN[key]) <= 2 * found


def test_the_table_is_that_of_the_model(computed):
    _, table = computed
    shown = script.TABLE.search(DOCUMENT)[0].splitlines()[1:-1]
    wrong = [(a, b) for a, b in zip(shown, table.splitlines(), strict=True) if not _agrees(a, b)]
    assert not wrong, f"{wrong}: {RERUN}"


def test_rewriting_replaces_numbers_and_refuses_unknown_keys():
    text = "a <!--n x-->1<!--/n--> b\n<!--table measurements-->\nold\n<!--/table-->\n"
    new = "a <!--n x-->2<!--/n--> b\n<!--table measurements-->\nnew\n<!--/table-->\n"
    assert script.rewrite(text, {"x": "2"}, "new\n") == new
    assert script.rewrite(new, {"x": "2"}, "new\n") == new
    with pytest.raises(ValueError, match="not measured"):
        script.rewrite(text, {"y": "2"}, "new\n")
    with pytest.raises(ValueError, match="expected one"):
        script.rewrite("<!--n x-->1<!--/n-->", {"x": "2"}, "new\n")


def test_numbers_follow_from_the_formulas():
    """Some entries by their printed formulas, without the metrics and without the script."""
    torch.set_num_threads(1)
    model = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny", device="cpu")
    prompts = tasks.fact_chain_prompts(64, seed=1)
    tokens = model.to_tokens([prompt.text for prompt in prompts])
    with torch.no_grad():
        logits, cache = model.run_with_cache(
            tokens, names_filter=lambda name: "pattern" in name or "resid_post" in name
        )
    pattern, before = cache["iter.7.1.attn.hook_pattern"], cache["iter.6.1.attn.hook_pattern"]
    n = tokens.shape[1]
    entropy = -torch.where(pattern > 0, pattern * pattern.log(), 0.0).sum(-1)
    share = pattern.sum(-2) / n
    x, x_before = cache["iter.7.1.hook_resid_post"], cache["iter.6.1.hook_resid_post"]
    p = torch.linalg.svdvals(x.double()).square()
    p = p / p.sum(-1, keepdim=True)
    spectral = -(p * p.clamp_min(1e-300).log()).sum(-1)
    answers = torch.tensor([model.to_single_token(prompt.answer) for prompt in prompts])
    expected = {
        "sink_score": pattern[..., 0].mean(),
        "sink_rate": (pattern[..., 0].mean(-1) >= 0.3).float().mean(),
        "mixing_score": entropy.mean(),
        "mixing_score.length": entropy.mean() / n,
        "colsum_concentration": (1 + (share * share.log()).sum(-1) / torch.tensor(n).log()).mean(),
        "diagonal_score": pattern.diagonal(0, -2, -1)[..., 1:].mean(),
        "previous_token_score": pattern.diagonal(-1, -2, -1).mean(),
        "pattern_distance": (pattern - before).norm(dim=(-2, -1)).mean(),
        "residual_entropy": spectral.mean(),
        "effective_rank": spectral.exp().mean(),
        "participation_ratio": (1 / p.square().sum(-1)).mean(),
        "residual_norm": x.norm(dim=-1).mean(),
        "cosine_similarity": F.cosine_similarity(x, x_before, dim=-1).mean(),
        "successive_difference": (x - x_before).norm(dim=-1).mean(),
        "predicted_tokens": (logits[:, -1].argmax(-1) == answers).float().mean(),
        "token_probability": logits[:, -1].softmax(-1)[range(64), answers].mean(),
    }
    for name, value in expected.items():
        assert _agrees(SHOWN[name], script.show(value)), (name, SHOWN[name], float(value))
