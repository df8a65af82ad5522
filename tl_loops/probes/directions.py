"""Concept directions: what parts two sets of prompts, at each iteration and layer, with a null."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.metrics.linear_probes import area_under_roc, fit_linear_probes
from tl_loops.metrics.precision import full_precision
from tl_loops.metrics.states import direction_cosine
from tl_loops.printing import prints_short
from tl_loops.probes.labels import LabelSplit, check_fit, split_labels
from tl_loops.probes.results import SavedResult, frame_by_place
from tl_loops.probes.states import PromptStates
from tl_loops.probes.task import check_finite

if TYPE_CHECKING:
    import pandas

By = Literal["means", "probe"]
_ROUNDING = 1e-6
"""A difference below this share of the states' size is rounding."""


@prints_short
@dataclass(frozen=True, eq=False)
class ConceptDirections(SavedResult):
    """A direction from the negative to the positive prompts at each iteration and layer.

    Attributes:
        vectors: [iteration, layer, width], float32 (float64 for states in float64), not normalised.
            :func:`tl_loops.steering.steer` takes them as they are.
        auc: Chance that a held-out positive prompt lies further along the direction than a negative
            one, [iteration, layer]; 0.5 says nothing.
        null_auc: The same where the labels are shuffled, [shuffle, iteration, layer].
        null_norm: Length of the directions of shuffled labels, [shuffle, iteration, layer].
        n_train: Number of prompts that the directions are from.
        n_held_out: Number of prompts that they were tested on.
        by: ``"means"`` or ``"probe"``.
        activation: What was read.
        iterations: Number of each iteration.
        layers: Number of each layer.
        points: Short label of each place, iteration by iteration.
    """

    _kind = "concept_directions"

    vectors: Float[Tensor, "iteration layer width"]
    auc: Float[Tensor, "iteration layer"]
    null_auc: Float[Tensor, "shuffle iteration layer"]
    null_norm: Float[Tensor, "shuffle iteration layer"]
    n_train: int
    n_held_out: int
    by: str
    activation: str
    iterations: tuple[int, ...]
    layers: tuple[int, ...]
    points: tuple[str, ...]

    @property
    def norm(self) -> Float[Tensor, "iteration layer"]:
        """Length of each direction."""
        return self.vectors.double().norm(dim=-1)

    @property
    def cosine(self) -> Float[Tensor, "layer iteration iteration"]:
        """Cosine between the directions of every two iterations; NaN where one is zero."""
        rows = self.vectors.double().transpose(0, 1)
        return direction_cosine(rows.unsqueeze(2), rows.unsqueeze(1))

    @property
    def p_value(self) -> Float[Tensor, "iteration layer"]:
        """Share of shuffles, the labels as given among them, that separate as well or better."""
        n_shuffles = self.null_auc.shape[0]
        return ((self.null_auc >= self.auc).sum(0) + 1).double() / (n_shuffles + 1)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per iteration and layer.

        Columns: ``point`` (its label), ``iteration``, ``layer``, ``norm``, ``auc``, ``null_auc``
        and ``null_norm`` (means over the shuffles), ``p_value``.
        """
        columns = {
            "norm": self.norm,
            "auc": self.auc,
            "null_auc": self.null_auc.mean(0),
            "null_norm": self.null_norm.mean(0),
            "p_value": self.p_value,
        }
        return frame_by_place(self, columns)


@checked
@torch.no_grad()
@full_precision
def concept_directions(
    positive: PromptStates,
    negative: PromptStates,
    *,
    by: By = "means",
    train: Bool[Tensor, "prompt"] | None = None,
    train_fraction: float = 0.7,
    seed: int = 0,
    ridge: float = 0.01,
    n_shuffles: int = 50,
) -> ConceptDirections:
    """A direction that parts two sets of prompts at each iteration and layer.

    The null repeats all of it with the labels "positive" and "negative" shuffled, among the prompts
    that the directions are from and among those held out.

    Args:
        positive: States of the prompts that show a property.
        negative: States of those that do not; another number of prompts is allowed.
        by: ``"means"``: the mean of the positive states minus that of the negative ones.
            ``"probe"``: the weight of a linear probe (:func:`task_probes` with ``fit="ridge"``),
            which turns away from directions in which the states vary anyway.
        train: True for each prompt that the directions are from, False for each to test on: those
            of ``positive``, then those of ``negative``; ``None``: drawn.
        train_fraction: Share of each set that is drawn.
        seed: Fixes the draw and the shuffles.
        ridge: Penalty of ``"probe"``.
        n_shuffles: How often the labels are shuffled.

    Returns:
        The directions, their separation of held-out prompts, and the null.

    Raises:
        ValueError: The two are of other places, are the same at every place, are not finite, or
            have fewer than two prompts each; an option is out of range.

    Source: difference of means 2312.06681; area under the curve as separation.
    """
    positive.check_like(negative, ("positive", "negative"))
    if by not in ("means", "probe"):
        raise ValueError(f"by must be 'means' or 'probe', got {by!r}")
    check_fit("ridge", ridge, train_fraction)
    check_finite(positive)
    check_finite(negative)
    values = torch.cat([positive.values, negative.values], dim=2)
    n_positive, n_prompts = positive.values.shape[2], values.shape[2]
    labels = [i < n_positive for i in range(n_prompts)]
    split = split_labels(labels, n_prompts, train, train_fraction, seed, n_shuffles)
    T, n_layers, _, width = values.shape
    vectors = torch.zeros(T, n_layers, width, dtype=torch.float64)
    auc = torch.full((1 + n_shuffles, T, n_layers), 0.5, dtype=torch.float64)
    norms = torch.zeros(1 + n_shuffles, T, n_layers, dtype=torch.float64)
    for t in range(T):
        for layer in range(n_layers):
            x = values[t, layer].double()
            found = _directions(x[split.train], split, by, ridge)
            vectors[t, layer], norms[:, t, layer] = found[0], found.norm(dim=-1)
            auc[:, t, layer] = _separation(x[split.held_out] @ found.T, split)
    if not bool(vectors.any()):
        raise ValueError(
            "positive and negative are the same at every place, so there is no direction from one "
            "to the other: give prompts that differ before the position that is read"
        )
    return ConceptDirections(
        vectors=vectors.to(values.dtype),
        auc=auc[0],
        null_auc=auc[1:],
        null_norm=norms[1:],
        n_train=len(split.train),
        n_held_out=len(split.held_out),
        by=by,
        activation=positive.activation,
        iterations=positive.iterations,
        layers=positive.layers,
        points=positive.points,
    )


def _directions(
    x: Float[Tensor, "train width"], split: LabelSplit, by: str, ridge: float
) -> Float[Tensor, "set width"]:
    """The direction of every set of labels; exactly zero where it is rounding."""
    labels = split.train_labels
    if by == "probe":
        weight, _ = fit_linear_probes(x, labels, 2, "ridge", ridge)
        return weight[:, 1] - weight[:, 0]
    is_positive = labels.double()
    n = is_positive.sum(-1, keepdim=True)
    share = is_positive / n - (1 - is_positive) / (labels.shape[1] - n)
    difference = share @ x
    size = x.square().sum(-1).mean().sqrt()
    there = difference.norm(dim=-1, keepdim=True) > _ROUNDING * size
    return torch.where(there, difference, 0.0)


def _separation(scores: Float[Tensor, "held_out set"], split: LabelSplit) -> Float[Tensor, "set"]:
    """Area under the curve of every set of labels."""
    is_positive = split.held_out_labels.bool()
    return torch.stack(
        [area_under_roc(s[p], s[~p]) for s, p in zip(scores.T, is_positive, strict=True)]
    )
