"""What sharing keys and values across iterations does to a model's predictions."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.errors import ConfigError
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import require_layout
from tl_loops.mechanisms.kv_sharing import KVSharing
from tl_loops.nn.kv_cache import SharedKeyValueCache
from tl_loops.printing import prints_short
from tl_loops.upstream import left_as_it_was


@prints_short
@dataclass(frozen=True)
class KVSharingEffect:
    """Predictions with sharing against predictions without, at every position.

    Attributes:
        kl: KL(without ‖ with) of the next-token distributions, in nats.
        logit_difference: Largest absolute difference of centred logits.
        agrees: Whether the most likely token is the same.
        n_slots: Slots of keys and values with sharing.
        n_slots_without: Slots without: one an unrolled block.
    """

    kl: Float[Tensor, "batch pos"]
    logit_difference: Float[Tensor, "batch pos"]
    agrees: Bool[Tensor, "batch pos"]
    n_slots: int
    n_slots_without: int

    def __str__(self) -> str:
        return (
            f"KL {float(self.kl.mean()):.3g} nats on average, {float(self.kl.max()):.3g} at most; "
            f"{float(self.agrees.float().mean()):.1%} of predictions unchanged; "
            f"{self.n_slots} of {self.n_slots_without} slots"
        )


@checked
@left_as_it_was
@torch.no_grad()
def kv_sharing_effect(
    model: Model,
    tokens: Int[Tensor, "batch pos"],
    kv_sharing: str,
    n_prompt: int = 1,
    **forward_arguments: Any,
) -> KVSharingEffect:
    """Decode a text token by token with sharing, and compare with the model as it is.

    The text is given, not sampled, so that both see the same tokens.

    Args:
        model: A looped model.
        tokens: The text, without padding.
        kv_sharing: See :class:`~tl_loops.mechanisms.kv_sharing.KVSharing`.
        n_prompt: Tokens that are read in one call before decoding begins, at least 1.
        **forward_arguments: Passed on to each forward pass, e.g. ``n_iterations``.

    Raises:
        ConfigError: ``kv_sharing`` names no sharing.
        ValueError: ``n_prompt`` is out of range, the model has no loop, or a forward argument is
            one that this function sets.
    """
    require_layout(model)
    for name in ("attention_mask", "return_type", "kv_sharing", "past_kv_cache"):
        if name in forward_arguments:
            raise ValueError(f"{name!r} is set by this function itself: leave it out")
    sharing = KVSharing.parse(kv_sharing)
    if sharing is None:
        raise ConfigError(f"kv_sharing={kv_sharing!r} shares nothing")
    if not 1 <= n_prompt <= tokens.shape[1]:
        raise ValueError(f"n_prompt must be between 1 and {tokens.shape[1]}, got {n_prompt}")
    mask = torch.ones_like(tokens)
    without = model(tokens, attention_mask=mask, kv_sharing="none", **forward_arguments)
    cache = model.make_kv_cache(tokens.shape[0], kv_sharing)
    assert isinstance(cache, SharedKeyValueCache)
    logits = []
    for piece in (tokens[:, :n_prompt], *tokens[:, n_prompt:].split(1, dim=1)):
        if piece.shape[1]:
            logits.append(
                model(
                    piece,
                    attention_mask=torch.ones_like(piece),
                    past_kv_cache=cache,
                    **forward_arguments,
                )
            )
    p, q = without.double().log_softmax(-1), torch.cat(logits, dim=1).double().log_softmax(-1)
    centred = [x - x.mean(-1, keepdim=True) for x in (p, q)]
    return KVSharingEffect(
        kl=(p.exp() * (p - q)).sum(-1).clamp_min(0.0).float(),
        logit_difference=(centred[0] - centred[1]).abs().amax(-1).float(),
        agrees=p.argmax(-1) == q.argmax(-1),
        n_slots=cache.n_slots,
        n_slots_without=len(cache.entries),
    )
