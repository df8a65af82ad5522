"""Making a model of TransformerLens's without its constructor."""

from typing import Any

from transformer_lens import HookedRootModule

from tl_loops.upstream.classes import HookedTransformer


def init_root(model: HookedRootModule) -> None:
    """Initialise hook bookkeeping without HookedTransformer's own constructor.

    That constructor would allocate every unrolled block with weights of its own.
    """
    HookedRootModule.__init__(model)


def can_restart(model: Any) -> bool:
    """Whether ``start_at_layer`` and ``past_kv_cache`` of the model's forward pass are exact.

    They are on HookedTransformer and LoopedTransformer. A bridge lets the Hugging Face model run
    whole, and its blocks take keys and values elsewhere.
    """
    return isinstance(model, HookedTransformer) and getattr(model, "runs_own_blocks", True)


def complete_norm(norm: Any) -> None:
    """Give a norm of TransformerLens the attributes that tl_loops's own has, where it lacks them.

    ``w`` and ``b`` are ``None`` without a gain or a bias; ``centred`` tells LayerNorm from RMSNorm.
    """
    object.__setattr__(norm, "centred", type(norm).__name__ in ("LayerNorm", "LayerNormPre"))
    for name in ("w", "b"):
        if not hasattr(norm, name):
            object.__setattr__(norm, name, None)
