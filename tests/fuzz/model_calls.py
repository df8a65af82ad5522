"""A plain call of the methods of caches and models that give numbers of the project's own."""

from collections.abc import Callable
from typing import Any

from tests.fuzz.world import World


def _of_cache(**arguments: Any) -> Callable[[World], dict[str, Any]]:
    return lambda w: dict(self=w.cache, **arguments)


def _stack(w: World) -> dict[str, Any]:
    return dict(self=w.cache, residual_stack=w.cache.accumulated_resid())


def _state(w: World) -> dict[str, Any]:
    return dict(self=w.model, state=w.cache["state_out", -1])


MODEL_CALLS: dict[str, Callable[[World], dict[str, Any]]] = {
    "LoopedActivationCache.accumulated_resid": _of_cache(),
    "LoopedActivationCache.apply_ln_to_stack": _stack,
    "LoopedActivationCache.apply_slice_to_batch_dim": _of_cache(batch_slice=slice(None)),
    "LoopedActivationCache.decompose_resid": _of_cache(),
    "LoopedActivationCache.get_full_resid_decomposition": _of_cache(expand_neurons=False),
    "LoopedActivationCache.get_neuron_results": _of_cache(layer=1),
    "LoopedActivationCache.logit_attrs": lambda w: dict(**_stack(w), tokens=3),
    "LoopedActivationCache.stack_activation": _of_cache(activation_name="pattern"),
    "LoopedActivationCache.stack_head_results": _of_cache(),
    "LoopedActivationCache.stack_neuron_results": _of_cache(layer=2),
    "LoopedTransformer.accumulated_bias": lambda w: dict(self=w.model, layer=2),
    "LoopedTransformer.all_composition_scores": lambda w: dict(self=w.model, mode="Q"),
    "LoopedTransformer.enter_coda": _state,
    "LoopedTransformer.forward": lambda w: dict(self=w.model, input=w.clean),
    "LoopedTransformer.generate": lambda w: dict(
        self=w.model, input=w.clean, max_new_tokens=2, do_sample=False, verbose=False
    ),
    "LoopedTransformer.hook_name": lambda w: dict(self=w.model, name="blocks.2.hook_resid_pre"),
    "LoopedTransformer.input_to_embed": lambda w: dict(self=w.model, input=w.clean),
    "LoopedTransformer.state_logits": lambda w: dict(
        self=w.gated, state=w.gated_cache["state_out", -1]
    ),
}
