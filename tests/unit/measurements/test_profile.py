"""Views, tables, merging and files of profiles that are made by hand."""

import json
import sys
from typing import Any

import pandas
import pytest
import torch
from torch import Tensor

from tests.closeness import assert_close
from tl_loops.layout.layout import LoopLayout
from tl_loops.measurements.formats import check_file_ending
from tl_loops.measurements.profile import LoopProfile, Provenance
from tl_loops.measurements.table import COLUMNS
from tl_loops.metrics.stages import align_stages
from tl_loops.runs.moments import Moments

LAYOUT = LoopLayout(n_prelude=2, n_core=3, n_coda=1, n_iterations=4)
DEPTH = LAYOUT.n_layers
OPTIONS = {"sink_rate": {"threshold": 0.3, "strict": False}, "successive_cosine": {"agg": "x"}}
ENDINGS = (".parquet", ".csv", ".json")


def samples(n_prompts: int, seed: int = 0, depth: int = DEPTH) -> Tensor:
    return torch.rand(depth, n_prompts, generator=torch.Generator().manual_seed(seed)).double()


def profile(values: Tensor, layout: LoopLayout | None = LAYOUT, **changes: Any) -> LoopProfile:
    """A metric of all blocks, and for loops one that starts at the second iteration."""
    later = [] if layout is None else range(layout.core_start + layout.n_core, layout.coda_start)
    moments = {"sink_rate": Moments.of(values)}
    if layout is not None:
        moments["successive_cosine"] = Moments.of(values[later]).scattered(later, len(values))
    what: dict[str, Any] = dict(
        model="tiny, or not",
        weights="abc",
        notation=None if layout is None else layout.notation(injected=True),
        n_iterations=None if layout is None else layout.n_iterations,
        n_prompts=values.shape[1],
        n_tokens=7 * values.shape[1],
        tl_loops="0.1.0",
        options={name: OPTIONS[name] for name in moments},
    )
    return LoopProfile(moments, layout, Provenance(**{**what, **changes}))


def assert_identical(a: LoopProfile, b: LoopProfile) -> None:
    assert a.metrics == b.metrics and a.layout == b.layout and a.provenance == b.provenance
    for name in a.metrics:
        for field, tensor in a.moments[name].tensors().items():
            other = getattr(b.moments[name], field)
            assert tensor.dtype == other.dtype
            assert torch.equal(tensor.nan_to_num(nan=-7), other.nan_to_num(nan=-7)), (name, field)


# Views.


def test_statistics_are_those_of_the_samples():
    values = samples(5)
    p = profile(values)
    assert_close(p.mean("sink_rate"), values.mean(-1))
    assert_close(p.std("sink_rate"), values.std(-1))
    assert_close(p.std("sink_rate", ddof=0), values.std(-1, correction=0))
    assert p.count("sink_rate").tolist() == [5] * DEPTH and not p.undefined("sink_rate").any()
    assert torch.equal(p.unrolled("sink_rate", "std"), p.std("sink_rate"))
    first = slice(0, LAYOUT.core_start + LAYOUT.n_core)
    assert p.mean("successive_cosine")[first].isnan().all()
    assert not p.count("successive_cosine")[first].any()


def test_the_three_groupings_hold_the_same_numbers():
    p = profile(samples(3))
    unrolled = p.unrolled("sink_rate")
    by_iteration, by_layer = p.by_iteration("sink_rate"), p.by_layer("sink_rate")
    assert by_iteration.shape == (4, 3) and by_layer.shape == (3, 4)
    for t in range(4):
        for layer in range(3):
            value = unrolled[LAYOUT.index(iteration=t, layer=layer)]
            assert value == by_iteration[t, layer] == by_layer[layer, t]
    whole = p.by_iteration("sink_rate", outer=True)
    assert whole.shape == (4, 6)
    for row in whole:
        assert torch.equal(row[:2], unrolled[:2]) and row[-1] == unrolled[-1]
    assert torch.equal(whole[:, 2:5], by_iteration)


def test_relative_depth_covers_one_pass():
    p = profile(samples(3))
    assert p.pass_depth.tolist() == [0, 20, 40, 60, 80, 100]
    assert p.relative_depth.tolist() == [0, 20, *[40, 60, 80] * 4, 100]
    flat = profile(samples(3, depth=5), layout=None)
    assert flat.relative_depth.tolist() == flat.pass_depth.tolist() == [0, 25, 50, 75, 100]
    one = profile(samples(3, depth=3), LoopLayout(0, 1, 0, 3))
    assert one.relative_depth.tolist() == [0, 0, 0]


def test_a_feedforward_profile_has_the_unrolled_view_alone():
    flat = profile(samples(3, depth=5), layout=None)
    assert flat.unrolled("sink_rate").shape == (5,)
    for view in (flat.by_iteration, flat.by_layer):
        with pytest.raises(ValueError, match="feedforward"):
            view("sink_rate")
    with pytest.raises(ValueError, match="feedforward"):
        flat.to_frame("iteration")


