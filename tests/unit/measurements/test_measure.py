"""Streamed measurements against the same metrics on full caches, and how a run behaves."""

import gc
import importlib
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tl_loops
import tl_loops.runs.batch_file
import tl_loops.writing
from tests.closeness import assert_close
from tests.feedforward import plain_model
from tests.models import ARCHITECTURES, tiny_model
from tl_loops.errors import CheckpointError
from tl_loops.measurements import DEFAULT_METRICS, MEASUREMENTS
from tl_loops.measurements.measure import available_metrics, measure
from tl_loops.measurements.profile import LoopProfile
from tl_loops.metrics import (
    attention,
    dynamics,
    exits,
    geometry,
    massive,
    pairwise,
    paths,
    residual,
    settling,
)
from tl_loops.metrics.trajectories import TRAJECTORY_LABELS, classify_trajectory
from tl_loops.runs.batch_file import read_file

N_ITERATIONS = 4
LENGTHS = (9, 5, 9)
FAST_METRICS = ("sink_score", "successive_difference", "fixed_point_distance")


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (n,), generator=generator) for n in lengths]


@cache
def looped(architecture: str):
    return tiny_model(architecture)


@cache
def feedforward(**changes: Any) -> Any:
    return plain_model(
        n_layers=4, d_model=32, d_head=8, n_heads=4, d_mlp=48, d_vocab=50, n_ctx=64, act_fn="gelu",
        seed=0, device="cpu", **changes,
    )  # fmt: skip


@cache
def whole_profile(architecture: str) -> LoopProfile:
    model = looped(architecture)
    return measure(model, prompts(), "all", N_ITERATIONS, batch_size=2, progress=False)


def quiet(model: Any, given: list[Tensor], metrics: Any = DEFAULT_METRICS, **arguments: Any):
    return measure(model, given, metrics, progress=False, **arguments)


def assert_same_moments(a: LoopProfile, b: LoopProfile, rtol: float, atol: float) -> None:
    assert set(a.metrics) == set(b.metrics)
    for name in a.metrics:
        assert torch.equal(a.count(name), b.count(name)), name
        assert torch.equal(a.undefined(name), b.undefined(name)), name
        for of in (LoopProfile.mean, LoopProfile.std):
            x, y = of(a, name), of(b, name)
            assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True, msg=name)


def assert_identical(a: LoopProfile, b: LoopProfile) -> None:
    assert a.metrics == b.metrics and a.layout == b.layout and a.provenance == b.provenance
    for name in a.metrics:
        for field, tensor in a.moments[name].tensors().items():
            other = getattr(b.moments[name], field)
            assert torch.equal(tensor.nan_to_num(nan=-7), other.nan_to_num(nan=-7)), (name, field)


# Streamed against full caches.


