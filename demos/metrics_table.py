"""Measure ``tl-loops-tiny`` with every metric and write the numbers into ``docs/metrics.md``.

    python demos/metrics_table.py

The document holds the text, this script the numbers: what stands between ``<!--n KEY-->`` and
``<!--/n-->`` is replaced, and so is the table of measurements between its markers. A key that only
one of the two sides knows is refused. Words that judge a number (``<!--n loop.verdict-->``) are
derived from it here, so that text and number cannot part.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_loops import LoopedTransformer, LoopProfile, measure, metrics, tasks
from tl_loops import dynamics as loop_dynamics
from tl_loops.measurements import MEASUREMENTS, why_not
from tl_loops.tasks.fact_chain import Prompt

DOCUMENT = Path(__file__).parents[1] / "docs" / "metrics.md"
N_PROMPTS, SEED = 64, 1
N_LONG, LONG_ITERATIONS = 8, 128  # prompts and iterations of the trajectories to a fixed point
N_STATES = 4  # initial states of the path-independence test
N_CLUSTERS = 16

NUMBER = re.compile(r"<!--n ([\w.+-]+)-->(.*?)<!--/n-->")
TABLE = re.compile(r"(<!--table measurements-->\n).*?(<!--/table-->)", re.DOTALL)

Numbers = dict[str, str]


@dataclass(frozen=True)
class Run:
    """The model, the prompts, and what one forward pass on them left.

    ``patterns``, ``resid_pre`` and ``resid_post`` are in the order of the unrolled blocks,
    ``states`` leave the iterations, ``logits`` are read out after the coda after each iteration.
    """

    model: LoopedTransformer
    prompts: list[Prompt]
    tokens: Tensor  # [prompt, pos]
    cache: Mapping[str, Tensor]
    patterns: Tensor  # [block, prompt, head, dest, src]
    resid_pre: Tensor  # [block, prompt, pos, d_model]
    resid_post: Tensor  # [block, prompt, pos, d_model]
    states: Tensor  # [iteration, prompt, pos, d_model]
    logits: Tensor  # [iteration, prompt, pos, d_vocab]
    long_layers: Tensor  # [layer, iteration, prompt, pos, d_model], of the first N_LONG prompts
    profile: LoopProfile

    def block(self, iteration: int, layer: int = -1) -> int:
        return self.model.layout.index(iteration=iteration, layer=layer)

    @property
    def answers(self) -> Tensor:
        ids = [self.model.to_single_token(prompt.answer) for prompt in self.prompts]
        return torch.tensor(ids)


def run() -> Run:
    """Load the embedded model and run it once for all metrics."""
    model = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny", device="cpu")
    model.requires_grad_(False)
    prompts = tasks.fact_chain_prompts(N_PROMPTS, seed=SEED)
    texts = [prompt.text for prompt in prompts]
    tokens = model.to_tokens(texts)
    if len({model.to_tokens(text).shape[1] for text in texts}) > 1:
        raise ValueError("the prompts differ in length, expected equal lengths (no padding)")
    layout = model.layout
    _, cache = model.run_with_cache(tokens)

    def all_blocks(name: str) -> Tensor:
        return torch.stack([cache[f"blocks.{i}.{name}"] for i in range(layout.n_layers)])

    states = torch.stack(
        [cache[layout.hook_name("state_out", iteration=t)] for t in range(layout.n_iterations)]
    )
    logits = torch.stack([model(s, start_at_layer=layout.coda_start) for s in states])
    return Run(
        model=model,
        prompts=prompts,
        tokens=tokens,
        cache=cache,
        patterns=all_blocks("attn.hook_pattern"),
        resid_pre=all_blocks("hook_resid_pre"),
        resid_post=all_blocks("hook_resid_post"),
        states=states,
        logits=logits,
        long_layers=_long_trajectories(model, tokens[:N_LONG]),
        profile=measure(model, texts, "all", batch_size=N_PROMPTS, progress=False),
    )


def _long_trajectories(model: LoopedTransformer, tokens: Tensor) -> Tensor:
    with model.iterations(LONG_ITERATIONS):
        layout = model.layout
        wanted = range(layout.core_start, layout.coda_start)
        names = {f"blocks.{i}.hook_resid_post" for i in wanted}
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in names)
        core = torch.stack([cache[f"blocks.{i}.hook_resid_post"] for i in wanted])
    return core.unflatten(0, (LONG_ITERATIONS, layout.n_core)).transpose(0, 1)


# --- groups of metrics -------------------------------------------------------------------------


def setup(r: Run) -> Numbers:
    return {
        "setup.notation": r.model.layout.notation(injected=r.model.cfg.injection != "none"),
        "setup.tokens": str(r.tokens.shape[1]),
        "setup.prompts": str(len(r.prompts)),
        "setup.iterations": str(r.model.layout.n_iterations),
        "setup.d_model": str(r.model.cfg.d_model),
    }


def attention(r: Run) -> Numbers:
    n_tokens = r.tokens.shape[1]
    last = r.patterns[r.block(-1)]
    visible = torch.ones(1, n_tokens, n_tokens).tril()
    uniform = visible / visible.sum(-1, keepdim=True)
    out: Numbers = {}
    for name in (
        "sink_score",
        "sink_rate",
        "mixing_score",
        "colsum_concentration",
        "diagonal_score",
        "previous_token_score",
        "sink_identity_index",
    ):
        function = getattr(metrics, name)
        first = function(r.patterns[r.block(0)]).mean()
        value, null = function(last).mean(), function(uniform).mean()
        out[f"{name}.first"], out[name] = show(first), show(value)
        if name not in ("sink_rate", "sink_identity_index"):  # 0 for uniform attention
            out[f"{name}.uniform"] = show(null)
        if name in ("sink_score", "colsum_concentration", "diagonal_score", "previous_token_score"):
            out[f"{name}.verdict"] = "more" if value > null else "less"
    for normalize in ("log", "length", "row"):
        out[f"mixing_score.{normalize}"] = show(metrics.mixing_score(last, normalize).mean())

    before = r.patterns[r.block(-2)]
    out["pattern_distance"] = show(metrics.pattern_distance(last, before).mean())
    out["pattern_distance.max"] = show(math.sqrt(2 * (n_tokens - 1)))
    layout = r.model.layout
    core = r.patterns[layout.core_start : layout.coda_start, :N_LONG]
    distance = metrics.pairwise_pattern_distance(core).mean(-1)
    same, other = _same_and_other_layer(distance, layout.n_core)
    out["pairwise_pattern_distance.same"] = show(same)
    out["pairwise_pattern_distance.other"] = show(other)
    out["pairwise_pattern_distance.verdict"] = (
        "the attention of a layer repeats from iteration to iteration (a cycle)"
        if same < other
        else "a layer's attention changes over iterations as much as it differs between layers"
    )
    return out


def _same_and_other_layer(matrix: Tensor, n_core: int) -> tuple[Tensor, Tensor]:
    """Means over pairs of core blocks of the same layer (another iteration), and of two layers."""
    index = torch.arange(len(matrix))
    same = (index[:, None] - index) % n_core == 0
    return matrix[same & ~torch.eye(len(matrix), dtype=torch.bool)].mean(), matrix[~same].mean()


def lipschitz(r: Run) -> Numbers:
    block, before = r.block(-1), r.block(-2)
    weights: Any = r.model.blocks[block]
    assert r.model.cfg.normalization_type == "RMS" and r.model.cfg.rotary_dim

    def reads(i: int) -> Tensor:
        return r.cache[f"blocks.{i}.ln1.hook_normalized"] * weights.ln1.w

    def head_input(name: str, i: int) -> Tensor:
        return r.cache[f"blocks.{i}.attn.hook_rot_{name}"]

    scale = r.model.cfg.attn_scale
    bound = metrics.attention_lipschitz_bound(
        reads(block),
        reads(before),
        weights.attn.W_Q,
        weights.attn.W_K,
        weights.attn.b_Q,
        weights.attn.b_K,
        attn_scale=scale,
    )
    tight = metrics.attention_lipschitz_bound_from_qk(
        *(head_input(name, i) for i in (block, before) for name in "qk"), attn_scale=scale
    )
    a, b = r.patterns[block], r.patterns[before]
    ratio = metrics.attention_lipschitz_ratio(a, b, bound).max()
    ratio_qk = metrics.attention_lipschitz_ratio(a, b, tight).max()
    return {
        "attention_lipschitz_bound": show(bound.mean()),
        "attention_lipschitz_bound.verdict": (
            "it allows more than patterns can move at all, so it says nothing here"
            if bound.mean() > math.sqrt(2 * (r.tokens.shape[1] - 1))
            else "it limits the motion of the patterns"
        ),
        "attention_lipschitz_bound_from_qk": show(tight.mean()),
        "attention_lipschitz.moved": show((a - b).norm(dim=(-2, -1)).mean()),
        "attention_lipschitz_ratio": show(ratio),
        "attention_lipschitz_ratio.qk": show(ratio_qk),
        "attention_lipschitz_ratio.verdict": (
            "holds" if max(ratio, ratio_qk) <= 1 + 1e-5 else "is violated"
        ),
    }


def residual(r: Run) -> Numbers:
    first, before, last = (r.resid_post[r.block(t)] for t in (0, -2, -1))
    out: Numbers = {}
    for name in (
        "residual_entropy",
        "residual_entropy_bound",
        "effective_rank",
        "participation_ratio",
        "residual_norm",
        "bos_norm_ratio",
    ):
        function = getattr(metrics, name)
        out[f"{name}.first"], out[name] = show(function(first).mean()), show(function(last).mean())
    rows, width = last.shape[-2:]
    out["residual_entropy.max"] = show(math.log(min(rows, width)))
    out["effective_rank.max"] = str(min(rows, width))
    growth = (metrics.residual_norm(last) / metrics.residual_norm(first)).mean()
    out["residual_norm.growth"] = show(growth)
    out["residual_norm.verdict"] = (
        "grows with the iterations, so that cosines and relative steps say more than distances"
        if growth > 1.5
        else "stays in the same range over the iterations"
    )
    n_massive = int(metrics.massive_activations(r.resid_post).count.sum())
    ratio = r.resid_post.abs().amax((-2, -1)) / r.resid_post.abs().flatten(-2).median(-1).values
    out["massive_activations"] = str(n_massive)
    out["massive_activations.ratio"] = show(ratio.max())
    out["massive_activations.verdict"] = (
        "nothing serves as a massive anchor" if n_massive == 0 else "some entries serve as anchors"
    )
    out["cosine_similarity"] = show(metrics.cosine_similarity(last, before).mean())
    layout = r.model.layout
    core = r.resid_post[layout.core_start : layout.coda_start]
    same, other = _same_and_other_layer(metrics.pairwise_cosine(core).mean(-1), layout.n_core)
    out["pairwise_cosine.same"], out["pairwise_cosine.other"] = show(same), show(other)
    out["pairwise_cosine.verdict"] = (
        "the stream differs as much between iterations as between layers"
        if abs(same - other) < 0.01
        else "a layer's output is closer to its own in other iterations than to the other layer's"
        if same > other
        else "the stream differs more between iterations than between layers"
    )
    return out


def geometry(r: Run) -> Numbers:
    first, last = r.resid_post[r.block(0)], r.resid_post[r.block(-1)]
    tokens = r.states.flatten(1, 2)
    near, far = (metrics.linear_cka(tokens[t], tokens[-1]) for t in (-2, 0))
    curvature = metrics.token_curvature(last).mean()
    spectrum = torch.linalg.svdvals(tokens.flatten(0, 1).double())
    return {
        "linear_cka": show(near),
        "linear_cka.first": show(far),
        "linear_cka.verdict": (
            "is settled by the last iteration, and is not that of the first"
            if near > 0.9 > far
            else "changes until the last iteration"
            if near <= 0.9
            else "is that of the first iteration already"
        ),
        "token_curvature": show(curvature),
        "token_curvature.first": show(metrics.token_curvature(first).mean()),
        "token_curvature.verdict": "straighter" if curvature < 2 * math.pi / 3 else "more bent",
        "anisotropy": show(metrics.anisotropy(last).mean()),
        "anisotropy.first": show(metrics.anisotropy(first).mean()),
        "rank_of_spectrum": show(metrics.rank_of_spectrum(spectrum)),
        "rank_of_spectrum.max": str(len(spectrum)),
        "rank_for_share": show(metrics.rank_for_share(spectrum, 0.99)),
    }


def settling(r: Run) -> Numbers:
    token = r.states[:, :, -1]
    stopped, half = token[:4], 3
    drift = metrics.late_drift(stopped, relative=True)
    correct = r.logits[half, :, -1].argmax(-1) == r.answers
    table = metrics.settling_table(drift, correct)
    settled, wandering = table.counts.tolist()
    return {
        "late_drift": show(metrics.late_drift(token).mean()),
        "late_drift.relative": show(metrics.late_drift(token, relative=True).mean()),
        "otsu_threshold": show(metrics.otsu_threshold(drift.log())),
        "settling_table": show(table.auc),
        "settling_table.settled": str(sum(settled)),
        "settling_table.right": str(settled[0]),
        "settling_table.wandering": str(sum(wandering)),
        "settling_table.right_wandering": str(wandering[0]),
        "settling_table.verdict": (
            "wrong answers drift further"
            if table.auc > 0.6
            else "right answers drift further"
            if table.auc < 0.4
            else "drift hardly tells right from wrong here"
        ),
    }


def paths(r: Run) -> Numbers:
    parts = metrics.step_components(r.states)
    radial, tangential = parts.radial[-1].mean(), parts.tangential[-1].mean()
    curve = metrics.recurrence_curve(r.states).flatten(1).mean(-1)
    lags = metrics.recurrence_lag(metrics.recurrence_curve(r.long_layers[-1]))
    share = lags.isfinite().float().mean()
    return {
        "step_components": show(radial),
        "step_components.tangential": show(tangential),
        "step_components.ratio": show(parts.norm_ratio[-1].mean()),
        "step_components.verdict": (
            "growth, which the norm before the readout takes away, as much as a turn, which it sees"
            if 2 / 3 < radial / tangential < 3 / 2
            else "mostly growth, which the norm before the readout takes away"
            if radial > tangential
            else "mostly a turn, which the readout sees"
        ),
        "path_efficiency": show(metrics.path_efficiency(r.states).mean()),
        "directional_persistence": show(metrics.directional_persistence(r.states).mean()),
        "recurrence_curve.first": show(curve[0]),
        "recurrence_curve": show(curve[-1]),
        "recurrence_curve.verdict": (
            "only grows: nothing comes back" if (curve.diff() > 0).all() else "falls again"
        ),
        "recurrence_lag": show(share),
        "recurrence_lag.verdict": "no orbit" if share < 0.05 else "some orbits",
    }


def dynamics(r: Run) -> Numbers:
    states, long = r.states, r.long_layers[-1]
    step = metrics.successive_difference(states).mean(-1)
    relative = metrics.successive_difference(states, relative=True).mean(-1)
    late = metrics.successive_difference(long, relative=True).mean(-1)[-1]
    end = r.model.layout.n_iterations - 1
    distance = metrics.fixed_point_distance(long)
    relative_distance = metrics.fixed_point_distance(long, relative=True)
    slope = metrics.fixed_point_slope(distance).mean()
    # The last state stands for x*, so that a steady drift has a slope, too: -0.0175 in this window,
    # and -0.035 where its speed falls as 1/t.
    contracts = slope < -0.05
    degenerate = metrics.degenerate_fixed_point(r.long_layers[:, -1]).mean()
    angle = metrics.step_angles(states)[-1].mean()
    half = len(states) // 2
    halves = metrics.two_scale_ratio([states[:half], states[half:]]).mean()
    paths = metrics.path_independence(_other_initial_states(r))
    return {
        "successive_difference.first": show(step[0]),
        "successive_difference": show(step[-1]),
        "successive_difference.relative": show(relative[-1]),
        "successive_difference.late": show(late),
        "successive_cosine": show(metrics.successive_cosine(states).mean(-1)[-1]),
        "fixed_point_distance": show(relative_distance.mean(-1)[end]),
        "fixed_point_distance.verdict": (
            "has settled" if relative_distance.mean(-1)[end] < 0.05 else "has not settled"
        ),
        "fixed_point_cosine": show(metrics.fixed_point_cosine(long).mean(-1)[end]),
        "fixed_point_slope": show(slope),
        "fixed_point_slope.factor": show(slope.exp()),
        "fixed_point_slope.verdict": (
            "a contraction towards a fixed point" if contracts else "a drift, not convergence"
        ),
        "degenerate_fixed_point": show(degenerate, 5),
        "degenerate_fixed_point.verdict": (
            "a layer hardly turns the state by then (degenerate)"
            if degenerate > 0.99
            else "each iteration carries the state around a cycle of its layers"
        ),
        "step_angles": show(angle),
        "step_angles.degrees": f"{math.degrees(angle):.0f}",
        "acceleration": show(metrics.acceleration(states)[-1].mean()),
        "acceleration.step": show(metrics.acceleration(states, normalize="step")[-1].mean()),
        "two_scale_ratio": show(halves),
        "path_independence.cosine": show(paths.cosine.mean(), 5),
        "path_independence.distance": show(paths.relative_distance.mean()),
        "path_independence.verdict": (
            "independent of" if paths.relative_distance.mean() < 0.05 else "dependent on"
        ),
    }


def _other_initial_states(r: Run) -> Tensor:
    """State after the last iteration from several initial states, [seed, prompt, pos, d_model]."""
    std = r.model.cfg.initial_state_std
    layout, tokens = r.model.layout, r.tokens[:N_LONG]
    states = []
    for seed in range(N_STATES):
        generator = torch.Generator().manual_seed(seed)
        start = std * torch.randn(*tokens.shape, r.model.cfg.d_model, generator=generator)
        states.append(r.model(tokens, initial_state=start, stop_at_layer=layout.coda_start))
    return torch.stack(states)


def trajectories(r: Run) -> Numbers:
    classified = [metrics.classify_trajectory(layer) for layer in r.long_layers]
    last = classified[-1]
    out = {f"classify_trajectory.{x}": show(last.fraction(x)) for x in metrics.TRAJECTORY_LABELS}
    out["classify_trajectory.speed"] = show(last.late_speed.nanmean())
    table = metrics.label_co_occurrence(np.stack([c.labels for c in classified]))
    most = max(metrics.TRAJECTORY_LABELS, key=last.fraction)
    row = metrics.TRAJECTORY_LABELS.index(most)
    others = [x for x in metrics.TRAJECTORY_LABELS if x != most]
    top = max(others, key=lambda x: float(table[row, metrics.TRAJECTORY_LABELS.index(x)]))
    name = most.replace("_", " ")
    out["classify_trajectory.verdict"] = name
    out["label_co_occurrence"] = show(table[row, metrics.TRAJECTORY_LABELS.index(top)])
    out["label_co_occurrence.pair"] = f"P({top.replace('_', ' ')} | {name})"

    token = r.states[:, :, -1]
    depth = metrics.convergence_depth(0.05, states=token).float().mean()
    readout = metrics.convergence_depth(0.05, logits=r.logits[:, :, -1]).float().mean()
    out["convergence_depth.states"], out["convergence_depth.logits"] = show(depth), show(readout)
    out["convergence_depth.verdict"] = (
        "the answer settles before the state does"
        if readout < depth
        else "the state settles no later than the answer"
    )

    own = metrics.pca_trajectory(token, fit_on="token").explained_variance_ratio
    walks = metrics.random_walk_null(token, seed=0)[0]
    null = metrics.pca_trajectory(walks, fit_on="token").explained_variance_ratio
    out["pca_trajectory"] = show(own.sum(-1).mean())
    out["random_walk_null"] = show(null.sum(-1).mean())
    out["pca_trajectory.verdict"] = (
        "flatter than a random walk"
        if own.sum(-1).mean() > null.sum(-1).mean()
        else "no flatter than a random walk"
    )
    return out


def loop_map(r: Run) -> Numbers:
    layout = r.model.layout
    injection = r.cache["hook_injection"][:1]
    end = layout.n_iterations - 1

    # Fused attention has no forward derivative; a hook on the pattern has it computed explicitly.
    hooks = [
        (layout.hook_name("pattern", iteration=end, layer=layer), lambda pattern, hook: pattern)
        for layer in range(layout.n_core)
    ]

    def step(state: Tensor) -> Tensor:
        return r.model.run_with_hooks(
            state,
            fwd_hooks=hooks,
            start_at_iteration=end,
            stop_at_layer=layout.coda_start,
            injection=injection,
        )

    at = r.long_layers[-1][-1, :1]
    with torch.enable_grad():  # Products with the transposed Jacobian go backwards.
        spectrum = metrics.loop_spectrum(step, at, krylov_dim=128, tolerance=1e-3)
        norm = metrics.operator_norm(step, at, krylov_dim=256, tolerance=1e-3)
        lyapunov = metrics.lyapunov_exponents(step, r.states[0, :1], n_iterations=24, skip=8)
        frobenius = metrics.jacobian_norm(step, at)
        sensitivity = _sensitivity(r)
    radius = float(spectrum.spectral_radius)
    period = float(spectrum.rotation_period[0])
    exponent = float(lyapunov.exponents[0])
    return {
        "loop_spectrum": show(radius),
        "loop_spectrum.period": "∞" if math.isinf(period) else show(period),
        "loop_spectrum.converged": "converged" if spectrum.converged else "not converged",
        "loop_spectrum.verdict": _stability(math.log(radius)),
        "operator_norm": show(norm),
        "operator_norm.verdict": (
            "some perturbations grow in a single iteration"
            if norm > 1
            else "no perturbation grows in an iteration"
        ),
        "jacobian_norm": show(frobenius.norm),
        "jacobian_norm.error": show(frobenius.norm_error),
        "jacobian_norm.stretch": show(frobenius.rms_stretch),
        "jacobian_norm.verdict": (
            "a random small change grows"
            if frobenius.rms_stretch > 1
            else "a random small change shrinks"
        ),
        "fixed_point_sensitivity": show(sensitivity.response.norm()),
        "fixed_point_sensitivity.radius": show(sensitivity.spectral_radius),
        "lyapunov_exponents": show(exponent),
        "lyapunov_exponents.verdict": _stability(exponent),
    }


def _stability(exponent: float) -> str:
    if abs(exponent) < 0.02:
        return "perturbations neither grow nor die out (marginal)"
    return "perturbations die out" if exponent < 0 else "perturbations grow"


def _sensitivity(r: Run) -> metrics.FixedPointSensitivity:
    """Of the first prompt's state at the end of the long run to e at the last token."""
    step = loop_dynamics.loop_map(r.model, r.tokens[0])
    injection = step.injection
    assert injection is not None
    direction = torch.zeros_like(injection)
    direction[-1] = injection[-1] / injection[-1].norm()
    at = r.long_layers[-1][-1, 0]
    return metrics.fixed_point_sensitivity(step, at, injection, direction[None], tolerance=1e-3)


