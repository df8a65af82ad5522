"""Every public method of TransformerLens has a row in docs/guarantees.md, and each row is true."""

import ast
import inspect
import re
from collections import Counter
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from transformer_lens import ActivationCache, SVDInterpreter, head_detector, patching

from tests.closeness import assert_close
from tests.models import any_model, tiny_tokens
from tl_loops import HookedTransformer, LoopedSemanticsError, LoopedTransformer
from tl_loops.cache.cache import LoopedActivationCache
from tl_loops.upstream import HAS_HOOKED_TRANSFORMER
from tl_loops.upstream.guards import GUARDED_FUNCTIONS, GUARDED_METHODS

TESTS = Path(__file__).parents[2]
DOCUMENT = TESTS.parent / "docs" / "guarantees.md"
SUBJECTS = {
    "ActivationCache": ActivationCache,
    "transformer_lens.patching": patching,
    "transformer_lens.head_detector": head_detector,
    "SVDInterpreter": SVDInterpreter,
    "HookedTransformer": HookedTransformer,
}
LINES = ("3.9", "4.3")
"""The lines of TransformerLens that have a column, and the one that is installed."""
LINE = LINES[0] if HAS_HOOKED_TRANSFORMER else LINES[1]
SPECIAL = ("__getitem__", "__iter__", "__len__", "__call__", "__contains__")


def public_names(subject):
    """What a user can call or read, as far as TransformerLens defines it."""
    if isinstance(subject, ModuleType):
        return {
            name
            for name, value in vars(subject).items()
            if not name.startswith("_")
            and (
                isinstance(value, partial)
                or (inspect.isfunction(value) and value.__module__ == subject.__name__)
                or (inspect.isclass(value) and value.__module__ == subject.__name__)
            )
        }
    # On 4.x the stand-in for HookedTransformer counts as what TransformerLens defines.
    theirs = ("transformer_lens", "tl_loops.upstream")
    own = [c for c in subject.__mro__ if c.__module__.startswith(theirs)]
    names = {name for c in own for name in vars(c)}
    return {name for name in names if not name.startswith("_") or name in SPECIAL}


def read_rows():
    """Rows by table: name, the four words, what holds, tests; and the lines that have each."""
    tables: dict[str, list[tuple[str, list[str], str, list[str]]]] = {}
    lines: dict[tuple[str, str], set[str]] = {}
    title = ""
    for line in DOCUMENT.read_text().splitlines():
        if line.startswith("## "):
            title = line[3:]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 9:
            name, tests = cells[0].strip("`"), re.findall(r"`([^`]+)`", cells[8])
            tables.setdefault(title, []).append((name, cells[1:5], cells[7], tests))
            has = dict(zip(LINES, cells[5:7], strict=True))
            assert set(has.values()) <= {"yes", "–"}, name
            lines[title, name] = {number for number, word in has.items() if word == "yes"}
    return tables, lines


ROWS, HAVE = read_rows()
ALL_ROWS = [(title, row) for title, rows in ROWS.items() for row in rows]


@pytest.mark.parametrize("title", SUBJECTS)
def test_every_public_method_has_one_row(title):
    counts = Counter(name for name, *_ in ROWS[title])
    assert max(counts.values()) == 1, counts.most_common(1)
    here = {name for name in counts if LINE in HAVE[title, name]}
    missing = public_names(SUBJECTS[title]) - here
    stale = here - public_names(SUBJECTS[title])
    if title == "HookedTransformer":  # On 4.x the stand-in has only what needs no looped model.
        stale = {name for name in stale if not hasattr(LoopedTransformer, name)}
    assert not missing, f"no row in docs/guarantees.md for {sorted(missing)}"
    assert not stale, f"TransformerLens {LINE} does not have {sorted(stale)}"


def test_every_guarded_tool_is_named():
    section = DOCUMENT.read_text().split("## TransformerBridge of a looped model")[1]
    for names in (*GUARDED_FUNCTIONS.values(), *GUARDED_METHODS.values()):
        for name in names:
            assert f"`{name.rstrip('_')}" in section, name


def test_only_these_tables_are_there():
    assert set(ROWS) == set(SUBJECTS)


@pytest.fixture(scope="module")
def known_tests():
    known = {}
    for path in TESTS.rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        known[path.name] = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    return known


def test_rows_say_what_they_must(known_tests):
    for title, (name, words, what, tests) in ALL_ROWS:
        where = f"{title}: {name}"
        assert set(words) <= {"exact", "segment", "raises"}, where
        assert what, where
        assert tests, where
        for test in tests:
            file, _, function = test.partition("::")
            assert function in known_tests.get(file, ()), f"{where}: there is no test {test}"


def wild_rows():
    """Rows of "Found in the wild": kind, what happened, what happens now, tests."""
    section = DOCUMENT.read_text().split("## Found in the wild")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row[1:-1])] for row in rows]