def on_full_cache(model: Any, tokens: Tensor) -> dict[str, dict[int, Tensor]]:
    """Every metric of one prompt by block, from one full cache and nothing else."""
    with torch.no_grad():
        _, cached = model.run_with_cache(tokens[None])
    depth = model.cfg.n_layers
    patterns = torch.stack([cached["pattern", i][0] for i in range(depth)])
    resid = torch.stack([cached["resid_post", i][0] for i in range(depth)])
    heads: dict[str, Tensor] = {
        "sink_score": attention.sink_score(patterns),
        "mixing_score": attention.mixing_score(patterns),
        "mixing_score_log": attention.mixing_score(patterns, "log"),
        "mixing_score_length": attention.mixing_score(patterns, "length"),
        "mixing_score_row": attention.mixing_score(patterns, "row"),
        "colsum_concentration": attention.colsum_concentration(patterns),
        "sink_identity_index": attention.sink_identity_index(patterns),
        "diagonal_score": attention.diagonal_score(patterns),
        "previous_token_score": attention.previous_token_score(patterns),
    }
    everywhere = {name: score.mean(-1) for name, score in heads.items()} | {
        "sink_rate": attention.sink_rate(patterns),
        "residual_entropy": residual.residual_entropy(resid),
        "residual_entropy_log_T": residual.residual_entropy(resid, normalize="log_T"),
        "effective_rank": residual.effective_rank(resid),
        "participation_ratio": residual.participation_ratio(resid),
        "residual_norm": residual.residual_norm(resid),
        "bos_norm_ratio": massive.bos_norm_ratio(resid),
        "massive_activations": massive.massive_activations(resid).count,
        "anisotropy": geometry.anisotropy(resid),
        "token_curvature": geometry.token_curvature(resid),
    }
    values = {name: dict(enumerate(v)) for name, v in everywhere.items()}
    if not hasattr(model, "layout"):
        return values

    layout = model.layout
    X, A = layout.by_iteration(resid), layout.by_iteration(patterns)  # [iteration, layer, ...]
    T = layout.n_iterations

    def place(series: Tensor, first: int = 0) -> dict[int, Tensor]:
        """[iteration, layer] as values of blocks, the first row at iteration ``first``."""
        return {
            layout.index(iteration=first + t, layer=layer): series[t, layer]
            for t in range(series.shape[0])
            for layer in range(layout.n_core)
        }

    values |= {
        "successive_difference": place(dynamics.successive_difference(X), 1),
        "successive_difference_relative": place(
            dynamics.successive_difference(X, relative=True), 1
        ),
        "successive_cosine": place(dynamics.successive_cosine(X), 1),
        "step_angles": place(dynamics.step_angles(X).mean(-1), 2),
        "acceleration": place(dynamics.acceleration(X).mean(-1), 2),
        "fixed_point_distance": place(dynamics.fixed_point_distance(X)[:-1]),
        "fixed_point_distance_relative": place(
            dynamics.fixed_point_distance(X, relative=True)[:-1]
        ),
        "fixed_point_cosine": place(dynamics.fixed_point_cosine(X)[:-1]),
        "attention_successive_difference": place(pairwise.pattern_distance(A[1:], A[:-1]), 1),
        "attention_fixed_point_distance": place(pairwise.pattern_distance(A[:-1], A[-1:])),
    }
    parts = paths.step_components(X)
    values |= {
        "radial_step": place(parts.radial.mean(-1), 1),
        "tangential_step": place(parts.tangential.mean(-1), 1),
        "norm_ratio": place(parts.norm_ratio.mean(-1), 1),
    }
    labels = classify_trajectory(X).labels  # [layer, pos]
    for label in TRAJECTORY_LABELS:
        share = torch.from_numpy((labels == label).mean(-1))
        values[f"trajectory_{label}"] = place(share[None], T - 1)
    ends = [layout.index(iteration=t, layer=-1) for t in range(T)]
    states = torch.stack([cached[f"iter.{t}.hook_state_out"][0] for t in range(T)])
    values["state_entropy"] = dict(zip(ends, residual.residual_entropy(states), strict=True))
    values["state_norm"] = dict(zip(ends, residual.residual_norm(states), strict=True))
    curve = paths.recurrence_curve(states).mean(-1)
    values |= {
        "late_drift": {ends[-1]: settling.late_drift(states).mean(-1)},
        "path_efficiency": {ends[-1]: paths.path_efficiency(states).mean(-1)},
        "directional_persistence": {ends[-1]: paths.directional_persistence(states).mean(-1)},
    }
    if T >= 6:
        values["recurrence_lag"] = {ends[-1]: paths.recurrence_lag(curve)}
    if model.cfg.exit_gate:
        gates = torch.stack([cached[f"iter.{t}.hook_exit_gate"][0, :, 0] for t in range(T)])
        probability = exits.exit_distribution(gates).mean(-1)
        values["exit_probability"] = dict(zip(ends, probability, strict=True))
        mean = exits.expected_exit_iteration(gates).mean(-1)
        values["expected_exit_iteration"] = {ends[-1]: mean}
    return values


