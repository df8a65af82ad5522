"""Of what kind each argument of a public function is, and so what may be odd about it."""

import inspect
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, SupportsIndex, Union, get_args, get_origin

from tests.fuzz import odd_inputs as inputs
from tests.fuzz import odd_values as odd
from tests.fuzz.public_names import METHODS, public_functions

_MANY = {
    inputs.models: "model",
    inputs.prompts: "corrupted_tokens input tokens",
    inputs.caches: "clean_cache cache reference positive negative",
    odd.metrics: "metric",
    odd.seeds: "seed",
    odd.integers: "batch_size window n_steps n_iterations top_k vjp_batch_size times k n_pos "
    "skip_positions max_rank n_prompt height width digits n_components examples tile "
    "iterations_per_row vocab_size n_queries_at_once checkpoint_every most_edges most_hovered",
    odd.indices: "iteration layer head row position a b index",
    odd.selections: "iterations layers positions pos sources targets schedule",
    odd.flags: "progress gradients together std log null partition outer animate heads split_qkv "
    "keep_logits return_cache normalize",
    odd.numbers: "magnitude ratio learning_rate scale scales",
    odd.choices: "activation method mean_over what by backend readout target kv_sharing colours "
    "value name phase facet entity rival",
    odd.words: "title unit legend x_label y_label row_label column_label",
    odd.names: "weights axes freeze points metrics names rows columns head_names phases",
    odd.places: "where",
    inputs.prompt_lists: "prompts train queries",
    inputs.tensors: "direction values attention effect logits matrix jacobians rank predictions "
    "resid",
    inputs.sources: "circuit source profile curve neurons result figure",
    odd.optional_objects: "alignment layout generator lens initial_state shown evaluated fit_on "
    "other_hidden",
    odd.mappings: "curves entities track",
    inputs.masks: "attention_mask",
    odd.limits: "limits bounds",
    odd.several: "senders receivers sites fwd_hooks answers labels",
    odd.functions: "hook names_filter loss",
    odd.paths: "checkpoint",
    odd.shards: "shard",
    odd.positions: "logits_at",
    odd.axis_values: "x",
    inputs.single_prompts: "prompt",
    inputs.lines: "corpus evaluation data",
    odd.counts: "evaluation_iterations repeats loops",
    odd.objects: "batches scores circuits graph settings run statistics entering leaving step "
    "function autoencoder",
}
KINDS = {name: kind for kind, names in _MANY.items() for name in names.split()}
OWN_KINDS = {
    ("plots.plot_profile", "metric"): odd.choices,
    ("plots.plot_stages", "metric"): odd.choices,
    ("plots.plot_stages", "reference"): inputs.sources,
    ("plots.plot_neurons", "reference"): odd.optional_objects,
    ("plots.plot_floorplan", "heads"): odd.choices,
    ("plots.plot_matrix", "scale"): odd.choices,
    ("plots.attention_heads", "heads"): odd.selections,
    ("plots.plot_curves", "std"): odd.mappings,
    ("plots.attention_view", "tokens"): inputs.token_texts,
    ("plots.colored_tokens", "tokens"): inputs.token_texts,
    ("plots.attention_heads", "tokens"): inputs.token_texts,
    ("plots.attention_patterns", "tokens"): inputs.token_texts,
    ("plots.token_log_probs", "tokens"): inputs.token_texts,
    ("plots.plot_patching", "tokens"): inputs.token_texts,
    ("patching.axis_labels", "tokens"): inputs.token_texts,
    ("patching.transplant_hooks", "source"): odd.several,
    ("patching.transplant_hooks", "target"): odd.several,
    ("patching.transplant_sites", "sources"): odd.several,
    ("patching.transplant_sites", "targets"): odd.several,
    ("patching.splice_hooks", "first_pos"): odd.unranged(odd.integers),
    ("lens.track_entities", "positions"): odd.mappings,
    ("lens.read_lens", "lens"): odd.objects,
    ("lens.read_lens", "positions"): odd.positions,
    ("lens.EntityTracks.leads_from", "entity"): odd.choices,
    ("steering.steering_effect", "scales"): odd.numbers,
    ("circuits.faithfulness_curve", "n_edges"): odd.counts,
    ("training.evaluate", "n_iterations"): odd.counts,
    ("training.evaluate_batches", "n_iterations"): odd.counts,
    ("training.train", "look"): odd.optional_objects,
    ("training.Corpus", "tokens"): inputs.lines,
    ("training.MixedIterations", "first"): odd.objects,
    ("training.MixedIterations", "second"): odd.objects,
    ("training.TrainingBatch", "targets"): inputs.tensors,
    ("training.TrainingBatch", "tokens"): inputs.tensors,
    ("training.TrainingBatch.next_tokens", "tokens"): inputs.tensors,
    ("training.step_losses", "targets"): odd.optional_objects,
    ("training.TrainingSettings", "iterations"): odd.objects,
    ("training.TrainingSettings", "betas"): odd.limits,
    ("training.train", "model"): inputs.models_without_loop,
    ("training.training_pass", "tokens"): inputs.prompts,
    ("dynamics.kernel_alignment", "other"): inputs.optional_models,
    ("dynamics.kernel_alignment", "where"): odd.selections,
    ("dynamics.kernel_alignment", "other_where"): odd.optional_objects,
    ("circuits.Circuit.without", "nodes"): odd.names,
    ("circuits.Circuit.without", "edges"): odd.optional_objects,
    ("circuits.Circuit", "scores"): odd.optional_objects,
    ("training.TrainingSettings.learning_rate_at", "step"): odd.integers,
    ("report.ReportPrompts", "shown"): odd.several,
    ("report.ReportPrompts", "evaluated"): odd.several,
    ("report.report_html", "prompts"): odd.optional_objects,
    ("metrics.two_scale_ratio", "groups"): odd.several,
    ("patching.Site", "block"): odd.unranged(odd.selections),
    ("patching.Site", "activation"): odd.words,
    ("patching.Site", "iteration"): odd.unranged(odd.selections),
    ("patching.Site", "layer"): odd.unranged(odd.selections),
    ("patching.Site", "head"): odd.unranged(odd.selections),
    ("patching.Site", "pos"): odd.unranged(odd.selections),
    ("patching.MassiveSite", "label"): odd.words,
    ("patching.MassiveSite", "block"): odd.unranged(odd.indices),
    ("patching.MassiveSite", "row"): odd.unranged(odd.indices),
    ("patching.MassiveSite", "pos"): odd.unranged(odd.indices),
    ("patching.MassiveSite", "dim"): odd.unranged(odd.indices),
    ("patching.MassiveSite", "value"): odd.numbers,
    ("report.ReportPrompts", "what"): odd.words,
    ("map_prompts", "what"): odd.words,
    ("map_prompts", "prompts"): inputs.any_prompts,
    ("read_part_label", "label"): odd.words,
    ("probes.task_probes", "states"): odd.objects,
    ("probes.task_probes", "labels"): odd.words_or_labels,
    ("probes.pair_probes", "preferred"): odd.objects,
    ("probes.pair_probes", "other"): odd.objects,
    ("probes.concept_directions", "positive"): odd.objects,
    ("probes.concept_directions", "negative"): odd.objects,
    ("probes.TaskProbes.predict", "states"): odd.objects,
    ("probes.PromptStates.rows", "prompts"): odd.selections,
    ("probes.PromptStates.label", "iteration"): odd.indices,
    ("probes.flip_test", "given"): inputs.tensors,
    ("probes.PromptStates.of", "activation"): odd.words,
    ("lens.LensResult.text", "tokens"): inputs.tensors,
    ("plots.plot_curves", "bounds"): odd.bounds,
    ("LoopLayout.alias", "name"): odd.words,
    ("LoopLayout.canonical_name", "name"): odd.words,
    ("LoopLayout.by_iteration", "values"): inputs.tensors,
    ("LoopProfile.align_stages", "reference"): odd.objects,
    ("LoopProfile.std", "ddof"): odd.unranged(odd.integers),
    ("metrics.fixed_point_cosine", "reference"): odd.indices,
    ("metrics.fixed_point_distance", "reference"): odd.indices,
    ("metrics.fixed_point_slope", "window"): odd.limits,
    ("metrics.token_margin", "tokens"): inputs.token_ids,
    ("metrics.token_probability", "tokens"): inputs.token_ids,
    ("metrics.token_rank", "tokens"): inputs.token_ids,
    ("training.exit_logits", "tokens"): odd.unranged(inputs.prompts),
    ("training.exit_logits", "model"): inputs.models,
    ("circuits.Circuit", "kept"): inputs.conditions,
    ("metrics.residual_entropy", "base"): odd.log_bases,
    ("metrics.residual_entropy_bound", "base"): odd.log_bases,
    ("metrics.settling_table", "values"): inputs.tensors,
    ("LoopedActivationCache.get_neuron_results", "neuron_slice"): odd.unranged(odd.slices),
    ("LoopedActivationCache.logit_attrs", "tokens"): inputs.tokens_or_ids,
    ("LoopedActivationCache.logit_attrs", "incorrect_tokens"): inputs.tokens_or_ids,
    ("LoopedActivationCache.stack_neuron_results", "neuron_slice"): odd.unranged(odd.slices),
    ("LoopedTransformer.forward", "injection"): odd.optional_objects,
    ("LoopedTransformer.forward", "tokens"): odd.optional_objects,
    ("LoopedTransformer.generate", "eos_token_id"): odd.selections,
    ("LoopedTransformer.hook_name", "name"): odd.words,
    # TransformerLens lets a name of an activation say it alone.
    ("LoopedActivationCache.stack_activation", "sublayer_type"): odd.ignored,
    ("LoopedTransformer.input_to_embed", "attention_mask"): odd.other_result(inputs.masks),
}
_OF_CLASSES = {
    odd.indices: "layer state_out from_iteration start_at_layer stop_at_layer start_at_iteration "
    "exit_at",
    odd.slices: "pos_slice batch_slice",
    odd.flags: "incl_mid apply_ln mlp_input return_labels incl_states has_batch_dim recompute_ln "
    "incl_embeds incl_remainder expand_neurons by_iteration include_mlp_biases loss_per_token "
    "prepend_bos weighted_exit stop_at_eos do_sample use_past_kv_cache verbose return_exits",
    odd.choices: "mode injection sublayer_type activation_name return_type padding_side kv_sharing",
    odd.optional_objects: "project_output_onto initial_state other_state prefix_mask "
    "past_kv_cache shortformer_pos_embed",
    odd.numbers: "exit_threshold top_p temperature freq_penalty",
    odd.integers: "iterations_apart max_new_tokens",
    inputs.tensors: "residual_stack state",
}
KINDS_OF_CLASSES = {name: kind for kind, names in _OF_CLASSES.items() for name in names.split()}
FORWARD = {
    "attention_mask": inputs.masks,
    "initial_state": odd.optional_objects,
    "exit_at": odd.indices,
    "exit_threshold": odd.numbers,
    "weighted_exit": odd.flags,
    "nope": odd.unknown,
}
OF_LENSES = ("points", "positions", "top_k", "batch_size", "n_iterations")


