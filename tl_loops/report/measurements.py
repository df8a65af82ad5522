"""Attention, residual stream and dynamics by iteration and layer, from one measurement."""

import torch

from tl_loops import plots
from tl_loops.cache.cache import LoopedActivationCache
from tl_loops.layout.model import Model
from tl_loops.measurements.profile import LoopProfile
from tl_loops.metrics import TRAJECTORY_LABELS, classify_trajectory, prediction_suppression_neurons
from tl_loops.report.section import Section, columns, page_figure, percent

ATTENTION = ("sink_rate", "mixing_score", "colsum_concentration")
RESIDUAL = ("residual_entropy", "residual_norm")
DYNAMICS = (
    "successive_difference",
    "successive_difference_relative",
    "fixed_point_distance",
    "fixed_point_cosine",
)
EXITS = ("exit_probability", "expected_exit_iteration")
PATHS = ("radial_step", "tangential_step", "path_efficiency")
MEASURED = (*ATTENTION, *RESIDUAL, *DYNAMICS, *PATHS, *EXITS)
_WORDS = {
    "sink_rate": "sink rate",
    "mixing_score": "mixing score",
    "colsum_concentration": "ColSum concentration",
    "residual_entropy": "residual entropy",
}
_MOST_NEURON_TERMS = 2_000_000_000


def stages_section(profile: LoopProfile) -> Section:
    """Sink rate, mixing score, ColSum concentration and residual entropy in two groupings."""
    layout = profile.layout
    metrics = (*ATTENTION, "residual_entropy")
    if layout is not None and layout.segments is not None:
        figures = [page_figure(plots.plot_profile, profile, m, by="unrolled") for m in metrics]
        text = (
            "Definitions of arXiv 2604.11791: means over heads, then over prompts, each prompt at "
            "its own length. This model has several loops, so the curves run along all blocks."
        )
        return Section("attention-metrics", "Attention and entropy by block", [text], figures)
    moves = profile.provenance.n_iterations != 1
    notes = []
    for metric, words in _WORDS.items():
        core = profile.by_iteration(metric)
        first, last = float(core[0].nanmean()), float(core[-1].nanmean())
        notes.append(f"{words} {first:.3f} → {last:.3f}" if moves else f"{words} {last:.3f}")
    when = "From the first iteration to the last" if moves else "In the one iteration"
    finding = f"{when}: {', '.join(notes)} (means over core layers)."
    text = (
        "Definitions of arXiv 2604.11791: means over heads, then over prompts, each prompt at its "
        "own length. Each metric has one curve per iteration over the relative depth of a pass; "
        "curves that lie on top of each other mean that the iterations repeat each other."
        + (" A second figure has one curve per core layer over the iterations." if moves else "")
    )
    figures = [
        page_figure(plots.plot_profile, profile, metric, by=by)
        for metric in metrics
        for by in (("iteration", "layer") if moves else ("iteration",))
    ]
    return Section(
        "attention-metrics",
        "Attention and entropy by iteration and layer",
        [text, finding],
        [columns(figures)],
        finding=finding,
    )


def dynamics_section(
    model: Model, profile: LoopProfile, cache: LoopedActivationCache, prompt: str
) -> Section:
    """Whether the states settle: steps, distances, path and trajectory classes."""
    T = model.cfg.n_iterations
    paragraphs, finding = [], ""
    if T > 1:
        relative = profile.by_iteration("successive_difference_relative")
        first, last = float(relative[1].mean()), float(relative[-1].mean())
        cosine = float(profile.by_iteration("fixed_point_cosine")[-2].mean())
        finding = (
            f"A step is {percent(first)} of the state's length in iteration 1 and {percent(last)} "
            f"in the last; the last two iterations have a cosine of {cosine:.3f}."
        )
        paragraphs.append(finding)
    figures = [
        page_figure(plots.plot_pca, cache, prompts=prompt),
        page_figure(plots.plot_residual_norms, profile),
    ]
    if T == 1:
        paragraphs.append("With one iteration there is no step whose size could be measured.")
    else:
        states = cache.stack_activation("state_out")[:, 0]
        found = classify_trajectory(states)
        shares = ", ".join(
            f"{label.replace('_', ' ')} {percent(found.fraction(label))}"
            for label in TRAJECTORY_LABELS
        )
        paragraphs.append(
            "Trajectories of the tokens of one prompt, by the classes of arXiv 2604.11791: "
            f"{shares}."
        )
        figures.insert(0, page_figure(plots.plot_fixed_points, profile))
        figures.insert(2, page_figure(plots.plot_trajectories, found, model=model, prompts=prompt))
    return Section(
        "dynamics", "Fixed points and trajectories", paragraphs, figures, finding=finding
    )


def pairs_section(cache: LoopedActivationCache, prompt: str) -> Section:
    """Likeness of all pairs of unrolled blocks."""
    figures = [
        page_figure(plots.plot_pairs, cache, what, prompts=prompt)
        for what in ("cosine", "attention")
    ]
    text = (
        "Cosine of the residual streams after two blocks, and distance of their attention "
        "patterns. A loop that has settled into a cycle shows stripes, one every core layer."
    )
    return Section("pairs", "All pairs of blocks", [text], [columns(figures)])


def neurons_section(model: Model) -> Section | None:
    """Prediction and suppression neurons; ``None`` where they cost too much or do not exist."""
    cfg = model.cfg
    if not cfg.d_mlp or cfg.n_physical_layers * cfg.d_mlp * cfg.d_vocab > _MOST_NEURON_TERMS:
        return None
    neurons = prediction_suppression_neurons(model)
    predicting = float(neurons.prediction_fraction.max())
    most = f"At most {percent(predicting)} of a layer's neurons predict."
    text = (
        "Prediction neurons raise a few tokens, suppression neurons lower them, read from the "
        "weights alone (arXiv 2604.11791, App. E.1). They belong to physical layers, so each "
        f"iteration has the same. {most if predicting else 'Here no neuron predicts.'}"
    )
    figure = page_figure(plots.plot_neurons, neurons, model=model)
    return Section("neurons", "Prediction and suppression neurons", [text], [figure])


def exits_section(model: Model, profile: LoopProfile) -> Section | None:
    """Where the model's own halting gate would stop; ``None`` without a gate."""
    if "exit_probability" not in profile.metrics:
        return None
    expected = float(torch.as_tensor(profile.mean("expected_exit_iteration")).nanmean())
    finding = f"The halting gate would leave the loop after iteration {expected:.2f} on average."
    figure = page_figure(plots.plot_exits, profile, model=model)
    return Section("exits", "When the model would stop", [finding], [figure], finding=finding)