def test_unknown_names_are_refused():
    p = profile(samples(2))
    with pytest.raises(ValueError, match=r"'sink_rates': did you mean sink_rate\?"):
        p.mean("sink_rates")
    with pytest.raises(ValueError, match="it has sink_rate, successive_cosine"):
        p.mean("xyz")


def test_moments_must_fit_the_layout():
    with pytest.raises(ValueError, match="layout has 15 blocks"):
        profile(samples(2, depth=DEPTH + 1), LAYOUT)
    p = profile(samples(2))
    with pytest.raises(ValueError, match="one depth"):
        LoopProfile({**p.moments, "other": Moments.empty(3)}, LAYOUT, p.provenance)


# Tables.


def test_the_table_is_tidy():
    values = samples(4)
    table = profile(values).to_frame()
    assert tuple(table.columns) == COLUMNS
    assert len(table) == DEPTH + 3 * LAYOUT.n_core
    assert not table.duplicated(["metric", "block"]).any()
    row = table[(table.metric == "sink_rate") & (table.block == 9)].iloc[0]
    at = LAYOUT.coordinate(9)
    assert (row.phase, row.iteration, row.layer) == (at.phase, at.iteration, at.layer)
    assert row["mean"] == values[9].mean() and row["count"] == 4 and row.undefined == 0
    assert row["std"] == pytest.approx(values[9].std().item())
    outer = table[table.phase != "core"]
    assert set(outer.phase) == {"prelude", "coda"} and outer.iteration.isna().all()
    assert set(table[table.metric == "successive_cosine"].iteration) == {1, 2, 3}


def test_tables_by_iteration_and_by_layer():
    p = profile(samples(4))
    table = p.to_frame("iteration")
    sinks = table[table.metric == "sink_rate"]
    assert sinks.relative_depth.tolist() == p.pass_depth.tolist() * 4
    assert sinks.iteration.tolist() == [t for t in range(4) for _ in range(6)]
    assert sinks["mean"].tolist() == p.by_iteration("sink_rate", outer=True).flatten().tolist()
    table = p.to_frame("layer")
    sinks = table[table.metric == "sink_rate"]
    assert set(table.phase) == {"core"}
    assert sinks["mean"].tolist() == p.by_layer("sink_rate").flatten().tolist()


def test_undefined_values_stay_visible_in_the_table():
    values = samples(2)
    values[3] = torch.nan
    values[4, 0] = torch.nan
    table = profile(values).to_frame()
    table = table[table.metric == "sink_rate"].set_index("block")
    assert pandas.isna(table["mean"][3]) and (table["count"][3], table.undefined[3]) == (0, 2)
    assert table["mean"][4] == values[4, 1] and table.undefined[4] == 1
    assert pandas.isna(table["std"][4])


# Merging.


def test_merging_is_measuring_together():
    values = samples(7)
    parts = [profile(v) for v in values.split([2, 4, 1], dim=1)]
    merged, whole = parts[0].merge(*parts[1:]), profile(values)
    for name in whole.metrics:
        for of in (LoopProfile.mean, LoopProfile.std):
            assert_close(of(merged, name), of(whole, name), rtol=1e-12, atol=1e-14, equal_nan=True)
    assert merged.provenance == whole.provenance
    assert_identical(whole.merge(), whole)


@pytest.mark.parametrize(
    "changes",
    [
        dict(model="other"),
        dict(weights="def"),
        dict(tl_loops="0.2.0"),
        dict(options={**OPTIONS, "sink_rate": {"threshold": 0.5, "strict": False}}),
    ],
)
def test_profiles_of_different_kinds_do_not_merge(changes):
    with pytest.raises(ValueError, match=f"not of one kind: {next(iter(changes))} is"):
        profile(samples(2)).merge(profile(samples(2), **changes))


def test_profiles_of_different_loops_do_not_merge():
    other = LoopLayout(2, 3, 1, 5)
    with pytest.raises(ValueError, match="not of one kind"):
        profile(samples(2)).merge(profile(samples(2, depth=other.n_layers), other))


# Files.


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("layout", [LAYOUT, None])
def test_a_file_gives_the_same_bits_back(tmp_path, ending, layout):
    values = samples(3)
    values[1] = torch.nan
    values[2, :2] = torch.inf
    saved = profile(values * 1e-3 + 1 / 3, layout)
    saved.save(tmp_path / f"profile{ending}")
    loaded = LoopProfile.load(tmp_path / f"profile{ending}")
    assert_identical(loaded, saved)
    assert [p.name for p in tmp_path.iterdir()] == [f"profile{ending}"]
    assert_identical(loaded.merge(saved), saved.merge(saved))


def test_stacks_survive_a_file(tmp_path):
    layout = LoopLayout(0, 2, 0, 4, stacks=("L", "L", "L", "H"))
    saved = profile(samples(2, depth=8), layout)
    saved.save(tmp_path / "p.csv")
    assert LoopProfile.load(tmp_path / "p.csv").layout == layout