def kind_of(function: str, parameter: inspect.Parameter) -> odd.Kind | None:
    """The kind of an argument; ``None`` where none is known."""
    name = parameter.name
    if name == "prompts" and function.startswith("plots."):
        return inputs.about
    if name == "model" and function.startswith("plots."):
        return inputs.models_or_names
    if name == "metric" and function.startswith("LoopProfile."):
        return odd.choices if parameter.default is parameter.empty else odd.optional_choices
    if name == "seed":
        return odd.seeds
    if function.partition(".")[0] in METHODS:
        return OWN_KINDS.get((function, name)) or KINDS_OF_CLASSES.get(name) or KINDS.get(name)
    if function.startswith(BY_ANNOTATION):
        found = OWN_KINDS.get((function, name)) or _of_annotation(parameter)
        return found or KINDS.get(name)
    return OWN_KINDS.get((function, name)) or KINDS.get(name) or _of_annotation(parameter)


def _of_annotation(parameter: inspect.Parameter) -> odd.Kind | None:
    """The kind that an annotation says."""
    annotation = parameter.annotation
    union = get_origin(annotation) in (Union, UnionType)
    parts = set(get_args(annotation) if union else (annotation,)) - {NoneType}
    if parts and all(hasattr(part, "dim_str") for part in parts):
        if parameter.default is None:
            return odd.optional_objects
        booleans = all("bool" in part.dtypes for part in parts)
        return inputs.conditions if booleans else inputs.tensors
    if parts and all(part is str or get_origin(part) is Literal for part in parts):
        return odd.choices
    return _OF_TYPES.get(frozenset(parts))


