"""Every kind of figure of ``tl_loops.plots``, with labels and numbers of usual sizes."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch

from tl_loops import (
    LoopedTransformer,
    circuits,
    exit_curve,
    lens,
    measure,
    metrics,
    plots,
    probes,
    tasks,
)

NO_FIGURES = {"CircuitsView", "circuitsvis_script", "draw"}
"""Names of ``tl_loops.plots`` that draw nothing of their own."""

METRICS = ("sink_rate", "mixing_score", "residual_norm", "successive_difference",
           "fixed_point_distance", "fixed_point_cosine", "exit_probability")  # fmt: skip


class Data:
    """What the figures show: the embedded model on its own task, and long loops by hand."""

    def __init__(self, n_iterations: int = 8):
        self.model = LoopedTransformer.from_pretrained_no_processing("tl-loops-tiny", device="cpu")
        self.n_iterations = n_iterations
        self.clean = tasks.sample_pair()[0]
        self.tokens = self.model.to_tokens(self.clean.text)
        self.known = tasks.fact_chain_prompts(2, seed=1)
        self.names = {f"hop {k + 1}: {name}": name for k, name in enumerate(self.clean.hops)}
        with torch.no_grad(), self.model.iterations(n_iterations):
            prompts = [prompt.text for prompt in self.known]
            chosen = [m for m in METRICS if m != "exit_probability"]
            self.profile = measure(self.model, prompts, chosen, progress=False)
            _, self.cache = self.model.run_with_cache(self.tokens)
            self.ranks = lens.coda_lens(self.model, self.tokens, positions="last", track=self.names)
            self.read = lens.coda_lens(self.model, self.tokens, keep_logits=True)
            self.short = lens.coda_lens(self.model, self.tokens[:, :12])
            answers = [prompt.answer for prompt in self.known]
            self.curve = exit_curve(self.model, prompts, answers, progress=False)
            self.scores = circuits.score(
                self.model, self.tokens, lambda logits: logits[0, -1, 3], "zero", progress=False
            )
            self.plain_curve = exit_curve(self.model, prompts, progress=False)

    @cached_property
    def long_states(self) -> torch.Tensor:
        """64 iterations of two layers that contract, [iteration, layer, token, d_model]."""
        t = torch.arange(64.0)[:, None, None, None]
        start = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
        return start * 0.8**t + 1


def figures(data: Data, **options: Any) -> dict[str, list[Callable[[], Any]]]:
    """Calls by the name of their function; those of ``plot_...`` with options such as a width."""
    model, cache, tokens, profile = data.model, data.cache, data.tokens, data.profile
    about = {"model": model, "prompts": tokens}
    made: dict[str, list[Callable[[], Any]]] = {}

    def add(name: str, *args: Any, **more: Any) -> None:
        given = options if name.startswith("plot_") else {}
        made.setdefault(name, []).append(partial(getattr(plots, name), *args, **more, **given))

    n, n_core, n_pos = data.n_iterations, model.cfg.n_core, tokens.shape[1]
    random = torch.Generator().manual_seed(0)
    for by in ("iteration", "layer", "unrolled"):
        add("plot_profile", profile, "mixing_score", by=by, std=True)
    add("plot_profile", profile, "sink_rate")
    many = {"one": torch.rand(64, generator=random), "two": torch.zeros(64)}
    add("plot_curves", many, "Two curves of a share", bounds=(0, 1), y_label="share (0 to 1)")
    add("plot_fixed_points", profile)
    add("plot_fixed_points", data.long_states, model="long", prompts=3)
    for what in ("cosine", "attention"):
        add("plot_pairs", cache, what, **about)
    add("plot_matrix", torch.eye(4), metrics.TRAJECTORY_LABELS, metrics.TRAJECTORY_LABELS,
        "Classes of one token on its layers", row_label="given on some layer",
        column_label="also on some layer", unit="share of tokens", limits=(0, 1))  # fmt: skip
    for n_components in (2, 3):
        add("plot_pca", cache, n_components, **about)
    add("plot_trajectories", cache, **about)
    add("plot_stages", profile, torch.rand(6, generator=random), "mixing_score")
    add("plot_residual_norms", cache, **about)
    add("plot_neurons", metrics.prediction_suppression_neurons(model), model=model)
    effect = torch.randn(n, n_core, n_pos, generator=random)
    axes = ("iteration", "layer", "pos")
    unit = "share of the logit difference that is restored"
    for more in ({}, {"facet": "layer", "unit": unit}, {"animate": True}):
        add("plot_patching", effect, axes, model=model, tokens=tokens, **more)
    for by in ("depth", "layer"):
        add("plot_ranks", data.ranks, by, **about)
    for curve in (data.curve, data.plain_curve):
        add("plot_exit_curves", curve, model=model)
    add("plot_exits", torch.randn(64, 3, generator=random).softmax(0), model="long", prompts=3)
    add("plot_exits", {"kl": torch.tensor([0, 3, 7]), "cosine": torch.tensor([2, 5, 7])},
        n_iterations=n, **about)  # fmt: skip
    add("plot_lens", data.read, **about)
    add("plot_lens", data.short, **about)
    add("plot_lens", data.ranks, "entropy", **about)
    values = torch.randn(n, n_core, 40, 4, generator=random)
    probed = probes.task_probes(probes.PromptStates.of(values), [0, 1] * 20)
    for what in ("accuracy", "transfer"):
        add("plot_probes", probed, what, model=model)
    add("plot_circuit", circuits.prune(data.scores, 40), **about)
    for heads in ("all", "mean"):
        add("plot_floorplan", cache, heads=heads, **about)
    add("attention_view", model.to_str_tokens(tokens[0]), cache["pattern", 1][0])
    add("attention_heads", cache, tokens, iterations=(0, -1), layers=0)
    add("attention_patterns", cache, tokens, iterations=(0, -1))
    add("colored_tokens", tokens, torch.arange(n_pos), "Position", model=model)
    add("token_log_probs", data.read, tokens, model, iterations=(0, -1))
    return made
