"""Shannon entropy with 0 log 0 = 0."""

import torch
from torch import Tensor


def shannon_entropy(p: Tensor) -> Tensor:
    """Shannon entropy in nats of the distributions along the last axis.

    `torch.special.entr` has the infinite slope of -p log p at p = 0, which turns the gradient of a
    causal pattern into NaN. Here an entry that is exactly 0 has gradient 0. No epsilon is added
    inside the logarithm.

    Args:
        p: `[..., outcome]`, each distribution sums to 1; an unnormalised one gives -sum p log p as
            it stands.

    Returns:
        `[...]`, in [0, log n_outcomes] for distributions; NaN where `p` has a negative or NaN
        entry.
    """
    return -(p * torch.where(p == 0, 1.0, p).log()).sum(-1)