_OF_TYPES = {
    frozenset({int}): odd.integers,
    frozenset({float}): odd.numbers,
    frozenset({int, float}): odd.numbers,
    frozenset({bool}): odd.flags,
    frozenset({SupportsIndex}): odd.indices,
}
BY_ANNOTATION = (
    "probes.",
    "metrics.",
    "loop_losses.",
    "training.token_losses",
    "training.growth_penalty",
)
"""Where a name says less than the annotation."""


def arguments_of(name: str) -> Iterator[tuple[str, Any, odd.Kind | None]]:
    """Every argument of a public function with its default and its kind."""
    signature = inspect.signature(public_functions()[name])
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue  # positional ones of these are results of the same kind
        if parameter.kind is not parameter.VAR_KEYWORD:
            default = None if parameter.default is parameter.empty else parameter.default
            yield parameter.name, default, kind_of(name, parameter)
        elif parameter.name == "forward_arguments":
            own = ("attention_mask",) if name == "kv_sharing_effect" else ()
            yield from ((key, None, kind) for key, kind in FORWARD.items() if key not in own)
        elif parameter.name == "forward_kwargs":
            yield from ((key, None, FORWARD[key]) for key in ("initial_state", "exit_at", "nope"))
        elif name.startswith("lens."):
            mine = [key for key in OF_LENSES if key not in signature.parameters]
            known = inspect.signature(public_functions()["lens.read_lens"]).parameters
            yield from ((key, None, kind_of("lens.read_lens", known[key])) for key in mine)
        elif name == "dynamics.injection_sensitivity":
            yield "tolerance", 1e-4, odd.numbers
            yield "max_terms", 1000, odd.integers
        elif name == "LoopProfile.align_stages":
            yield "grid", 101, odd.integers
        else:
            yield from ((key, 400, odd.numbers) for key in ("width", "height"))