def neurons(r: Run) -> Numbers:
    found = metrics.prediction_suppression_neurons(r.model)
    layers = r.model.layout.physical_names()
    kurtosis = found.statistics.kurtosis

    def by_layer(counts: Tensor) -> str:
        return ", ".join(f"{n} {int(c)}" for n, c in zip(layers, counts, strict=True))

    share = 1 / r.model.cfg.d_vocab
    return {
        "neuron_vocabulary_statistics": show(kurtosis.nanmean()),
        "neuron_vocabulary_statistics.max": show(kurtosis[~kurtosis.isnan()].max()),
        "neuron_vocabulary_statistics.limit": show(1 / (share * (1 - share)) - 3),
        "classify_neurons": str(int(found.partition_count.sum())),
        "classify_neurons.of": str(kurtosis.numel()),
        "prediction_suppression_neurons.prediction": by_layer(found.prediction_count),
        "prediction_suppression_neurons.suppression": by_layer(found.suppression_count),
        "prediction_suppression_neurons.verdict": (
            "no neuron is made for single words"
            if int(found.prediction_count.sum() + found.suppression_count.sum()) == 0
            else "some neurons write single words"
        ),
    }


def exits(r: Run) -> Numbers:
    n = r.model.layout.n_iterations
    half = torch.zeros(n, 1)  # lambda_t = 1/2
    out = {
        "exit_distribution": show(metrics.exit_distribution(half)[0, 0]),
        "expected_exit_iteration": show(metrics.expected_exit_iteration(half)[0]),
        "exit_distribution.gate": "has" if r.model.cfg.exit_gate else "has no",
    }
    start = r.cache["hook_initial_state"].expand_as(r.states[0])
    inputs: dict[str, Any] = {"logits": r.logits, "states": r.states, "initial_state": start}
    for name, criterion in metrics.EXIT_CRITERIA.items():
        out[f"exit.{name}.threshold"] = f"{criterion.threshold:g}"
        if "gate_logits" in criterion.inputs:
            out[f"exit.{name}"] = "no gate"
            continue
        at = metrics.exit_iteration(name, reduce=True, **inputs)
        correct = r.logits[at, torch.arange(len(at)), -1].argmax(-1) == r.answers
        out[f"exit.{name}"] = f"{show(at.float().mean())} ({show(correct.float().mean())})"
    kl = metrics.exit_signal("kl", reduce=True, **inputs)
    out["exit_signal"] = show(kl[-1].median())
    out["exit_iteration.last"] = str(n - 1)
    return out


