"""Which functions are public, by name, and which of them have no case in the fuzz of calls."""

import inspect
from collections.abc import Callable
from types import ModuleType

import tl_loops
from tl_loops import (
    attribution,
    circuits,
    dynamics,
    lens,
    loop_hooks,
    loop_losses,
    measurements,
    metrics,
    patching,
    plots,
    probes,
    report,
    steering,
    training,
)

ROOMS: dict[str, ModuleType] = {
    "patching": patching,
    "lens": lens,
    "attribution": attribution,
    "measurements": measurements,
    "plots": plots,
    "steering": steering,
    "loop_hooks": loop_hooks,
    "dynamics": dynamics,
    "circuits": circuits,
    "training": training,
    "loop_losses": loop_losses,
    "report": report,
    "metrics": metrics,
    "probes": probes,
}
OF_THE_PACKAGE = (
    "ExitCurve",
    "LoopLayout",
    "LoopProfile",
    "available_metrics",
    "exit_curve",
    "kv_sharing_effect",
    "loop",
    "map_prompts",
    "measure",
    "read_part_label",
)
"""Functions, and classes with methods, that the package itself names."""
METHODS = {
    "LoopedActivationCache": """
        accumulated_resid apply_ln_to_stack apply_slice_to_batch_dim decompose_resid
        get_full_resid_decomposition get_neuron_results logit_attrs stack_activation
        stack_head_results stack_neuron_results
    """.split(),
    "LoopedTransformer": """
        accumulated_bias all_composition_scores enter_coda forward generate hook_name
        input_to_embed state_logits
    """.split(),
}
"""Of classes that inherit from TransformerLens: the methods that give numbers of the project's
own. tests/unit/model/test_odd_calls.py has more of a model, tests/differential all of a cache."""
NOT_HERE = {
    "BlockCoordinate": "a row of a layout, which no user makes",
    "HookedTransformer": "TransformerLens's",
    "KVSharing": "tests/unit/model/test_kv_sharing.py, and as an argument of kv_sharing_effect",
    "KVSharingEffect": "a result without methods",
    "LoopedTransformerConfig": "tests/unit/config/test_ranges.py",
    "PartLabel": "a result without methods",
    "UnrolledBridge": "tests/bridged, which need TransformerLens 4",
    "merge_shards": "takes files alone: tests/unit/runs/test_shards.py",
    "register": "takes nothing",
    "tasks": "plain Python that needs nothing of the project: tests/unit/tasks",
    "unregister": "takes nothing",
    "unroll": "takes a bridge: tests/bridged, which need TransformerLens 4",
}
"""Names of the package that are not in the fuzz, and why."""
MADE_BY_USERS = {
    "circuits.Circuit",
    "patching.MassiveSite",
    "patching.Site",
    "report.ReportPrompts",
    "training.ConstantIterations",
    "training.Corpus",
    "training.LogNormalPoissonIterations",
    "training.MixedIterations",
    "training.PoissonIterations",
    "training.TrainingBatch",
    "training.TrainingSettings",
    "training.UniformIterations",
}
"""Classes that users call themselves."""


def public_functions() -> dict[str, Callable]:
    """Every public function of the tools, and every method of what they give, by name."""
    found: dict[str, Callable] = {}
    for name in OF_THE_PACKAGE:
        found |= _functions_of(name, getattr(tl_loops, name))
    for name, methods in METHODS.items():
        cls = getattr(tl_loops, name)
        found |= {f"{name}.{method}": getattr(cls, method) for method in methods}
    for room, module in ROOMS.items():
        own = [
            name
            for name, value in vars(module).items()
            if inspect.isroutine(value) and value.__module__ == module.__name__ and name[0] != "_"
        ]
        for name in getattr(module, "__all__", own):
            found |= _functions_of(f"{room}.{name}", getattr(module, name))
    return found


def _functions_of(name: str, value: object) -> dict[str, Callable]:
    """A function itself; the methods of a class, and it too where users call it."""
    if not inspect.isclass(value):
        callable_ = inspect.isroutine(value) or hasattr(value, "__wrapped__")
        return {name: value} if callable_ else {}  # pyright: ignore[reportReturnType]
    ours = [base for base in value.__mro__ if base.__module__.startswith("tl_loops.")]
    methods = {
        f"{name}.{key}": getattr(value, key)
        for base in reversed(ours)
        for key, method in vars(base).items()
        if key[0] != "_" and (inspect.isfunction(method) or isinstance(method, classmethod))
    }
    return methods | ({name: value} if name in MADE_BY_USERS else {})