def assert_streamed_is_cached(profile: LoopProfile, model: Any, given: list[Tensor]) -> None:
    cached = [on_full_cache(model, tokens) for tokens in given]
    assert set(profile.metrics) == set(cached[0])
    for name in profile.metrics:
        blocks = cached[0][name]
        measured = profile.count(name) + profile.undefined(name)
        assert measured.nonzero().flatten().tolist() == sorted(blocks), name
        for block in blocks:
            values = torch.stack([c[name][block].double() for c in cached])
            got = (profile.mean(name)[block], profile.std(name)[block])
            expected = (values.mean(), values.std())
            nowhere = bool(values.isnan().all())  # no prompt comes back: no lag
            message = f"{name} {block}"
            assert_close(got, expected, rtol=1e-4, atol=2e-5, equal_nan=nowhere, msg=message)


def test_the_path_of_the_states_is_streamed_over_any_number_of_iterations():
    """More iterations than states are held, on an orbit that a hook makes of the states."""
    model, given = looped("retrofitted"), prompts()[:1]
    names = {
        "late_drift": {"window": 7, "relative": True},
        "recurrence_lag": {"min_depth": 0.3},
        "path_efficiency": {},
        "directional_persistence": {},
    }
    seen: list[Tensor] = []

    def turn(state: Tensor, hook: Any) -> Tensor:
        angle = torch.tensor(2 * torch.pi * int(hook.name.split(".")[1]) / 5.1)
        state = torch.zeros_like(state)
        state[..., 0], state[..., 1], state[..., 2] = angle.cos(), angle.sin(), 2.0
        seen.append(state)
        return state

    with model.iterations(37), model.hooks([(lambda n: n.endswith("hook_state_out"), turn)]):
        profile = quiet(model, given, names)
        last = model.layout.index(iteration=-1, layer=-1)
    states = torch.stack(seen)[:, 0]
    assert len(states) == 37
    expected = {
        "late_drift": settling.late_drift(states, 7, relative=True).mean(),
        "path_efficiency": paths.path_efficiency(states).mean(),
        "directional_persistence": paths.directional_persistence(states).mean(),
        "recurrence_lag": torch.tensor(5.0),
    }
    for name, value in expected.items():
        assert float(profile.mean(name)[last]) == pytest.approx(float(value), rel=1e-5), name
        assert int(profile.count(name).sum()) == 1


def test_a_path_needs_its_iterations():
    model = looped("retrofitted")
    with pytest.raises(ValueError, match="needs 6 iterations or more, but there are 5"):
        quiet(model, prompts(), "recurrence_lag", n_iterations=5)
    with pytest.raises(ValueError, match="needs 2 iterations or more, but there are 1"):
        quiet(model, prompts(), "late_drift", n_iterations=1)
    with pytest.raises(ValueError, match="no option 'windov'"):
        quiet(model, prompts(), {"late_drift": {"windov": 2}})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_streamed_metrics_are_those_of_full_caches(architecture):
    model = looped(architecture)
    with model.iterations(N_ITERATIONS):
        assert_streamed_is_cached(whole_profile(architecture), model, prompts())


def test_a_feedforward_model_is_measured_alike():
    model = feedforward()
    profile = quiet(model, prompts(), "all", batch_size=2)
    assert_streamed_is_cached(profile, model, prompts())
    assert profile.layout is None and profile.provenance.n_iterations is None
    assert profile.to_frame().iteration.isna().all()


def test_a_bfloat16_model_is_measured_in_float32():
    model = tiny_model("ouro", dtype=torch.bfloat16)
    profile = quiet(model, prompts((9, 5)), ("mixing_score", "residual_entropy"))
    caches = []
    for tokens in prompts((9, 5)):
        cached = model.run_with_cache(tokens[None])[1]
        assert cached["pattern", 0].dtype == torch.bfloat16
        caches.append({name: tensor.float().detach() for name, tensor in cached.items()})
    for block in range(model.cfg.n_layers):
        patterns = [c[f"blocks.{block}.attn.hook_pattern"][0] for c in caches]
        resids = [c[f"blocks.{block}.hook_resid_post"][0] for c in caches]
        mixing = torch.stack([attention.mixing_score(p, validate=False).mean() for p in patterns])
        entropy = torch.stack([residual.residual_entropy(r) for r in resids])
        # bfloat16 statistics would be off by about 4e-3.
        assert profile.mean("mixing_score")[block].item() == pytest.approx(
            mixing.mean().item(), 1e-5
        )
        assert profile.mean("residual_entropy")[block].item() == pytest.approx(
            entropy.mean().item(), 1e-5
        )