def readout(r: Run) -> Numbers:
    logits, answers = r.logits[:, :, -1], r.answers
    predicted = metrics.predicted_tokens(logits)
    correct = predicted == answers
    hops = torch.tensor([prompt.n_hops for prompt in r.prompts])
    flips = metrics.answer_flips(predicted).float()
    saturation = metrics.saturation_iteration(predicted)
    oracle = metrics.oracle_iteration(correct)
    over = metrics.overthinking(correct).max()
    headroom = metrics.oracle_headroom(correct)
    step = metrics.successive_divergence(logits).median(-1).values
    return {
        **_first_and_last("token_rank", metrics.token_rank(logits, answers).float()),
        **_first_and_last("token_probability", metrics.token_probability(logits, answers)),
        **_first_and_last("token_margin", metrics.token_margin(logits, answers)),
        **_first_and_last("output_entropy", metrics.output_entropy(logits)),
        **_first_and_last("predicted_tokens", correct.float()),
        "token_probability.one_hop": show((hops == 1).float().mean()),
        "output_entropy.verdict": (
            "the model is sure of the person it has reached, also before it reaches the answer"
            if metrics.output_entropy(logits[0]).mean() < 0.1
            else "the first iteration leaves several people open"
        ),
        "output_entropy.max": show(math.log(logits.shape[-1])),
        "kl_divergence": show(metrics.kl_divergence(logits[-1], logits[0]).mean()),
        "js_divergence": show(metrics.js_divergence(logits[-1], logits[0]).mean()),
        "divergence_from_last": show(metrics.divergence_from_last(logits).median(-1).values[-2]),
        "successive_divergence.first": show(step[0]),
        "successive_divergence": show(step[-1]),
        "answer_flips": show(flips.mean()),
        "answer_flips.hops": show((hops - 1).float().mean()),
        "saturation_iteration": show(saturation.float().mean()),
        "saturation_iteration.hops": show((saturation == hops - 1).float().mean()),
        "overthinking": show(over),
        "overthinking.verdict": (
            "an answer that was right is never lost" if over == 0 else "some right answers are lost"
        ),
        "oracle_iteration": show(oracle.float().mean()),
        "oracle_headroom": show(headroom),
        "oracle_headroom.verdict": (
            "leaving early can save iterations but gains no accuracy"
            if headroom == 0
            else "a better exit would gain accuracy"
        ),
    }


