"""Exit criteria: closed forms, and agreement with each rule written as a sequential loop."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_loops.metrics.exits import (
    EXIT_CRITERIA,
    exit_distribution,
    exit_iteration,
    exit_signal,
    expected_exit_iteration,
)

torch.set_num_threads(1)
few = settings(deadline=None, max_examples=25)
STATE_CRITERIA = ("latent-diff", "cosine", "acceleration", "normalized-acceleration")
LOGIT_CRITERIA = ("entropy-diff", "kl", "minp-kl", "argmax-stability")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gates(*lambdas):
    return torch.logit(torch.tensor(lambdas, dtype=torch.float64)).float()


def trajectory(n_iterations=12, batch=(2, 3), width=6, seed=0):
    """A noisy contraction: every criterion fires somewhere, at different iterations."""
    initial = normal(*batch, width, seed=seed)
    target = 3 * normal(*batch, width, seed=seed + 1)
    noise = normal(n_iterations, *batch, width, seed=seed + 2)
    decay = 0.5 ** torch.arange(1, n_iterations + 1).reshape(-1, *[1] * (len(batch) + 1))
    return initial, target + decay * (initial - target) + 0.05 * decay * noise


# --- Ouro's gate ---


@pytest.mark.parametrize(
    ("lambdas", "expected"),
    [
        ((0.5, 0.5, 0.5, 0.5), (0.5, 0.25, 0.125, 0.125)),
        ((1 / 4, 1 / 3, 1 / 2, 0.9), (0.25, 0.25, 0.25, 0.25)),
        ((0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0)),
        ((1.0, 0.3, 0.2, 0.1), (1.0, 0.0, 0.0, 0.0)),
        ((0.7,), (1.0,)),
    ],
)
def test_exit_distribution_closed_forms(lambdas, expected):
    assert torch.allclose(exit_distribution(gates(*lambdas)), torch.tensor(expected), atol=1e-7)


@few
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), scale=st.floats(0, 60))
def test_exit_distribution_is_a_distribution(seed, n, scale):
    p = exit_distribution(scale * normal(n, 3, 2, seed=seed))
    assert p.shape == (n, 3, 2)
    assert (p >= 0).all()
    assert torch.allclose(p.sum(0), torch.tensor(1.0), atol=1e-5)


def test_last_gate_is_not_read():
    logits = normal(4, 5)
    other = logits.clone()
    other[-1] = normal(5, seed=1)
    assert torch.equal(exit_distribution(logits), exit_distribution(other))


def test_expected_exit_iteration():
    assert expected_exit_iteration(gates(0.5, 0.5, 0.5, 0.5)).item() == pytest.approx(1.875 - 1)
    batch = torch.stack([gates(0, 0, 0, 0), gates(1, 0, 0, 0), gates(1 / 4, 1 / 3, 1 / 2, 0)], 1)
    assert expected_exit_iteration(batch).tolist() == pytest.approx([3.0, 0.0, 1.5])


@pytest.mark.parametrize(
    ("q", "expected"),
    [(0.0, 0), (0.5, 0), (0.51, 1), (0.75, 1), (0.76, 2), (0.875, 2), (0.88, 3), (1.0, 3)],
)
def test_ouro_threshold_on_the_cumulative_distribution(q, expected):
    logits = gates(0.5, 0.5, 0.5, 0.5)
    assert exit_iteration("ouro", gate_logits=logits, threshold=q).item() == expected
    cumulative = exit_signal("ouro", gate_logits=logits)
    assert cumulative.tolist() == [0.5, 0.75, 0.875, 1.0]


def test_ouro_exits_of_the_reference_implementation():
    # Halting logits [iteration, pos] of a small random Ouro model and the exits its code took.
    gate_logits = torch.tensor(
        [
            [-0.447, -0.447, -1.020, -1.556, -2.692, 0.092, -2.006, -1.208, -1.781],
            [0.093, 0.093, -0.395, -0.394, -1.132, -0.167, 0.058, -1.294, -1.286],
            [-0.055, -0.055, -0.594, 0.148, -0.778, 0.386, 0.985, -0.780, -0.286],
            [0.066, 0.066, -0.328, 0.257, -0.655, 0.447, 0.633, -0.208, 0.366],
        ]
    )
    exits = {
        0.3: [0, 0, 1, 1, 2, 0, 1, 1, 1],
        0.5: [1, 1, 1, 1, 2, 0, 1, 2, 2],
        0.9: [3, 3, 3, 3, 3, 3, 3, 3, 3],
    }
    for q, expected in exits.items():
        assert exit_iteration("ouro", gate_logits=gate_logits, threshold=q).tolist() == expected


@few
@given(seed=st.integers(0, 10_000), q=st.floats(0, 1), larger=st.floats(0, 1))
def test_ouro_larger_threshold_never_exits_earlier(seed, q, larger):
    q, larger = sorted((q, larger))
    logits = 2 * normal(6, 20, seed=seed)
    early = exit_iteration("ouro", gate_logits=logits, threshold=q)
    late = exit_iteration("ouro", gate_logits=logits, threshold=larger)
    assert (early <= late).all()


def test_ouro_bfloat16_gates_do_not_round_to_an_early_exit():
    logits = gates(0.9, 0.9, 0.9, 0.9).bfloat16()
    rounded, total = torch.ones((), dtype=torch.bfloat16), torch.zeros((), dtype=torch.bfloat16)
    for gate in logits[:3].sigmoid():  # what bfloat16 arithmetic makes of it
        total, rounded = total + gate * rounded, rounded * (1 - gate)
    assert total == 1
    assert exit_distribution(logits).dtype == torch.float32
    assert exit_iteration("ouro", gate_logits=logits).item() == 3


# --- all rules against a sequential implementation ---


def softmax(x):
    p = np.exp(x - x.max())
    return p / p.sum()


def sequential_exit(criterion, initial, states, logits, gate, threshold, min_steps, every, reduce):
    """One sequence `[iteration, pos, ...]`, one check after the other, in float64."""
    n_iterations, n_pos = states.shape[:2]
    uniform = np.full(logits.shape[-1], 1 / logits.shape[-1])
    entropy, p_before, top, count = [100.0] * n_pos, [uniform] * n_pos, [-1] * n_pos, [0] * n_pos
    q_before = [uniform] * n_pos
    path = [initial]
    hits = np.zeros(n_pos, dtype=int)
    left, survive = np.zeros(n_pos), np.ones(n_pos)
    exits = [None] * n_pos
    for t in range(n_iterations):
        leaves = survive if t == n_iterations - 1 else survive / (1 + np.exp(-gate[t]))
        left, survive = left + leaves, survive - leaves
        if t < min_steps or (t - min_steps) % every:
            continue
        path.append(states[t])
        change = path[-1] - path[-2]
        value = np.full(n_pos, np.nan)
        for i in range(n_pos):
            x, before = path[-1][i], path[-2][i]
            p = softmax(logits[t, i])
            q = np.where(p < 0.1 * p.max(), uniform, p)
            q = q / q.sum()
            h = -(p * np.log(p)).sum()
            count[i] = count[i] + 1 if p.argmax() == top[i] else 0
            if criterion == "entropy-diff":
                value[i] = abs(h - entropy[i])
            elif criterion == "kl":
                value[i] = (p_before[i] * np.log(p_before[i] / p)).sum()
            elif criterion == "minp-kl":
                value[i] = (q_before[i] * np.log(q_before[i] / q)).sum()
            elif criterion == "argmax-stability":
                value[i] = count[i]
            elif criterion == "latent-diff":
                value[i] = np.linalg.norm(change[i]) / np.linalg.norm(x)
            elif criterion == "cosine":
                value[i] = 1 - x @ before / np.linalg.norm(x) / np.linalg.norm(before)
            elif criterion == "ouro":
                value[i] = left[i]
            elif len(path) > 2:
                value[i] = np.linalg.norm(change[i] - (path[-2] - path[-3])[i])
                if criterion == "normalized-acceleration":
                    value[i] /= np.linalg.norm(x)
            entropy[i], p_before[i], q_before[i], top[i] = h, p, q, p.argmax()
        if reduce:
            value[:] = value.mean() if criterion in STATE_CRITERIA else value[-1]
        at_least = criterion in ("ouro", "argmax-stability")
        passed = value >= threshold if at_least else value < threshold
        hits = np.where(passed, hits + 1, 0)
        needed = 2 if "acceleration" in criterion else 1
        for i in range(n_pos):
            if exits[i] is None and hits[i] >= needed:
                exits[i] = t
    exits = [n_iterations - 1 if e is None else e for e in exits]
    return exits[-1] if reduce else exits


@pytest.mark.parametrize("criterion", EXIT_CRITERIA)
@pytest.mark.parametrize(("min_steps", "every"), [(0, 1), (2, 1), (1, 3)])
@pytest.mark.parametrize("reduce", [False, True])
def test_agrees_with_the_sequential_rule(criterion, min_steps, every, reduce):
    exits = set()
    for seed in range(3):
        initial, states = trajectory(n_iterations=26, seed=10 * seed)
        logits = 2 * states @ normal(6, 11, seed=99)
        gate = 1.5 * normal(26, 2, 3, seed=seed)
        threshold = {"ouro": 0.9, "acceleration": 0.05, "argmax-stability": 3}.get(
            criterion, EXIT_CRITERIA[criterion].threshold
        )
        got = exit_iteration(
            criterion,
            gate_logits=gate,
            logits=logits,
            states=states,
            initial_state=initial,
            threshold=threshold,
            min_steps=min_steps,
            every=every,
            reduce=reduce,
        )
        for row in range(2):
            expected = sequential_exit(
                criterion,
                initial[row].double().numpy(),
                states[:, row].double().numpy(),
                logits[:, row].double().numpy(),
                gate[:, row].double().numpy(),
                threshold,
                min_steps,
                every,
                reduce,
            )
            assert got[row].tolist() == expected
        exits |= set(got.flatten().tolist())
    assert exits - {25}, "the rule never fired early, so nothing was compared"


# --- closed forms of the single rules ---


def test_constant_output_exits_at_the_second_check():
    logits = normal(1, 4, 9).expand(6, 4, 9)
    for criterion in ("entropy-diff", "kl", "minp-kl"):
        assert exit_iteration(criterion, logits=logits).tolist() == [1] * 4
        assert torch.allclose(exit_signal(criterion, logits=logits)[1:], torch.tensor(0.0))


def test_first_signals_are_against_the_reference_start():
    logits = normal(1, 9, dtype=torch.float64)
    log_p = logits[0].log_softmax(-1)
    kl = exit_signal("kl", logits=logits).item()
    assert kl == pytest.approx(-math.log(9) - log_p.mean().item())
    entropy = -(log_p.exp() * log_p).sum().item()
    assert exit_signal("entropy-diff", logits=logits).item() == pytest.approx(100 - entropy)
    # Uniform output is at distance 0 from the start: it exits at once.
    assert exit_iteration("kl", logits=torch.zeros(5, 9)).item() == 0


def test_kl_is_of_the_previous_from_the_current():
    p, q = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
    assert exit_signal("kl", logits=torch.stack([p, q]))[1].item() == pytest.approx(0.368, abs=5e-4)
    assert exit_signal("kl", logits=torch.stack([q, p]))[1].item() == pytest.approx(0.511, abs=5e-4)


def test_min_p_ignores_changes_among_unlikely_ids():
    # Two likely ids and a tail that moves: the tail is flattened to 1 / d_vocab before and after.
    a = torch.tensor([0.5, 0.47, 0.02, 0.01]).log()
    b = torch.tensor([0.5, 0.47, 0.01, 0.02]).log()
    signal = exit_signal("minp-kl", logits=torch.stack([a, b]))
    assert signal[1].item() == pytest.approx(0, abs=1e-7)
    q = torch.tensor([0.5, 0.47, 0.25, 0.25]) / 1.47
    assert signal[0].item() == pytest.approx((0.25 * (0.25 / q).log()).sum().item(), abs=1e-6)
    assert exit_signal("kl", logits=torch.stack([a, b]))[1] > 1e-3


def test_argmax_stability_exits_at_step_six_at_the_earliest():
    logits = torch.zeros(12, 3, 7)
    logits[:, :, 4] = 5
    logits[3, 1, 4] = -5  # one change starts the count again
    logits[:, 2, 4] += 10 * (-1.0) ** torch.arange(12)  # never twice the same
    assert exit_iteration("argmax-stability", logits=logits).tolist() == [5, 9, 11]
    assert exit_iteration("argmax-stability", logits=logits, threshold=2).tolist() == [2, 2, 11]
    assert exit_signal("argmax-stability", logits=logits)[:, 1].tolist() == [
        0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 6, 7,
    ]  # fmt: skip


def test_constant_state_exits_at_once():
    state = normal(2, 3, 8)
    states = state.expand(5, 2, 3, 8)
    for criterion in ("latent-diff", "cosine"):
        exits = exit_iteration(criterion, states=states, initial_state=state)
        assert (exits == 0).all()
        # From another start, the first step is a change.
        exits = exit_iteration(criterion, states=states, initial_state=-state)
        assert (exits == 1).all()


@pytest.mark.parametrize("rho", [0.3, 0.5, 0.8])
def test_acceleration_of_a_contraction(rho):
    # x^k = rho^k v: a^k = (1 - rho)^2 rho^(k-1) |v|; fires at the second a^k below the threshold.
    v = normal(8, dtype=torch.float64)
    path = rho ** torch.arange(41, dtype=torch.float64)[:, None] * v
    given = {"states": path[1:], "initial_state": path[0]}
    k = torch.arange(1, 40, dtype=torch.float64)
    expected = (1 - rho) ** 2 * rho ** (k - 1) * v.norm()
    signal = exit_signal("acceleration", **given)
    assert signal[0].isnan() and torch.allclose(signal[1:], expected)
    below = int((expected < 1e-3).nonzero()[0]) + 1  # k of the first hit
    assert exit_iteration("acceleration", **given).item() == below + 1


def test_acceleration_never_stops_an_orbit():
    theta, radius = 0.3, 2.0
    angle = theta * torch.arange(200)
    path = radius * torch.stack([angle.cos(), angle.sin()], -1)
    given = {"states": path[1:], "initial_state": path[0]}
    signal = exit_signal("acceleration", **given)
    expected = torch.tensor(4 * radius * math.sin(theta / 2) ** 2)
    assert torch.allclose(signal[1:], expected, rtol=1e-3)
    for criterion in STATE_CRITERIA:
        assert exit_iteration(criterion, **given).item() == 198


def test_acceleration_stops_a_slider_at_once():
    # Documented failure: constant velocity is acceleration 0, two hits need three passes.
    path = torch.arange(10.0)[:, None] * torch.tensor([1.0, 2.0, -1.0])
    given = {"states": path[1:], "initial_state": path[0]}
    for criterion in ("acceleration", "normalized-acceleration"):
        assert exit_iteration(criterion, **given).item() == 2
    assert exit_iteration("latent-diff", **given).item() == 8


def test_acceleration_needs_two_hits_in_a_row():
    velocity = torch.tensor([1.0, 1, 2, 2, 3, 3, 4, 4, 5, 5])  # a = 0, 1, 0, 1, ...
    path = torch.cat([torch.zeros(1), velocity.cumsum(0)])[:, None]
    given = {"states": path[1:], "initial_state": path[0], "threshold": 0.5}
    signal = exit_signal("acceleration", states=path[1:], initial_state=path[0])
    assert signal[1:].flatten().tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert exit_iteration("acceleration", **given).item() == 9
    # Two passes cannot have two hits, although the first acceleration is 0.
    two = exit_iteration("acceleration", states=path[1:3], initial_state=path[0])
    assert two.item() == 1


@few
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_scale_of_the_states_matters_to_the_plain_acceleration_only(seed, scale):
    initial, states = trajectory(seed=seed)
    for criterion in ("latent-diff", "cosine", "normalized-acceleration"):
        there = exit_signal(criterion, states=states, initial_state=initial)
        scaled = exit_signal(criterion, states=scale * states, initial_state=scale * initial)
        assert torch.allclose(there, scaled, rtol=1e-3, atol=1e-5, equal_nan=True)
    there = exit_signal("acceleration", states=states, initial_state=initial)
    scaled = exit_signal("acceleration", states=scale * states, initial_state=scale * initial)
    assert torch.allclose(scale * there, scaled, rtol=1e-3, atol=1e-5 * scale, equal_nan=True)


@few
@given(seed=st.integers(0, 10_000), low=st.floats(1e-4, 1), high=st.floats(1e-4, 1))
def test_a_looser_threshold_never_exits_later(seed, low, high):
    low, high = sorted((low, high))
    initial, states = trajectory(seed=seed)
    given_ = {"states": states, "initial_state": initial, "logits": states}
    for criterion, rule in EXIT_CRITERIA.items():
        if rule.exits_if == "<":
            loose = exit_iteration(criterion, threshold=high, **given_)
            strict = exit_iteration(criterion, threshold=low, **given_)
            assert (loose <= strict).all()


def test_zero_states_never_fire():
    # 0 / 0 is not convergence; the reference code compares NaN, which is never below.
    zeros = torch.zeros(5, 4)
    for criterion in ("latent-diff", "cosine", "normalized-acceleration"):
        exits = exit_iteration(criterion, states=zeros, initial_state=zeros[0])
        assert exits.item() == 4


@pytest.mark.parametrize("criterion", EXIT_CRITERIA)
def test_half_precision_is_measured_in_float32(criterion):
    initial, states = trajectory()
    half = {
        "states": states.bfloat16(),
        "initial_state": initial.bfloat16(),
        "logits": states.bfloat16(),
        "gate_logits": states[..., 0].bfloat16(),
    }
    signal = exit_signal(criterion, **half)
    assert signal.dtype == torch.float32
    full = {name: value.float() for name, value in half.items()}
    assert torch.equal(signal.nan_to_num(-1), exit_signal(criterion, **full).nan_to_num(-1))


@pytest.mark.parametrize("criterion", EXIT_CRITERIA)
def test_no_check_means_the_last_iteration(criterion):
    initial, states = trajectory(n_iterations=4)
    given_ = {
        "states": states,
        "initial_state": initial,
        "logits": states,
        "gate_logits": 9 + states[..., 0],
    }
    exits = exit_iteration(criterion, min_steps=4, **given_)
    assert exits.shape == (2, 3) and (exits == 3).all()
    assert exit_signal(criterion, min_steps=4, **given_).numel() == 0 or "accel" in criterion
    one = {name: value[:1] for name, value in given_.items() if name != "initial_state"}
    assert (exit_iteration(criterion, initial_state=initial, **one) == 0).all()


def test_min_steps_is_the_first_iteration_that_is_checked():
    logits = normal(1, 9).expand(8, 9)
    assert exit_iteration("kl", logits=logits, min_steps=3).item() == 4
    assert exit_iteration("kl", logits=logits, min_steps=3, every=2).item() == 5
    assert exit_iteration("ouro", gate_logits=torch.full((8,), 9.0), threshold=0.9).item() == 0
    late = exit_iteration("ouro", gate_logits=torch.full((8,), 9.0), threshold=0.9, min_steps=5)
    assert late.item() == 5


# --- refusals ---


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("entropy_diff", "entropy-diff"),
        ("argmax", "argmax-stability"),
        ("Cosine", "cosine"),
        ("min-kl", "minp-kl"),
    ],
)
def test_unknown_criterion_suggests_near_matches(name, near):
    with pytest.raises(ValueError, match=f"unknown exit criterion '{name}'; did you mean.*{near}"):
        exit_iteration(name, logits=normal(3, 4))
    with pytest.raises(ValueError, match="known: ouro, entropy-diff"):
        exit_iteration("zzzz")


def test_missing_input_is_named():
    with pytest.raises(ValueError, match="'cosine' reads states and initial_state; initial_state"):
        exit_iteration("cosine", states=normal(3, 4))
    with pytest.raises(ValueError, match="'ouro' reads gate_logits; gate_logits is missing"):
        exit_iteration("ouro", logits=normal(3, 4))


def test_bad_inputs_are_refused():
    logits = normal(3, 4)
    with pytest.raises(ValueError, match="logits contains NaN"):
        exit_iteration("kl", logits=logits.masked_fill(logits > 1, float("nan")))
    with pytest.raises(ValueError, match="at least one iteration"):
        exit_iteration("kl", logits=logits[:0])
    with pytest.raises(ValueError, match="position axis"):
        exit_iteration("kl", logits=logits, reduce=True)
    with pytest.raises(ValueError, match="position axis"):
        exit_iteration("ouro", gate_logits=logits[:, 0], reduce=True)
    with pytest.raises(ValueError, match=r"threshold=1\.5 for 'ouro'"):
        exit_iteration("ouro", gate_logits=logits, threshold=1.5)
    with pytest.raises(ValueError, match="threshold=nan"):
        exit_iteration("kl", logits=logits, threshold=float("nan"))
    for wrong in ({"min_steps": -1}, {"every": 0}):
        with pytest.raises(ValueError, match="min_steps="):
            exit_iteration("kl", logits=logits, **wrong)
    with pytest.raises(ValueError, match="at least one iteration"):
        exit_distribution(logits[:0])