def test_values_lie_inside_their_bounds():
    for name, moments in whole_profile("ouro").moments.items():
        low, high = MEASUREMENTS[name].bounds
        seen = moments.mean[moments.count > 0]
        assert seen.numel() and (seen >= low - 1e-6).all() and (seen <= high + 1e-6).all(), name


# What does not change the numbers.


@pytest.mark.parametrize(("batch_size", "reverse"), [(1, False), (100, True)])
def test_neither_batch_size_nor_order_matter(batch_size, reverse):
    model, given = looped("ouro"), prompts()[::-1] if reverse else prompts()
    other = quiet(model, given, "all", n_iterations=N_ITERATIONS, batch_size=batch_size)
    assert_same_moments(whole_profile("ouro"), other, rtol=1e-4, atol=2e-5)


def test_the_same_call_gives_the_same_bits():
    a, b = (quiet(looped("huginn"), prompts(), FAST_METRICS, batch_size=2) for _ in range(2))
    assert_identical(a, b)


def test_shards_merge_to_the_whole_run():
    model, given = looped("retrofitted"), prompts()
    shards = [quiet(model, part, FAST_METRICS) for part in (given[:1], given[1:])]
    merged = shards[0].merge(*shards[1:])
    whole = quiet(model, given, FAST_METRICS)
    assert_same_moments(merged, whole, rtol=1e-5, atol=1e-6)
    assert merged.provenance == whole.provenance


def test_the_model_is_left_as_it_was():
    model = tiny_model("huginn")
    before, blocks = model.cfg.n_iterations, list(model.blocks)
    with torch.no_grad():
        logits = model(prompts()[0])
        quiet(model, prompts((5,)), FAST_METRICS, n_iterations=7)
        assert model.cfg.n_iterations == before and list(model.blocks) == blocks
        assert not any(point.fwd_hooks for point in model.hook_dict.values())
        assert torch.equal(model(prompts()[0]), logits)


def test_ids_of_padding_are_tokens_like_others():
    """A mask of ones is passed, so that nothing is taken for padding by its id."""
    model = looped("retrofitted")
    given = prompts((7,))
    seen: list[Tensor] = []

    def spy(*args: Any, attention_mask: Tensor, **kwargs: Any) -> None:
        seen.append(attention_mask)
        return type(model).run_with_hooks(model, *args, attention_mask=attention_mask, **kwargs)

    model.run_with_hooks = spy
    try:
        quiet(model, given, "residual_norm")
    finally:
        del model.run_with_hooks
    assert seen and all(mask.shape == (1, 7) and mask.all() for mask in seen)


# What does change them.


def test_hooks_on_the_model_act():
    """An ablated model is measured as it runs: zeroed MLPs leave a smaller residual stream."""
    model = looped("retrofitted")
    ablation = [("blocks.1.hook_mlp_out", lambda x, hook: torch.zeros_like(x))]
    with model.hooks(fwd_hooks=ablation):
        ablated = quiet(model, prompts(), "residual_norm")
    plain = quiet(model, prompts(), "residual_norm")
    assert ablated.mean("residual_norm")[0] == plain.mean("residual_norm")[0]
    assert ablated.mean("residual_norm")[1] != plain.mean("residual_norm")[1]


def test_options_reach_the_metric():
    model = looped("ouro")
    profile = quiet(model, prompts(), {"sink_rate": {"threshold": 0.0}, "sink_score": {}})
    assert (profile.mean("sink_rate") == 1).all()
    assert profile.provenance.options["sink_rate"]["threshold"] == 0.0
    assert profile.provenance.options["sink_rate"]["strict"] is False


def test_fresh_initial_states_are_shared_by_the_two_passes():
    """Without a seed each pass draws anew; the reference must come from the measured draw."""
    model = tiny_model("huginn", state_seed=None)
    states = {}

    def keep(x: Tensor, hook: Any) -> None:
        states[hook.name] = x

    start = model.layout.core_start
    names = [f"blocks.{start + t * 2}.hook_resid_post" for t in range(3)]
    with model.hooks(fwd_hooks=[(name, keep) for name in names]):
        profile = quiet(model, prompts((9,)), "fixed_point_distance")
    distance = (states[names[0]] - states[names[2]]).norm(dim=-1).mean()
    assert profile.mean("fixed_point_distance")[start].item() == pytest.approx(
        distance.item(), 1e-5
    )