def _first_and_last(name: str, values: Tensor) -> Numbers:
    """Means over prompts at the first and the last iteration."""
    mean = values.mean(-1)
    return {f"{name}.first": show(mean[0]), name: show(mean[-1])}


def stages(r: Run) -> Numbers:
    curves = torch.as_tensor(r.profile.by_iteration("mixing_score", outer=True))
    alignment = metrics.align_stages(curves, curves[-1])
    layout = r.model.layout
    stream = torch.cat([r.resid_pre, r.resid_post[-1:]])
    core = slice(layout.core_start, layout.coda_start)
    return {
        "align_stages": show(alignment.pearson[0]),
        "align_stages.rmse": show(alignment.rmse[0]),
        "align_stages.second": show(alignment.pearson[1]),
        "angular_distance": show(metrics.angular_distance(stream)[core].mean()),
        "block_influence": show(metrics.block_influence(stream)[core].mean()),
        "block_influence.prelude": show(metrics.block_influence(stream)[0]),
    }


def graphs(r: Run) -> Numbers:
    token = torch.nn.functional.normalize(r.states[:, :, -1], dim=-1)
    paths = metrics.cluster_paths(token, N_CLUSTERS)
    found = [
        metrics.reasoning_graph(path, points)
        for path, points in zip(paths.T, token.transpose(0, 1), strict=True)
    ]
    null = [graph for path in paths.T for graph in metrics.shuffled_graphs(path, 0, 20)]
    loops = sum(graph.has_loop for graph in found) / len(found)
    null_loops = sum(graph.has_loop for graph in null) / len(null)
    points = token.flatten(0, 1)
    clustering = metrics.kmeans(points, N_CLUSTERS)
    total = (points - points.mean(0)).square().sum()
    return {
        "cluster_paths": show(torch.tensor([float(len(graph.nodes)) for graph in found]).mean()),
        "reasoning_graph": show(loops),
        "reasoning_graph.diameter": show(sum(graph.diameter for graph in found) / len(found)),
        "reasoning_graph.verdict": (
            "the states move on and do not come back"
            if loops < 0.5 * null_loops
            else "the states come back as often as in random order"
            if loops >= null_loops
            else "the states come back less often than in random order"
        ),
        "shuffled_graphs": show(null_loops),
        "kmeans": show(clustering.inertia / total),
    }


