"""A plain call of every public function of the tools."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import tl_loops
from tests.fuzz.loop_calls import LOOP_CALLS, score
from tests.fuzz.metric_calls import METRIC_CALLS
from tests.fuzz.model_calls import MODEL_CALLS
from tests.fuzz.world import World
from tl_loops import attribution, lens
from tl_loops.circuits import Circuit, EdgeGraph
from tl_loops.drawing.figure import Axis, Figure, Line, Panel
from tl_loops.metrics.neurons import PredictionSuppression
from tl_loops.patching import MassiveSite, Site
from tl_loops.probes import PromptStates, TaskProbes, task_probes


def gate_score(gates: Tensor) -> Tensor:
    return gates[-1, :, -1].float().mean()


def _values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _neurons(w: World) -> PredictionSuppression:
    return tl_loops.metrics.prediction_suppression_neurons(w.model)


def _probes() -> TaskProbes:
    return task_probes(PromptStates.of(_values(3, 2, 12, 4)), [0, 1] * 6)


def _patch(w: World) -> dict[str, Any]:
    return dict(
        model=w.model, corrupted_tokens=w.tokens, clean_cache=w.cache, metric=score, progress=False
    )


def _gate(w: World) -> dict[str, Any]:
    tokens = dict(corrupted_tokens=w.tokens, clean_cache=w.gated_cache)
    return dict(model=w.gated, metric=gate_score, progress=False, **tokens)


def _read(w: World) -> dict[str, Any]:
    return dict(model=w.model, input=w.tokens)


class Halves:
    """An autoencoder that gives back half of what it is given."""

    def encode(self, x: Tensor) -> Tensor:
        return x / 2

    def decode(self, features: Tensor) -> Tensor:
        return features


def _figure(w: World) -> Figure:
    line = Line(torch.arange(3).numpy(), torch.arange(3).numpy(), "a", "#112233")
    return Figure("title", "", (Panel((line,), Axis("x"), Axis("y")),))


def _direction(w: World) -> dict[str, Any]:
    return dict(model=w.model, direction=_values(w.model.cfg.d_model))


def _words(w: World) -> list[str]:
    return [f"w{i}" for i in range(w.n_pos)]


CALLS: dict[str, Callable[[World], dict[str, Any]]] = {
    "measure": lambda w: dict(
        model=w.model, prompts=list(w.clean), metrics=("residual_norm", "mixing_score"),
        progress=False,
    ),
    "available_metrics": lambda w: dict(model=w.model),
    "exit_curve": lambda w: dict(model=w.model, prompts=list(w.clean), progress=False),
    "kv_sharing_effect": lambda w: dict(model=w.model, tokens=w.clean, kv_sharing="latest"),
    "patching.activation_patch": lambda w: dict(**_patch(w), where={"block": [0, 3]}),
    "patching.ablate": lambda w: dict(
        model=w.model, tokens=w.tokens, metric=score, method="mean", reference=w.cache,
        where={"block": [0, 3]}, progress=False,
    ),
    "patching.ablate_massive": lambda w: dict(
        model=w.model, tokens=w.tokens, metric=score, sites=[MassiveSite(1, "r0.0", 0, 0, 3, 9.0)],
        progress=False,
    ),
    "patching.axis_labels": lambda w: dict(model=w.model, axes=("block", "pos"), tokens=w.tokens),
    "patching.exit_gate_logits": lambda w: dict(model=w.gated, tokens=w.tokens),
    "patching.find_massive_sites": lambda w: dict(
        model=w.model, tokens=w.tokens, magnitude=1, ratio=2
    ),
    "patching.force_exit": lambda w: dict(model=w.gated, iteration=0),
    "patching.patch_exit_gate": lambda w: dict(**_gate(w), axes=("iteration",)),
    "patching.path_patch": lambda w: dict(
        **_patch(w),
        senders=[Site("attn_out", 0, 0)],
        receivers=[Site("resid_pre", -1, 0)],
    ),
    "patching.probe_exit_gate": lambda w: dict(model=w.gated, cache=w.gated_cache),
    "patching.repeat_schedule": lambda w: dict(model=w.model, iteration=0),
    "patching.run_schedule": lambda w: dict(
        model=w.model, tokens=w.tokens, schedule=[0, 0], return_cache=False
    ),
    "patching.skip_hooks": lambda w: dict(model=w.model, iterations=0),
    "patching.skip_schedule": lambda w: dict(model=w.model, iterations=0),
    "patching.splice": lambda w: dict(
        model=w.model, prompts=list(w.clean), autoencoder=Halves(),
        names=["blocks.1.hook_resid_post"], progress=False,
    ),
    "patching.splice_hooks": lambda w: dict(
        autoencoder=Halves(), names=["blocks.1.hook_resid_post"]
    ),
    "patching.swap_hooks": lambda w: dict(model=w.model, cache=w.cache, a=0, b=-1),
    "patching.swap_schedule": lambda w: dict(model=w.model, a=0, b=-1),
    "patching.transplant_hooks": lambda w: dict(
        model=w.model, cache=w.cache, source=[Site("q", 0, 0)], target=[Site("q", -1, 0)]
    ),
    "patching.transplant_sites": lambda w: dict(
        **_patch(w), sources=[Site("q", 0, 0)], targets=[Site("q", -1, 0)]
    ),
    "patching.transplant_states": _patch,
    "patching.Site.grid": lambda w: dict(self=Site("z", 0, 0), model=w.model, n_pos=w.n_pos),
    "lens.adjacent_agreement": lambda w: dict(predictions=w.tokens),
    "lens.coda_lens": _read,
    "lens.exit_lens": lambda w: dict(model=w.gated, input=w.tokens),
    "lens.fit_jacobian_lens": lambda w: dict(
        model=w.gated, prompts=list(w.clean[:, :2]), points="core", progress=False
    ),
    "lens.logit_kurtosis": lambda w: dict(logits=_values(3, 9)),
    "lens.logit_lens": _read,
    "lens.participation_ratio": lambda w: dict(matrix=_values(3, 4, 5)),
    "lens.rank_jumps": lambda w: dict(rank=w.tokens),
    "lens.read_lens": lambda w: dict(**_read(w), lens=lens.LogitLens(), points="states"),
    "lens.track_entities": lambda w: dict(**_read(w), entities={"a": 3}),
    "lens.train_tuned_lens": lambda w: dict(
        model=w.gated, prompts=list(w.clean), points="states", n_steps=2, batch_size=2,
        progress=False,
    ),
    "lens.transport_similarity": lambda w: dict(jacobians=_values(3, 4, 5)),
    "lens.EntityTracks.accuracy": lambda w: dict(self=w.tracks),
    "lens.EntityTracks.first_point": lambda w: dict(self=w.tracks),
    "lens.EntityTracks.leads_from": lambda w: dict(self=w.tracks, entity="a", rival="b"),
    "lens.LensResult.agreement": lambda w: dict(self=w.reading),
    "lens.LensResult.by_iteration": lambda w: dict(self=w.reading, values=w.reading.entropy),
    "lens.LensResult.text": lambda w: dict(self=w.reading, tokens=w.clean),
    "lens.LensResult.index": lambda w: dict(self=w.reading, name="r0"),
    "lens.JacobianLens.transport": lambda w: dict(
        self=w.jacobian, resid=_values(3, w.model.cfg.d_model), index=0
    ),
    "lens.TunedLens.translate": lambda w: dict(
        self=w.tuned, resid=_values(3, w.model.cfg.d_model), index=0
    ),
    "attribution.attribution_patch": lambda w: {
        k: v for k, v in _patch(w).items() if k != "progress"
    },
    "attribution.edge_attribution": _patch,
    "attribution.EdgeAttribution.top": lambda w: dict(
        self=attribution.edge_attribution(**_patch(w)), k=3
    ),
    "attribution.iteration_gradients": lambda w: dict(
        model=w.model, input=w.tokens, metric=score
    ),
    "attribution.step_influence": lambda w: dict(
        model=w.model, train=list(w.clean), queries=list(w.clean[:1])
    ),
    "measurements.find_measurement": lambda w: dict(name="sink_rate"),
    "plots.attention_heads": lambda w: dict(source=w.cache, tokens=w.clean[0]),
    "plots.attention_patterns": lambda w: dict(source=w.cache, tokens=w.clean[0]),
    "plots.attention_view": lambda w: dict(
        tokens=_words(w), attention=w.cache["pattern", 0][0]
    ),
    "plots.colored_tokens": lambda w: dict(
        tokens=_words(w), values=_values(w.n_pos), title="loss"
    ),
    "plots.draw": lambda w: dict(figure=_figure(w)),
    "plots.plot_curves": lambda w: dict(curves={"a": _values(4), "b": _values(4)}, title="curves"),
    "plots.plot_exit_curves": lambda w: dict(
        curve=tl_loops.exit_curve(w.model, list(w.clean), progress=False)
    ),
    "plots.plot_exits": lambda w: dict(source=_values(3, 4).softmax(0)),
    "plots.plot_fixed_points": lambda w: dict(source=_values(3, 4)),
    "plots.plot_floorplan": lambda w: dict(source=w.cache),
    "plots.plot_lens": lambda w: dict(result=w.reading),
    "plots.plot_matrix": lambda w: dict(
        values=_values(2, 3), rows=["a", "b"], columns=["c", "d", "e"], title="matrix"
    ),
    "plots.plot_probes": lambda w: dict(result=_probes()),
    "plots.plot_circuit": lambda w: dict(circuit=Circuit.whole(EdgeGraph.of(w.model))),
    "plots.plot_neurons": lambda w: dict(neurons=_neurons(w)),
    "plots.plot_pairs": lambda w: dict(source=w.cache),
    "plots.plot_patching": lambda w: dict(
        effect=_values(w.model.cfg.n_layers, w.n_pos), axes=("block", "pos"), model=w.model,
        tokens=w.tokens,
    ),
    "plots.plot_pca": lambda w: dict(source=w.cache),
    "plots.plot_profile": lambda w: dict(profile=w.profile),
    "plots.plot_ranks": lambda w: dict(result=w.reading),
    "plots.plot_residual_norms": lambda w: dict(source=w.cache),
    "plots.plot_stages": lambda w: dict(profile=w.profile, reference=w.profile),
    "plots.plot_trajectories": lambda w: dict(source=_values(20, 3, 8)),
    "plots.token_log_probs": lambda w: dict(source=w.reading, tokens=w.clean[0], model=w.model),
    "steering.steer": _direction,
    "steering.ablate_direction": _direction,
    "steering.difference_directions": lambda w: dict(
        model=w.model, positive=w.cache, negative=w.cache
    ),
    "steering.steering_effect": lambda w: dict(
        **_direction(w), tokens=w.tokens, metric=score, progress=False
    ),
    "loop_hooks.at": lambda w: dict(model=w.model, name="pattern", iteration=0, layer=0),
    "loop_hooks.every_iteration": lambda w: dict(model=w.model, name="pattern"),
    "loop_hooks.every_block": lambda w: dict(model=w.model, name="pattern"),
    "loop_hooks.names_filter": lambda w: dict(model=w.model, names=("pattern", "state_out")),
    "loop_hooks.hooks_at": lambda w: dict(names=("hook_embed",), hook=lambda x, hook: x),
    "loop_hooks.with_coordinate": lambda w: dict(
        model=w.model, hook=lambda value, hook, at: value
    ),
    "loop_hooks.coordinate_of": lambda w: dict(model=w.model, name="blocks.2.hook_resid_pre"),
    "loop_hooks.stack_iterations": lambda w: dict(cache=w.cache, model=w.model, name="pattern"),
    "loop_hooks.layout_of": lambda w: dict(model=w.model),
}  # fmt: skip

CALLS |= LOOP_CALLS | METRIC_CALLS | MODEL_CALLS