def test_undefined_scores_are_counted_and_never_zero():
    profile = quiet(looped("ouro"), prompts((1, 9)), ("sink_rate", "mixing_score"))
    assert (profile.count("sink_rate") == 1).all() and (profile.undefined("sink_rate") == 1).all()
    assert (profile.count("mixing_score") == 2).all()  # 0 for one token, by its definition
    alone = quiet(looped("ouro"), prompts((1,)), "sink_rate")
    assert alone.mean("sink_rate").isnan().all()


# Memory.


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


HOLDING = (
    "residual_norm",
    "acceleration",
    "attention_successive_difference",
    "fixed_point_distance",
    "attention_fixed_point_distance",
    "trajectory_slider",
)
"""Metrics of every kind that keeps something for later."""


@pytest.mark.parametrize("architecture", ["ouro", "huginn"])
def test_what_is_held_does_not_grow_with_the_iterations(architecture):
    model = tiny_model(architecture, n_ctx=128)
    gc.collect()
    gc.freeze()  # What is there already is not looked at again and again.

    def measured(n_iterations: int) -> int:
        """Most bytes held at the end of an iteration, beyond what was there before."""
        gc.collect()
        before, peak = live_bytes(), 0

        def look(x: Tensor, hook: Any) -> None:
            nonlocal peak
            peak = max(peak, live_bytes() - before)

        names = [f"iter.{t}.hook_state_out" for t in (3, n_iterations - 1)]
        with model.iterations(n_iterations), model.hooks(fwd_hooks=[(n, look) for n in names]):
            quiet(model, prompts((96, 96)), HOLDING, batch_size=2)
        return peak

    try:
        held = {n: measured(n) for n in (4, 16)}
    finally:
        gc.unfreeze()
    assert held[4] > 0
    assert held[16] <= 1.05 * held[4], held


# Checkpoints.


def interrupt_after(model: Any, n_passes: int) -> Callable[[], None]:
    """Make the model fail in the middle of a later pass; returns what heals it."""
    passes = 0

    def fail(x: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if passes > n_passes:
            raise KeyboardInterrupt
        return x

    # Not a hook: a run with hooks has no checkpoint.
    point = model.blocks[2].hook_resid_mid
    point.forward = fail
    return lambda: delattr(point, "forward")


@pytest.mark.parametrize("n_passes", [0, 1, 3])
def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, n_passes):
    path, metrics = tmp_path / "run.ckpt", (*FAST_METRICS, "trajectory_slider")
    model = tiny_model("retrofitted")
    whole = quiet(model, prompts(), metrics, batch_size=2)
    heal = interrupt_after(model, n_passes)
    with pytest.raises(KeyboardInterrupt):
        quiet(model, prompts(), metrics, batch_size=2, checkpoint=path)
    heal()
    assert_identical(quiet(model, prompts(), metrics, batch_size=2, checkpoint=path), whole)


def test_a_complete_run_answers_without_running_the_model(tmp_path):
    path, model = tmp_path / "run.ckpt", tiny_model("retrofitted")
    whole = quiet(model, prompts(), FAST_METRICS, checkpoint=path)
    interrupt_after(model, 0)
    assert_identical(quiet(model, prompts(), FAST_METRICS, checkpoint=path), whole)