def clusters(r: Run) -> Numbers:
    names = torch.tensor([r.model.to_single_token(prompt.hops[0]) for prompt in r.prompts])
    hidden = r.states[:, :, -1]
    own = metrics.cosine_clustering(hidden, names, mean_center=True).cohesion
    null, _ = metrics.shuffled_cosine_clustering(
        hidden, names, seed=0, n_shuffles=20, mean_center=True
    )
    return {
        "cosine_clustering": show(own[0]),
        "cosine_clustering.last": show(own[-1]),
        "shuffled_cosine_clustering": show(null.mean(0)[0]),
        "cosine_clustering.verdict": (
            "the first iteration has found the first person"
            if own[0] > null[:, 0].max()
            else "the first person does not show"
        ),
    }


def probes(r: Run) -> Numbers:
    probe = metrics.step_decodability(r.states[:, :, -8:])
    accuracy = probe.accuracy.mean()
    return {
        "step_decodability": show(accuracy),
        "step_decodability.last": show(probe.accuracy[-1]),
        "step_decodability.chance": show(probe.chance),
        "step_decodability.verdict": (
            "the state carries its iteration: it is still under way"
            if accuracy > 0.5
            else "most iterations look alike, as near a fixed point"
        ),
    }


def step_importance(r: Run) -> Numbers:
    layout = r.model.layout
    core = r.patterns[layout.core_start : layout.coda_start]
    on_chain, off_chain, retained, kept_chain = [], [], [], []
    for i, prompt in enumerate(r.prompts):
        n_facts = len(prompt.facts)
        ids = torch.full((r.tokens.shape[1],), n_facts)
        ids[0] = -1
        ids[1 : 1 + 4 * n_facts] = torch.arange(n_facts).repeat_interleave(4)
        attention_map = metrics.step_attention(core[:, i], ids).mean(0)
        whose = [prompt.start, *prompt.hops[:-1]]
        chain = torch.tensor([who in whose for who, _ in prompt.facts])
        on_chain.append(attention_map[-1, :-1][chain].mean())
        off_chain.append(attention_map[-1, :-1][~chain].mean())
        steps = metrics.critical_steps(attention_map, top_p=0.5)
        retained.append(torch.tensor(steps.retained_fraction))
        kept_chain.append(steps.critical[:-1][chain].float().mean())
    on, off = torch.stack(on_chain).mean(), torch.stack(off_chain).mean()
    return {
        "step_attention": show(on),
        "step_attention.off": show(off),
        "step_attention.verdict": (
            "the question looks at the facts that it needs" if on > off else "no preference shows"
        ),
        "critical_steps": show(torch.stack(retained).mean()),
        "critical_steps.chain": show(torch.stack(kept_chain).mean()),
        "critical_steps.verdict": (
            "facts of the chain are kept more often than others"
            if torch.stack(kept_chain).mean() > torch.stack(retained).mean()
            else "the cut does not find the chain"
        ),
    }