def test_every_kind_that_was_found_has_a_fix_and_a_test(known_tests):
    rows = wild_rows()
    assert len({kind for kind, *_ in rows}) == len(rows) > 50
    for kind, before, now, named in rows:
        assert before and now, kind
        tests = [
            re.fullmatch(r"`(tests/[\w/]+(?:/|\.py))(?:::(\w+))?`", x) for x in named.split(", ")
        ]
        assert all(tests), (
            f"{kind}: a test is `tests/...py` or `tests/...py::test_...`, got {named}"
        )
        for path, function in (test.groups() for test in tests if test):
            assert (TESTS.parent / path).exists(), f"{kind}: there is no {path}"
            known = known_tests.get(Path(path).name, ())
            assert function is None or function in known, f"{kind}: no {function} in {path}"


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(example, names)
    last = names["cache"]["resid_post", -1]
    rounding = 1e-6 * float(last.abs().max())  # the stream of the embedded model is long
    assert_close(names["stack"].sum(0), last, rtol=1e-4, atol=rounding)
    assert_close(names["late"].sum(0), last, rtol=1e-4, atol=rounding)
    assert all(name.startswith("r1.L") for name in names["names"])


# What the table says is refused, is.

MODEL = any_model("biased_sandwich")
CACHE = MODEL.run_with_cache(tiny_tokens())[1]
STATE = MODEL.state_dict()
REFUSED = {
    ("ActivationCache", "compute_ssm_state"): lambda: CACHE.compute_ssm_state(),
    ("ActivationCache", "compute_ssm_effective_attention"): lambda: (
        CACHE.compute_ssm_effective_attention()
    ),
    ("HookedTransformer", "fill_missing_keys"): lambda: MODEL.fill_missing_keys(STATE),
    ("HookedTransformer", "fold_layer_norm"): lambda: MODEL.fold_layer_norm(STATE),
    ("HookedTransformer", "center_writing_weights"): lambda: MODEL.center_writing_weights(STATE),
    ("HookedTransformer", "center_unembed"): lambda: MODEL.center_unembed(STATE),
    ("HookedTransformer", "fold_value_biases"): lambda: MODEL.fold_value_biases(STATE),
    ("HookedTransformer", "refactor_factored_attn_matrices"): lambda: (
        MODEL.refactor_factored_attn_matrices(STATE)
    ),
    ("HookedTransformer", "load_sample_training_dataset"): lambda: (
        MODEL.load_sample_training_dataset()
    ),
    ("HookedTransformer", "accumulated_bias"): lambda: MODEL.accumulated_bias(2),
}
"""A call for every method that the table refuses, on all models or outside its segment."""
if not HAS_HOOKED_TRANSFORMER:
    for name in ("get_act_patch_direct_path", "get_act_patch_direct_path_all_sources"):
        REFUSED["transformer_lens.patching", name] = partial(getattr(patching, name), MODEL)


def test_every_refusal_is_called_here():
    limited = {(t, name) for t, (name, words, *_) in ALL_ROWS if set(words) != {"exact"}}
    assert {key for key in limited if LINE in HAVE[key]} == set(REFUSED)


@pytest.mark.parametrize("key", REFUSED, ids=lambda key: key[1])
def test_what_is_refused_says_so(key):
    with pytest.raises(LoopedSemanticsError) as error:
        REFUSED[key]()
    assert len(str(error.value)) > 40  # a reason, and what to do


# What a looped class replaces still takes TransformerLens's arguments.


def replaced(ours, upstream):
    for name in sorted(public_names(upstream)):
        method, original = getattr(ours, name), getattr(upstream, name)
        if callable(original) and method is not original and inspect.isfunction(original):
            yield name, method, original


REPLACED = [
    pytest.param(method, original, id=f"{ours.__name__}.{name}")
    for ours, upstream in (
        (LoopedActivationCache, ActivationCache),
        (LoopedTransformer, HookedTransformer),
    )
    for name, method, original in replaced(ours, upstream)
]


@pytest.mark.parametrize("method, original", REPLACED)
def test_replaced_methods_take_the_same_arguments(method, original):
    ours = inspect.signature(method).parameters
    if any(p.kind is p.VAR_POSITIONAL for p in ours.values()):
        return
    positional = [n for n, p in ours.items() if p.kind is not p.KEYWORD_ONLY]
    for place, (name, parameter) in enumerate(inspect.signature(original).parameters.items()):
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        same_place = place < len(positional) and positional[place] == name
        assert same_place, f"{name} is argument {place} of TransformerLens's {original.__name__}"
        if parameter.default is not parameter.empty:
            default = ours[name].default  # None may stand for an empty list
            assert default == parameter.default or not (default or parameter.default), name


def test_properties_stay_properties():
    for name in public_names(HookedTransformer):
        if isinstance(inspect.getattr_static(HookedTransformer, name), property):
            assert isinstance(inspect.getattr_static(LoopedTransformer, name), property), name