def test_another_batch_size_is_another_run(tmp_path):
    """It would round otherwise, so that a resumed run would not have the bits of a whole one."""
    path, model = tmp_path / "run.ckpt", tiny_model("retrofitted")
    quiet(model, prompts(), FAST_METRICS, batch_size=2, checkpoint=path)
    with pytest.raises(CheckpointError, match="another run: batch_size is 2 there and 1 in this"):
        quiet(model, prompts(), FAST_METRICS, batch_size=1, checkpoint=path)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failed_write_leaves_the_checkpoint_before(tmp_path, monkeypatch, failure):
    path, model = tmp_path / "run.ckpt", tiny_model("retrofitted")
    whole = quiet(model, prompts(), FAST_METRICS, batch_size=2)
    sizes = []

    def failing(descriptor: int) -> None:
        sizes.append(path.stat().st_size)
        if len(sizes) == 2:  # the second batch
            raise failure

    with monkeypatch.context() as patch:
        patch.setattr(tl_loops.runs.batch_file, "write_whole", Path.write_bytes)
        patch.setattr(tl_loops.writing.os, "fsync", failing)
        with pytest.raises(type(failure) if isinstance(failure, OSError) else failure) as error:
            quiet(model, prompts(), FAST_METRICS, batch_size=2, checkpoint=path)
    if isinstance(failure, OSError):
        assert "run.ckpt" in str(error.value) and "No space left" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]
    assert path.stat().st_size == sizes[0]
    resumed = quiet(model, prompts(), FAST_METRICS, batch_size=2, checkpoint=path)
    assert_identical(resumed, whole)


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import tl_loops.runs.in_batches as in_batches
from tests.models import tiny_model
from tests.unit.measurements.test_measure import FAST_METRICS, prompts
from tl_loops import measure

append, calls = in_batches.append_batch, 0
def killing(path, n_bytes, number, tensors):
    global calls
    calls += 1
    end = append(path, n_bytes, number, tensors)
    if calls == 2:  # only a part of the second batch has reached the disk
        os.truncate(path, end - 100)
        os.kill(os.getpid(), signal.SIGKILL)
    return end
in_batches.append_batch = killing
measure(tiny_model("retrofitted"), prompts(), FAST_METRICS, batch_size=2, progress=False,
        checkpoint=sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_bits(tmp_path):
    path = tmp_path / "run.ckpt"
    root = Path(__file__).parents[3]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    saved = read_file(path)
    assert saved is not None and list(saved.batches) == [0] and path.stat().st_size > saved.n_bytes
    model = tiny_model("retrofitted")
    resumed = quiet(model, prompts(), FAST_METRICS, batch_size=2, checkpoint=path)
    assert_identical(resumed, quiet(model, prompts(), FAST_METRICS, batch_size=2))


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (dict(prompts=prompts(seed=1)), "prompts"),
        (dict(prompts=prompts()[::-1]), "prompts"),
        (dict(metrics=("residual_norm",)), "metrics"),
        (dict(metrics={"sink_score": {"position": 1}, "residual_norm": {}}), "metrics"),
        (dict(n_iterations=4), "n_iterations"),
        (dict(weight=1e-3), "weights"),
        (dict(eps=1e-5), "weights"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changed, word):
    path = tmp_path / "run.ckpt"
    arguments = dict(prompts=prompts(), metrics=("sink_score", "residual_norm"), n_iterations=3)
    measure(tiny_model("retrofitted"), progress=False, checkpoint=path, **arguments)
    changed = dict(changed)
    weight = changed.pop("weight", 0.0)
    model = tiny_model("retrofitted", **({"eps": changed.pop("eps")} if "eps" in changed else {}))
    with torch.no_grad():
        model.blocks[2].attn.W_Q[1, 2, 3] += weight
    with pytest.raises(CheckpointError, match=f"another run: {word} is"):
        measure(model, progress=False, checkpoint=path, **{**arguments, **changed})


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b'{"json": 1}'])
def test_a_file_that_is_no_checkpoint_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "run.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run\.ckpt"):
        quiet(looped("ouro"), prompts(), checkpoint=path)
    assert path.read_bytes() == content


def test_a_checkpoint_that_cannot_be_written_fails_before_the_model_runs(tmp_path):
    model = tiny_model("ouro")
    interrupt_after(model, 0)
    with pytest.raises(FileNotFoundError, match="no directory"):
        quiet(model, prompts(), checkpoint=tmp_path / "nowhere" / "run.ckpt")


# Bad input: one clear error, before the model runs.


@pytest.fixture
def silent():
    """A model that must not run."""
    model = tiny_model("retrofitted")
    interrupt_after(model, 0)
    return model