GROUPS = (
    setup,
    attention,
    lipschitz,
    residual,
    geometry,
    dynamics,
    settling,
    paths,
    trajectories,
    loop_map,
    neurons,
    exits,
    readout,
    stages,
    graphs,
    clusters,
    probes,
    step_importance,
)


# --- the measurements of tl_loops.measure -------------------------------------------------------


def measurements_table(r: Run) -> str:
    """One row a name of ``tl_loops.measure``, with its values at the last core layer."""
    rows = [
        "| name | what it says | unit | source | tl-loops-tiny |",
        "|---|---|---|---|---|",
    ]
    for name, entry in MEASUREMENTS.items():
        if name in r.profile.metrics:
            value = _first_and_last_block(r, name)
        else:
            reason = why_not(entry, {}, r.model.cfg, r.model.layout, r.model.layout.n_layers)
            if reason is None:
                raise ValueError(f"the profile lacks {name!r}, which the model can give")
            value = "none: " + reason.split(" (")[0]
        rows.append(f"| `{name}` | {entry.summary} | {entry.unit} | {entry.source} | {value} |")
    return "\n".join(rows) + "\n"


def _first_and_last_block(r: Run, name: str) -> str:
    layout, mean = r.model.layout, r.profile.mean(name)
    blocks = [layout.index(iteration=t, layer=-1) for t in range(layout.n_iterations)]
    blocks = [block for block in blocks if not math.isnan(float(mean[block]))]
    if not blocks:
        return "none: no prompt has one"
    ends = dict.fromkeys([blocks[0], blocks[-1]])
    return " → ".join(f"{show(mean[block])} ({layout.label(block)})" for block in ends)


