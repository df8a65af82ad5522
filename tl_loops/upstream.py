"""The only place that touches TransformerLens internals.

Everything that the library takes from TransformerLens comes through here, so that a new release of
it concerns one file. Written for the 3.9 line.
"""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

with warnings.catch_warnings():
    # HookedTransformer announces its removal in 4.0 at import and at each call; the pin in the
    # package metadata is the answer to that, not a warning in every notebook.
    warnings.simplefilter("ignore", DeprecationWarning)
    from transformer_lens import (
        ActivationCache,
        FactoredMatrix,
        HookedRootModule,
        HookedTransformer,
        HookedTransformerConfig,
    )
    from transformer_lens.cache.key_value_cache import (
        TransformerLensKeyValueCache as KeyValueCache,
    )
    from transformer_lens.cache.key_value_cache_entry import (
        TransformerLensKeyValueCacheEntry as KeyValueCacheEntry,
    )
    from transformer_lens.components import LayerNorm, LayerNormPre
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.HookedTransformer import Output
    from transformer_lens.utilities import (
        SUPPORTED_ACTIVATIONS,
        USE_DEFAULT_VALUE,
        LocallyOverridenDefaults,
        Slice,
        apply_softcap,
        composition_scores,
        get_attention_mask,
        lm_cross_entropy_loss,
        sample_logits,
    )
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

BaseConfig = HookedTransformerConfig
TransformerBase = HookedTransformer
"""Base of LoopedTransformer: gives tokenisation, generation, loss and the caching wrappers."""

__all__ = [
    "POST_NORM_ARCHITECTURES",
    "SUPPORTED_ACTIVATIONS",
    "USE_DEFAULT_VALUE",
    "ActivationCache",
    "BaseConfig",
    "FactoredMatrix",
    "HookPoint",
    "HookedRootModule",
    "HookedTransformer",
    "KeyValueCache",
    "KeyValueCacheEntry",
    "LocallyOverridenDefaults",
    "Output",
    "Slice",
    "TransformerBase",
    "apply_softcap",
    "complete_norm",
    "composition_scores",
    "get_attention_mask",
    "has_editing_hooks",
    "has_hooks",
    "init_root",
    "install_from_pretrained",
    "lm_cross_entropy_loss",
    "sample_logits",
    "set_tokenizer",
    "uninstall_from_pretrained",
    "unshared",
]


def init_root(model: HookedRootModule) -> None:
    """Initialise hook bookkeeping without HookedTransformer's own constructor.

    That constructor would allocate every unrolled block with weights of its own.
    """
    HookedRootModule.__init__(model)


def set_tokenizer(model: Any, tokenizer: Any, default_padding_side: str | None) -> None:
    """Give a model its tokenizer, also one that was made in memory.

    TransformerLens reloads a tokenizer from its path to make it prepend BOS. Without a path it is
    taken as it is; BOS is then prepended as text, which TransformerLens does by itself.
    """
    known = dict(tokenizer.init_kwargs)
    if not known.get("name_or_path"):
        tokenizer.init_kwargs.update(name_or_path="", add_bos_token=True)
    try:
        model.set_tokenizer(tokenizer, default_padding_side=default_padding_side)
    finally:
        tokenizer.init_kwargs.clear()
        tokenizer.init_kwargs.update(known)


def complete_norm(norm: Any) -> None:
    """Give a norm of TransformerLens the attributes that tl_loops's own has, where it lacks them.

    ``w`` and ``b`` are ``None`` without a gain or a bias; ``centred`` tells LayerNorm from RMSNorm.
    """
    object.__setattr__(norm, "centred", isinstance(norm, (LayerNorm, LayerNormPre)))
    for name in ("w", "b"):
        if not hasattr(norm, name):
            object.__setattr__(norm, name, None)


def has_hooks(point: HookPoint) -> bool:
    """Whether anything listens at a hook point, be it added by TransformerLens or by torch."""
    return bool(point._forward_hooks or point._forward_pre_hooks or point._backward_hooks)


def has_editing_hooks(point: HookPoint) -> bool:
    """Whether a hook listens that may change its tensor: any but TransformerLens's caching ones."""
    hooks = (getattr(handle.user_hook, "func", None) for handle in point.fwd_hooks)
    caching = sum(getattr(hook, "__qualname__", "").endswith(".save_hook") for hook in hooks)
    return len(point._forward_hooks) > caching


def unshared(x: Tensor, point: HookPoint) -> Tensor:
    """``x``, or a copy of it where a hook on ``point`` could edit it in place.

    Neighbouring hook points often hold one and the same tensor (``resid_post`` of a block is
    ``resid_pre`` of the next). Caches keep references, so an edit in place would change what was
    cached earlier. Where only caching hooks listen nothing is copied.
    """
    return x.clone() if has_editing_hooks(point) else x


Loader = Callable[..., Any]
_ORIGINALS: dict[str, Any] = {}


def install_from_pretrained(is_looped: Callable[[str], bool], loader: Loader) -> None:
    """Let ``HookedTransformer.from_pretrained`` hand looped names to ``loader``.

    Calls on a subclass, and all other names, reach TransformerLens unchanged. Installing twice
    is the same as once.

    Args:
        is_looped: Tells from the first argument whether it names a looped model.
        loader: Called with all arguments for those that do; for ``from_pretrained_no_processing``
            with the folding and centring flags set to ``False``.
    """
    if _ORIGINALS:
        return
    for name, preset in (
        ("from_pretrained", {}),
        (
            "from_pretrained_no_processing",
            {
                "fold_ln": False,
                "center_writing_weights": False,
                "center_unembed": False,
                "fold_value_biases": False,
                "refactor_factored_attn_matrices": False,
            },
        ),
    ):
        original = HookedTransformer.__dict__[name]
        _ORIGINALS[name] = original
        setattr(HookedTransformer, name, _dispatcher(original, is_looped, loader, preset))


def uninstall_from_pretrained() -> None:
    """Undo :func:`install_from_pretrained`; without it, do nothing."""
    for name, original in _ORIGINALS.items():
        setattr(HookedTransformer, name, original)
    _ORIGINALS.clear()


def _dispatcher(
    original: Any, is_looped: Callable[[str], bool], loader: Loader, preset: dict[str, bool]
) -> Any:
    function = original.__func__

    @wraps(function)
    def from_pretrained(cls: type, model_name: str, *args: Any, **kwargs: Any) -> Any:
        if cls is HookedTransformer and is_looped(model_name):
            return loader(model_name, *args, **{**kwargs, **preset})
        return function(cls, model_name, *args, **kwargs)

    return classmethod(from_pretrained)
