"""Hook points, and what listens at one."""

from typing import Literal

from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from transformer_lens.hook_points import HookPoint as AnyHookPoint


class HookPoint(AnyHookPoint):
    """TransformerLens's hook point, at a third of its cost where nothing listens.

    A block has some twenty of them, and few runs listen at any. Models of TransformerLens have its
    own, so that what is asked of a hook point is asked of ``AnyHookPoint``.
    """

    def __call__(self, x: Tensor) -> Tensor:
        if has_hooks(self) or _has_any_global_hook():
            return super().__call__(x)
        return self.forward(x)


def has_hooks(point: AnyHookPoint) -> bool:
    """Whether anything listens at a hook point, be it added by TransformerLens or by torch."""
    return bool(
        point._forward_hooks
        or point._forward_pre_hooks
        or point._backward_hooks
        or point._backward_pre_hooks
    )


def copy_hooks(source: AnyHookPoint, target: AnyHookPoint) -> None:
    """Add the hooks of one hook point to another, where they see the other's name.

    Hooks that were registered by torch's own methods come along as they are.
    """
    ours: set[int] = set()
    directions: tuple[Literal["fwd", "bwd"], ...] = ("fwd", "bwd")
    for direction in directions:
        for handle in source.fwd_hooks if direction == "fwd" else source.bwd_hooks:
            ours.add(handle.hook.id)
            if handle.user_hook is not None:
                permanent, level = handle.is_permanent, handle.context_level
                target.add_hook(handle.user_hook, direction, permanent, level)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        for key, hook in getattr(source, name).items():
            if key not in ours:
                getattr(target, name)[key] = hook
                # Whether torch takes its backward hooks for full ones.
                target._is_full_backward_hook = source._is_full_backward_hook


def has_editing_hooks(point: AnyHookPoint) -> bool:
    """Whether a hook listens that may change its tensor: any but TransformerLens's caching ones."""
    if not point._forward_hooks:  # as at most points of most runs
        return False
    hooks = (getattr(handle.user_hook, "func", None) for handle in point.fwd_hooks)
    caching = sum(getattr(hook, "__qualname__", "").endswith(".save_hook") for hook in hooks)
    return len(point._forward_hooks) > caching


def unshared(x: Tensor, point: AnyHookPoint) -> Tensor:
    """``x``, or a copy of it where a hook on ``point`` could edit it in place.

    Neighbouring hook points often hold one and the same tensor (``resid_post`` of a block is
    ``resid_pre`` of the next). Caches keep references, so an edit in place would change what was
    cached earlier. Where only caching hooks listen nothing is copied.
    """
    return x.clone() if has_editing_hooks(point) else x