# --- writing ------------------------------------------------------------------------------------


def show(value: float | Tensor, digits: int = 3) -> str:
    """Three significant digits, without an exponent for what is easily written out."""
    number = float(value)
    if abs(number) < 1e-7:
        return "0" if number == 0 else f"{number:.0e}"
    if abs(number) >= 10**digits:
        return f"{number:.0f}"
    return f"{number:.{digits}g}"


def rewrite(text: str, numbers: Numbers, table: str) -> str:
    """The document with new numbers.

    Raises:
        ValueError: A key is only in the document or only in the numbers, or there is not exactly
            one table.
    """
    keys = {match[1] for match in NUMBER.finditer(text)}
    if keys != set(numbers):
        raise ValueError(
            f"the document asks for {sorted(keys - set(numbers))}, which is not measured, and does "
            f"not show {sorted(set(numbers) - keys)}; both must know the same keys"
        )
    text = NUMBER.sub(lambda match: f"<!--n {match[1]}-->{numbers[match[1]]}<!--/n-->", text)
    text, n_tables = TABLE.subn(lambda match: match[1] + table + match[2], text)
    if n_tables != 1:
        raise ValueError(f"the document has {n_tables} tables of measurements, expected one")
    return text


def compute() -> tuple[Numbers, str]:
    """All numbers by key, and the table of measurements."""
    with _one_thread(), torch.no_grad():
        r = run()
        numbers: Numbers = {}
        for group in GROUPS:
            for key, value in group(r).items():
                if key in numbers:
                    raise ValueError(f"{key!r} is measured twice")
                numbers[key] = value
        return numbers, measurements_table(r)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The same order of additions, and so the same digits, on every machine size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    found, rows = compute()
    DOCUMENT.write_text(rewrite(DOCUMENT.read_text("utf-8"), found, rows), "utf-8")
    print(f"{len(found)} numbers and {len(MEASUREMENTS)} measurements written to {DOCUMENT}")