@pytest.mark.parametrize("ending", [".parquet", ".csv"])
def test_tables_read_with_pandas_alone(tmp_path, ending):
    p = profile(samples(3))
    p.save(tmp_path / f"p{ending}")
    read = pandas.read_csv if ending == ".csv" else pandas.read_parquet
    table = read(tmp_path / f"p{ending}")
    assert set(COLUMNS) < set(table.columns)
    assert table["mean"].tolist() == pytest.approx(p.to_frame()["mean"].tolist())
    assert set(table.model) == {"tiny, or not"} and set(table.n_prompts) == {3}
    assert json.loads(table.options[0]) == OPTIONS["sink_rate"]


def test_json_is_strict_json(tmp_path):
    values = samples(1)
    values[0] = torch.nan
    profile(values).save(tmp_path / "p.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads((tmp_path / "p.json").read_text(), parse_constant=refuse)
    assert content["rows"][0]["mean"] is None and content["n_iterations"] == 4


@pytest.mark.parametrize("name", ["p.txt", "p", "p.CSV.gz"])
def test_other_endings_are_refused(tmp_path, name):
    for use in (profile(samples(1)).save, LoopProfile.load, check_file_ending):
        with pytest.raises(ValueError, match=r"expected \.parquet, \.csv, \.json"):
            use(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_without_a_profile_are_refused(tmp_path, ending):
    path = tmp_path / f"p{ending}"
    with pytest.raises(FileNotFoundError):
        LoopProfile.load(path)
    profile(samples(2)).save(path)
    whole = path.read_bytes()
    for content in (b"", b"metric,block\nsink_rate,1\n", b"{}", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"p{ending} holds no whole profile"):
            LoopProfile.load(path)


def test_a_table_of_two_profiles_is_refused(tmp_path):
    for name in ("a", "b"):
        profile(samples(2), weights=name).save(tmp_path / f"{name}.csv")
    lines = (tmp_path / "b.csv").read_text().splitlines(keepends=True)[1:]
    with (tmp_path / "a.csv").open("a") as stream:
        stream.writelines(lines)
    with pytest.raises(ValueError, match="2 profiles"):
        LoopProfile.load(tmp_path / "a.csv")


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        profile(samples(2)).save(tmp_path / "nowhere" / "p.csv")


def test_parquet_without_pyarrow_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for use in (profile(samples(1)).save, check_file_ending):
        with pytest.raises(ImportError, match=r"tl-loops\[parquet\].*\.csv"):
            use(tmp_path / "p.parquet")
    check_file_ending(tmp_path / "p.csv")


# Stages and plots.


def test_stages_are_aligned_curve_by_curve():
    values = samples(3)
    p, reference = profile(values), profile(samples(3, seed=1, depth=8), layout=None)
    curves = (p.by_iteration("sink_rate"), p.by_iteration("sink_rate", outer=True))
    for outer, curve in zip((False, True), curves, strict=True):
        aligned = p.align_stages(reference, "sink_rate", outer=outer)
        expected = align_stages(curve, reference.mean("sink_rate"))
        assert torch.equal(aligned.rmse, expected.rmse) and aligned.rmse.shape == (4,)
        assert torch.equal(aligned.window_start, expected.window_start)


def test_a_block_that_was_cut_out_is_found_again():
    reference = profile(samples(3, depth=8), layout=None)
    source = samples(3, depth=8)[2:5].repeat(4, 1)
    p = profile(torch.cat([samples(3, 1, 2), source, samples(3, 2, 1)]))
    aligned = p.align_stages(reference, "sink_rate")
    assert aligned.window_start.tolist() == [2] * 4
    assert (aligned.window_rmse < 1e-12).all()
    itself = reference.align_stages(reference, "sink_rate")
    assert itself.rmse == 0 and itself.pearson == pytest.approx(1.0)


def test_stages_of_other_options_are_not_compared():
    options = {"sink_rate": {"threshold": 0.9, "strict": False}}
    reference = profile(samples(3, depth=8), layout=None, options=options)
    with pytest.raises(ValueError, match="other options"):
        profile(samples(3)).align_stages(reference, "sink_rate")
    with pytest.raises(ValueError, match="no metric 'successive_cosine'"):
        profile(samples(3)).align_stages(reference, "successive_cosine")


def test_plots_are_drawn_by_plot_profile(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "tl_loops.measurements.profile.plot_profile",
        lambda *a, **k: drawn.append((a, k)) or "figure",
    )
    p = profile(samples(2))
    assert p.plot("successive_cosine", by="layer", title="x") == "figure"
    assert drawn == [((p, "successive_cosine"), {"by": "layer", "title": "x"})]


def test_a_plot_names_its_metric_and_its_library(monkeypatch):
    p = profile(samples(2))
    assert p.plot("successive_cosine", backend="matplotlib").get_axes()[0].get_ylabel().startswith(
        "successive cosine"
    )  # fmt: skip
    with pytest.raises(ValueError, match="no metric"):
        p.plot("xyz")
    monkeypatch.setitem(sys.modules, "tl_loops.drawing.plotly_figure", None)
    with pytest.raises(ImportError, match=r"tl-loops\[plots\]"):
        p.plot(backend="plotly")


def test_the_text_form_is_short():
    assert "(2, 3⊗4, 1)_I, 2 prompts" in repr(profile(samples(2)))
    assert "5 layers" in repr(profile(samples(2, depth=5), layout=None))