def test_an_unknown_metric_suggests_near_ones(silent):
    with pytest.raises(ValueError, match=r"'sink_rates': did you mean .*'sink_rate'"):
        quiet(silent, prompts(), ("residual_norm", "sink_rates"))
    with pytest.raises(ValueError, match="unknown metric 'xyz': known: sink_rate, "):
        quiet(silent, prompts(), "xyz")


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ((), "metrics is empty"),
        ("exit_probability", "reads the halting gate, but this model has none"),
        ({"sink_rate": {"treshold": 0.1}}, "no option 'treshold': did you mean threshold"),
        ({"residual_entropy": {"alpha": -1}}, "'residual_entropy': got alpha=-1"),
        ({"residual_norm": {"agg": "none"}}, "a profile needs one"),
        ({"sink_score": {"position": 5}}, "position=5"),
        ({"bos_norm_ratio": {"x": 1}}, "its options: none"),
    ],
)
def test_metrics_that_cannot_be_had_are_refused(silent, metrics, message):
    with pytest.raises(ValueError, match=message):
        quiet(silent, prompts(), metrics)


def test_dynamics_need_enough_iterations(silent):
    with pytest.raises(ValueError, match="'step_angles': it needs 3 iterations or more"):
        quiet(silent, prompts(), "step_angles", n_iterations=2)
    with pytest.raises(ValueError, match="'fixed_point_distance': it needs 2 iterations"):
        quiet(silent, prompts(), "fixed_point_distance", n_iterations=1)
    assert "step_angles" not in available_metrics(silent, n_iterations=2)
    assert "step_angles" in available_metrics(silent, n_iterations=3)


def test_metrics_of_visible_keys_need_causal_attention():
    model = tiny_model("retrofitted", attention_dir="bidirectional")
    for metrics in ("mixing_score_row", {"mixing_score": {"normalize": "row"}}):
        with pytest.raises(ValueError, match="not causal"):
            quiet(model, prompts(), metrics)
    assert (quiet(model, prompts(), "mixing_score").count("mixing_score") == len(LENGTHS)).all()


def test_a_feedforward_model_has_no_iterations():
    with pytest.raises(ValueError, match="'successive_cosine': it is about iterations"):
        quiet(feedforward(), prompts(), "successive_cosine")
    with pytest.raises(ValueError, match="no loop"):
        quiet(feedforward(), prompts(), n_iterations=3)
    assert set(DEFAULT_METRICS) < set(available_metrics(feedforward()))


def test_patterns_whose_rows_do_not_sum_to_one_are_refused():
    model = looped("retrofitted")
    halve = [("blocks.3.attn.hook_pattern", lambda x, hook: x / 2)]
    with model.hooks(fwd_hooks=halve), pytest.raises(ValueError, match=r"blocks\.3.*sums to 0\.5"):
        quiet(model, prompts(), "sink_rate")


def test_a_batch_size_below_one_is_refused(silent):
    with pytest.raises(ValueError, match="batch_size"):
        quiet(silent, prompts(), batch_size=0)


# Names, progress and provenance.


def test_importing_the_module_does_not_hide_the_function():
    module = importlib.import_module("tl_loops.measurements.measure")
    assert tl_loops.measure is module.measure is measure


def test_the_progress_bar_counts_prompts(capsys):
    measure(looped("ouro"), prompts(), "residual_norm", batch_size=2)
    assert f"{len(LENGTHS)}/{len(LENGTHS)}" in capsys.readouterr().err
    quiet(looped("ouro"), prompts(), "residual_norm")
    assert capsys.readouterr().err == ""


def test_the_profile_says_where_it_comes_from():
    p = whole_profile("huginn").provenance
    assert p.bos == "given"
    assert (p.notation, p.n_iterations) == ("(2, 2⊗4, 2)_I", 4)
    assert (p.n_prompts, p.n_tokens) == (len(LENGTHS), sum(LENGTHS))
    assert p.weights == quiet(looped("huginn"), prompts((5,)), "residual_norm").provenance.weights
    assert p.weights != whole_profile("ouro").provenance.weights
