"""Probes of pairs: is the difference of two states read where neither state alone is?"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.metrics.precision import full_precision
from tl_loops.metrics.residual import unit_vectors
from tl_loops.printing import prints_short
from tl_loops.probes.results import SavedResult
from tl_loops.probes.states import PromptStates
from tl_loops.probes.task import TaskProbes, task_probes

if TYPE_CHECKING:
    import pandas


@prints_short
@dataclass(frozen=True, eq=False)
class FlipTest(SavedResult):
    """What a scorer of pairs gives when the two change places: s(a, b) against s(b, a).

    Attributes:
        flip_rate: Share of pairs whose score changes its sign; 1 for a scorer without bias.
        antisymmetry: Correlation of s(a, b) with -s(b, a) over pairs, in [-1, 1]; 1 for a scorer
            that is antisymmetric but for a constant. NaN where a score does not vary.
        bias: Mean of (s(a, b) + s(b, a)) / 2, the part that the order does not change.
    """

    _kind = "flip_test"

    flip_rate: Float[Tensor, "*place"]
    antisymmetry: Float[Tensor, "*place"]
    bias: Float[Tensor, "*place"]


@checked
@full_precision
def flip_test(given: Float[Tensor, "*place pair"], swapped: Float[Tensor, "..."]) -> FlipTest:
    """Whether a scorer of pairs compares the two, or goes by something else.

    Args:
        given: s(a, b) of each pair, positive where a is preferred.
        swapped: s(b, a) of the same pairs.

    Returns:
        In float64.

    Raises:
        ValueError: The shapes differ, or there is no pair.

    Source: 2604.09870, the flip test; the statistics as defined above.
    """
    if given.shape != swapped.shape or not given.shape[-1]:
        raise ValueError(
            f"scores are of shape {list(given.shape)} and {list(swapped.shape)}, expected the same "
            "[..., pair] with at least one pair"
        )
    a, b = given.double(), swapped.double()
    centred = (unit_vectors(x - x.mean(-1, keepdim=True)) for x in (a, -b))
    first, second = centred
    return FlipTest(
        flip_rate=(a * b < 0).double().mean(-1),
        antisymmetry=(first * second).sum(-1).clamp(-1.0, 1.0),
        bias=(a + b).mean(-1) / 2,
    )


@prints_short
@dataclass(frozen=True, eq=False)
class PairProbes(SavedResult):
    """Linear probes of the difference of two states, that say which of the two is preferred.

    Attributes:
        probes: The probes of the differences a - b; their label is whether a is preferred.
        flips: The flip test on held-out pairs, [iteration, layer].
    """

    _kind = "pair_probes"

    probes: TaskProbes
    flips: FlipTest

    @property
    def accuracy(self) -> Float[Tensor, "iteration layer"]:
        """Share of held-out pairs whose preferred one is named."""
        return self.probes.accuracy

    def to_frame(self) -> "pandas.DataFrame":
        """One row per place: the probes' columns, ``flip_rate``, ``antisymmetry``, ``bias``."""
        frame = self.probes.to_frame()
        for name in ("flip_rate", "antisymmetry", "bias"):
            frame[name] = getattr(self.flips, name).flatten().tolist()
        return frame


@checked
@torch.no_grad()
@full_precision
def pair_probes(
    preferred: PromptStates,
    other: PromptStates,
    *,
    train: Bool[Tensor, "pair"] | None = None,
    train_fraction: float = 0.7,
    seed: int = 0,
    ridge: float = 0.01,
    n_shuffles: int = 10,
) -> PairProbes:
    """Fit linear probes to the differences of two states, such as of a better and a worse answer.

    Half of the pairs, drawn, are turned round, so that no constant tells which is preferred.
    Compared with :func:`task_probes` on the states one by one, this says whether a property is read
    from a state by itself, or from a comparison alone.

    Args:
        preferred: States of the preferred one of each pair.
        other: States of the other, in the same order.
        train: As for :func:`task_probes`, for pairs.
        train_fraction: As for :func:`task_probes`.
        seed: Fixes which pairs are turned round, the draw and the shuffles.
        ridge: As for :func:`task_probes`.
        n_shuffles: As for :func:`task_probes`.

    Returns:
        The probes, and what they give for held-out pairs that change places.

    Raises:
        ValueError: The two are of other places or numbers of prompts, and as
            :func:`task_probes`.

    Source: 2604.09870, probes of pairwise differences.
    """
    preferred.check_like(other, ("preferred", "other"))
    n_pairs = preferred.values.shape[2]
    if n_pairs != other.values.shape[2]:
        raise ValueError(f"got {n_pairs} preferred states but {other.values.shape[2]} others")
    if n_pairs < 4:
        raise ValueError(f"got {n_pairs} pairs, expected at least 4")
    order = torch.randperm(n_pairs, generator=torch.Generator().manual_seed(seed))
    first = torch.ones(n_pairs, dtype=torch.bool)
    first[order[: n_pairs // 2]] = False
    sign = torch.where(first, 1.0, -1.0).to(torch.float64).unsqueeze(-1)
    difference = (preferred.values.double() - other.values.double()) * sign
    pairs = replace(preferred, values=difference, prompts=tuple(range(n_pairs)))
    probes = task_probes(
        pairs,
        first.tolist(),
        train=train,
        train_fraction=train_fraction,
        seed=seed,
        ridge=ridge,
        n_shuffles=n_shuffles,
    )
    # Of the classes False and True, the margin of True.
    margin = (probes.weight[..., 1, :] - probes.weight[..., 0, :]).unsqueeze(-1)
    constant = (probes.bias[..., 1] - probes.bias[..., 0]).unsqueeze(-1)
    linear = (difference[:, :, probes.held_out] @ margin).squeeze(-1)
    return PairProbes(probes, flip_test(linear + constant, constant - linear))
