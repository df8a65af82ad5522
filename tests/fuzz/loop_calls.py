"""Plain calls of the rooms about the loop itself: dynamics, circuits, training, losses, reports."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.world import World
from tl_loops import training
from tl_loops.circuits import Circuit, EdgeGraph
from tl_loops.dynamics import key_value_spectra
from tl_loops.probes import PromptStates, task_probes
from tl_loops.tasks import sample_pair
from tl_loops.training import (
    ConstantIterations,
    TrainingBatch,
    TrainingSettings,
    training_pass,
)


def score(logits: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide[:, -1, 3].mean() - wide[:, -1, 4].mean()


def _values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _shares(*shape: int) -> Tensor:
    return _values(*shape).softmax(0)


def _circuits(w: World) -> dict[str, Any]:
    return dict(model=w.model, tokens=w.tokens, metric=score, reference=w.cache, progress=False)


def _one(w: World) -> dict[str, Any]:
    return dict(model=w.gated, prompt=w.clean[0])


def _corpus(w: World) -> Tensor:
    return w.clean.flatten().repeat(20)


def _batch(w: World) -> TrainingBatch:
    return TrainingBatch.next_tokens(w.clean)


def _settings(**fields: Any) -> TrainingSettings:
    sizes = dict(n_steps=2, batch_size=2, n_context=4)
    return TrainingSettings(**{**sizes, "iterations": ConstantIterations(2), **fields})


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _spectra(w: World) -> Any:
    return key_value_spectra(w.model, list(w.clean))


def _jacobian(w: World) -> dict[str, Any]:
    entering = _values(1, 3, 4).requires_grad_()
    return dict(entering=entering, leaving=entering.sin(), generator=_generator())


def _states(seed: int = 0) -> PromptStates:
    values = torch.randn(3, 2, 12, 4, generator=torch.Generator().manual_seed(seed))
    return PromptStates.of(values)


def _probes() -> Any:
    return task_probes(_states(), [0, 1] * 6, n_shuffles=2)


_DRAWS = {
    "ConstantIterations": training.ConstantIterations(3),
    "UniformIterations": training.UniformIterations(1, 3),
    "PoissonIterations": training.PoissonIterations(2.0, 5),
    "LogNormalPoissonIterations": training.LogNormalPoissonIterations(2.0, 5),
    "MixedIterations": training.MixedIterations(
        training.ConstantIterations(1), training.ConstantIterations(2)
    ),
}


def _draw(name: str) -> dict[str, Any]:
    return dict(self=_DRAWS[name], generator=_generator())


LOOP_CALLS: dict[str, Callable[[World], dict[str, Any]]] = {
    "dynamics.kernel_alignment": lambda w: dict(model=w.model, prompts=list(w.clean)),
    "dynamics.key_value_spectra": lambda w: dict(model=w.model, prompts=list(w.clean)),
    "dynamics.KeyValueSpectra.effective_rank": lambda w: dict(self=_spectra(w), what="k"),
    "dynamics.KeyValueSpectra.rank_for_share": lambda w: dict(self=_spectra(w), what="k"),
    "dynamics.KeyValueSpectra.to_frame": lambda w: dict(self=_spectra(w)),
    "dynamics.loop_map": _one,
    "dynamics.loop_maps": _one,
    "dynamics.iteration_jacobians": lambda w: dict(
        **_one(w), iterations=[0], n_probes=2, krylov_dim=200
    ),
    "dynamics.run_exponents": _one,
    "dynamics.injection_sensitivity": lambda w: dict(
        model=w.settling, prompt=w.clean[0], directions=_values(1, w.n_pos, 16)
    ),
    "circuits.score": lambda w: dict(**_circuits(w), n_steps=2),
    "circuits.prune": lambda w: dict(scores=w.scores, n_edges=3),
    "circuits.faithfulness": lambda w: dict(**_circuits(w), circuits=w.circuit),
    "circuits.faithfulness_curve": lambda w: dict(
        **_circuits(w), scores=w.scores, n_edges=[3, 5]
    ),
    "circuits.completeness": lambda w: dict(**_circuits(w), circuit=w.circuit),
    "circuits.minimality": lambda w: dict(**_circuits(w), circuit=w.circuit, by="iteration"),
    "circuits.Circuit": lambda w: dict(
        graph=w.circuit.graph, kept=w.circuit.kept, scores=w.circuit.scores
    ),
    "circuits.Circuit.empty": lambda w: dict(graph=EdgeGraph.of(w.model)),
    "circuits.Circuit.whole": lambda w: dict(graph=EdgeGraph.of(w.model)),
    "circuits.Circuit.from_json": lambda w: dict(text=w.circuit.to_json()),
    "circuits.Circuit.parts": lambda w: dict(self=w.circuit, by="node"),
    "circuits.Circuit.without": lambda w: dict(self=Circuit.whole(w.circuit.graph)),
    "circuits.EdgeGraph.of": lambda w: dict(model=w.model),
    "circuits.EdgeGraph.node_of": lambda w: dict(self=w.circuit.graph, receiver=0),
    "circuits.EdgeScores.top": lambda w: dict(self=w.scores, k=2),
    "circuits.PartEffects.top": lambda w: dict(self=w.effects, k=2),
    "training.ConstantIterations": lambda w: dict(n=3),
    "training.UniformIterations": lambda w: dict(least=1, most=3),
    "training.PoissonIterations": lambda w: dict(mean=2.0, most=5),
    "training.LogNormalPoissonIterations": lambda w: dict(mean=2.0, most=5),
    "training.MixedIterations": lambda w: dict(
        first=training.ConstantIterations(1), second=training.ConstantIterations(2), share=0.5
    ),
    "training.ConstantIterations.draw": lambda w: _draw("ConstantIterations"),
    "training.UniformIterations.draw": lambda w: _draw("UniformIterations"),
    "training.PoissonIterations.draw": lambda w: _draw("PoissonIterations"),
    "training.LogNormalPoissonIterations.draw": lambda w: _draw("LogNormalPoissonIterations"),
    "training.MixedIterations.draw": lambda w: _draw("MixedIterations"),
    "training.Corpus": lambda w: dict(tokens=_corpus(w), n_context=3),
    "training.Corpus.draw": lambda w: dict(
        self=training.Corpus(_corpus(w), 3), n=2, generator=_generator()
    ),
    "training.TrainingBatch": lambda w: dict(tokens=w.clean, targets=w.clean),
    "training.TrainingBatch.next_tokens": lambda w: dict(tokens=w.clean),
    "training.TrainingBatch.after": lambda w: dict(self=_batch(w), t=1),
    "training.evaluate_batches": lambda w: dict(
        model=w.gated, batches=[_batch(w)], n_iterations=[1, 2]
    ),
    "training.target_losses": lambda w: dict(
        logits=_values(2, 3, 9), targets=torch.ones(2, 3).long()
    ),
    "training.state_radius": lambda w: dict(model=w.model),
    "training.limit_state_radius": lambda w: dict(model=copy.deepcopy(w.model), most=0.5),
    "training.TrainingSettings": lambda w: dict(n_steps=3, batch_size=2, n_context=4),
    "training.TrainingSettings.learning_rate_at": lambda w: dict(self=_settings(), step=1),
    "training.TrainingLog.column": lambda w: dict(self=w.training_log, name="step"),
    "training.draw_contexts": lambda w: dict(
        corpus=_corpus(w), n_contexts=2, n_context=3, generator=_generator()
    ),
    "training.cut_contexts": lambda w: dict(corpus=_corpus(w), n_context=3),
    "training.evaluate": lambda w: dict(
        model=w.gated, corpus=_corpus(w), n_context=4, n_iterations=[1, 2], n_contexts=2
    ),
    "training.train": lambda w: dict(
        model=copy.deepcopy(w.gated), data=_corpus(w), settings=_settings(), progress=False,
        evaluation=_corpus(w), evaluation_iterations=[1, 2], n_evaluation=2,
    ),
    "training.training_pass": lambda w: dict(
        model=w.gated, tokens=w.clean, n_iterations=w.n_iterations
    ),
    "training.exit_logits": lambda w: dict(
        model=w.gated, tokens=w.clean, run=training_pass(w.gated, w.clean, w.n_iterations)
    ),
    "training.step_losses": lambda w: dict(
        model=w.gated, tokens=w.clean, run=training_pass(w.gated, w.clean, w.n_iterations),
        settings=_settings(growth_weight=1.0), generator=_generator(),
    ),
    "training.iteration_gradients": lambda w: dict(model=w.gated, tokens=w.clean),
    "training.token_losses": lambda w: dict(
        logits=_values(2, 3, 9), tokens=torch.ones(2, 3).long()
    ),
    "training.growth_penalty": lambda w: dict(states=_values(3, 2, 4, 5)),
    "training.settling_penalty": lambda w: dict(states=_values(3, 2, 4, 5)),
    "training.jacobian_penalty": _jacobian,
    "loop_losses.act_ponder_cost": lambda w: dict(halting=_shares(3, 4)),
    "loop_losses.geometric_prior": lambda w: dict(n_iterations=3, rate=0.2),
    "loop_losses.ponder_loss": lambda w: dict(losses=_values(3, 4).abs(), halting=_shares(3, 4)),
    "loop_losses.expected_exit_loss": lambda w: dict(
        losses=_values(3, 4).abs(), probabilities=_shares(3, 4)
    ),
    "loop_losses.ponder_training_loss": lambda w: dict(model=w.pondering, tokens=w.clean),
    "loop_losses.routing_balance_loss": lambda w: dict(weights=_values(4, 3).softmax(-1)),
    "report.default_prompts": lambda w: dict(model=w.model),
    "report.report_html": lambda w: dict(
        model=w.model, prompts=[sample_pair()[0].text], n_iterations=1, progress=False
    ),
    "report.ReportPrompts": lambda w: dict(shown=list(w.default_prompts.shown)),
    "patching.Site": lambda w: dict(activation="z", iteration=0, layer=0),
    "patching.MassiveSite": lambda w: dict(
        block=1, label="r0.0", row=0, pos=0, dim=3, value=9.0
    ),
    "probes.gather_states": lambda w: dict(model=w.model, prompts=list(w.clean)),
    "probes.task_probes": lambda w: dict(states=_states(), labels=[0, 1] * 6, n_shuffles=2),
    "probes.pair_probes": lambda w: dict(preferred=_states(), other=_states(1), n_shuffles=2),
    "probes.flip_test": lambda w: dict(given=_values(3, 4), swapped=-_values(3, 4)),
    "probes.concept_directions": lambda w: dict(
        positive=_states(), negative=_states(1), n_shuffles=2
    ),
    "probes.PromptStates.label": lambda w: dict(self=_states(), iteration=0, layer=0),
    "probes.PromptStates.of": lambda w: dict(values=_values(3, 2, 12, 4)),
    "probes.PromptStates.rows": lambda w: dict(self=_states(), prompts=[0, 1]),
    "probes.TaskProbes.interval": lambda w: dict(self=_probes()),
    "probes.TaskProbes.predict": lambda w: dict(self=_probes(), states=_states()),
    "loop": lambda w: dict(model=w.feedforward, start=0, stop=1, n_iterations=2),
    "map_prompts": lambda w: dict(
        model=w.gated, function=lambda tokens: torch.tensor(1.0), prompts=list(w.clean),
        what="sums", progress=False,
    ),
    "read_part_label": lambda w: dict(label="r0.L1H2"),
    "LoopProfile.align_stages": lambda w: dict(
        self=w.profile, reference=w.profile, metric="residual_norm"
    ),
    "LoopProfile.by_iteration": lambda w: dict(self=w.profile, metric="residual_norm"),
    "LoopProfile.by_layer": lambda w: dict(self=w.profile, metric="residual_norm"),
    "LoopProfile.count": lambda w: dict(self=w.profile, metric="residual_norm"),
    "LoopProfile.mean": lambda w: dict(self=w.profile, metric="residual_norm"),
    "LoopProfile.plot": lambda w: dict(self=w.profile),
    "LoopProfile.std": lambda w: dict(self=w.profile, metric="residual_norm"),
    "LoopProfile.undefined": lambda w: dict(self=w.profile, metric="residual_norm"),
    "LoopProfile.unrolled": lambda w: dict(self=w.profile, metric="residual_norm"),
    "LoopLayout.alias": lambda w: dict(self=w.model.layout, name="iter.0.0.hook_z"),
    "LoopLayout.by_iteration": lambda w: dict(
        self=w.model.layout, values=_values(w.model.cfg.n_layers)
    ),
    "LoopLayout.canonical_name": lambda w: dict(self=w.model.layout, name="iter.0.0.hook_z"),
    "LoopLayout.coordinate": lambda w: dict(self=w.model.layout, index=1),
    "LoopLayout.hook_name": lambda w: dict(self=w.model.layout, name="z", iteration=0, layer=0),
    "LoopLayout.index": lambda w: dict(self=w.model.layout, iteration=0),
    "LoopLayout.iteration_blocks": lambda w: dict(self=w.model.layout, iteration=0),
    "LoopLayout.label": lambda w: dict(self=w.model.layout, index=1),
    "LoopLayout.notation": lambda w: dict(self=w.model.layout, injected=True),
    "LoopLayout.pass_blocks": lambda w: dict(self=w.model.layout, iteration=0),
    "LoopLayout.physical_name": lambda w: dict(self=w.model.layout, index=1),
    "LoopLayout.place_in_pass": lambda w: dict(self=w.model.layout, index=1),
    "LoopLayout.state_path": lambda w: dict(self=w.model.layout, iteration=0),
    "LoopLayout.with_iterations": lambda w: dict(self=w.model.layout, n_iterations=2),
}  # fmt: skip
"""A call that is as it is meant, for each name."""