_ALL = public_functions()
_WHY: dict[str, tuple[str, ...]] = {
    "asked by read_lens, which has checked it all": tuple(
        name
        for name in _ALL
        if name.startswith("lens.") and name.endswith((".check", ".reads_sequence", ".logits"))
    ),
    "called with entries of the registry: tests/unit/measurements": (
        "measurements.Measurement.blocks",
        "measurements.core_calls",
        "measurements.resolve_options",
        "measurements.why_not",
    ),
    "takes nothing, or a path alone: tests/unit/test_writing.py, tests/unit/test_full_disks.py": (
        "ExitCurve.std",
        "ExitCurve.to_frame",
        "LoopLayout.coordinates",
        "LoopLayout.labels",
        "LoopLayout.physical_names",
        "LoopProfile.load",
        "LoopProfile.save",
        "LoopProfile.to_frame",
        "attribution.EdgeAttribution.by_iteration",
        "attribution.IterationGradients.to_frame",
        "attribution.IterationGradients.total",
        "circuits.Circuit.by_iteration",
        "circuits.Circuit.complement",
        "circuits.Circuit.connected",
        "circuits.Circuit.edges",
        "circuits.Circuit.live",
        "circuits.Circuit.load",
        "circuits.Circuit.save",
        "circuits.Circuit.to_json",
        "circuits.Circuit.to_networkx",
        "circuits.EdgeScores.by_iteration",
        "dynamics.IterationJacobians.to_frame",
        "dynamics.KernelAlignment.to_frame",
        "lens.EntityTracks.mean_log_rank",
        "lens.JacobianLens.load",
        "lens.JacobianLens.save",
        "lens.LensResult.answer_flips",
        "lens.LensResult.saturation_iteration",
        "lens.LensResult.to_frame",
        "lens.TunedLens.load",
        "lens.TunedLens.save",
        "probes.ConceptDirections.load",
        "probes.ConceptDirections.save",
        "patching.SpliceResult.to_frame",
        "probes.ConceptDirections.to_frame",
        "probes.FlipTest.load",
        "probes.FlipTest.save",
        "probes.PairProbes.load",
        "probes.PairProbes.save",
        "probes.PairProbes.to_frame",
        "probes.PromptStates.load",
        "probes.PromptStates.save",
        "probes.TaskProbes.load",
        "probes.TaskProbes.save",
        "probes.TaskProbes.to_frame",
        "probes.TaskProbes.transfer_to_frame",
        "training.TrainingLog.evaluation_frame",
        "training.TrainingLog.tensors",
        "training.TrainingLog.to_frame",
        "training.TrainingSettings.identity",
    ),
    "a block of code and what is asked in it: tests/unit/attribution/test_iteration_gradients.py": (
        "attribution.IterationGradients.cosines",
        "attribution.IterationGradients.gram",
        "attribution.IterationGradients.norms",
        "attribution.WeightUses.gradients",
        "attribution.split_weights",
    ),
    "called by train with what it has made: tests/unit/training": (
        "training.AdaptiveData.after_step",
        "training.AdaptiveData.draw",
        "training.AdaptiveData.identity",
        "training.AdaptiveData.load_state",
        "training.AdaptiveData.state",
        "training.Corpus.identity",
        "training.IterationDraw.draw",
        "training.TrainingBatch.to",
        "training.TrainingData.draw",
        "training.TrainingData.identity",
        "training.TrainingLog.add_evaluation",
        "training.TrainingLog.add",
        "training.TrainingLog.from_tensors",
    ),
    "takes results of other shards: tests/unit/runs/test_tools_in_shards.py": (
        "ExitCurve.merge",
        "LoopProfile.merge",
    ),
    "takes segments, which users do not make: tests/unit/layout": ("LoopLayout.of_segments",),
    "asked by a run about blocks that there are: tests/unit/layout": (
        "LoopLayout.begins_at",
        "LoopLayout.ends_at",
        "LoopLayout.next_iteration",
    ),
    "is report_html and a path: tests/unit/report, tests/unit/test_full_disks.py": (
        "report.write_report",
    ),
    "called by the probes with the names of their arguments: tests/unit/probes": (
        "probes.PromptStates.check_like",
    ),
    "gives text: tests/unit/plots": (
        "plots.CircuitsView.element",
        "plots.CircuitsView.to_html",
        "plots.circuitsvis_script",
    ),
}
ELSEWHERE = {name: why for why, names in _WHY.items() for name in names}
"""Public functions without a case in the fuzz of calls, and why."""
