"""What listens at a hook point."""

from torch import Tensor
from transformer_lens.hook_points import HookPoint


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
