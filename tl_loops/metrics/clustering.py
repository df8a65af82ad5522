"""Do states of the same entity point the same way? Cosine clustering after arXiv 2505.23653."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.metrics.padding import statistic_dtype
from tl_loops.metrics.precision import full_precision
from tl_loops.metrics.states import direction_cosine
from tl_loops.printing import prints_short


@prints_short
@dataclass(frozen=True, eq=False)
class CosineClustering:
    """Cohesion and alignment of entities, and their means over entities.

    Attributes:
        cohesion: mean over entities of `entity_cohesion` `[...]`.
        alignment: mean over entities of `entity_alignment` `[...]`; None without
            out-of-distribution queries.
        entity_cohesion: mean cosine of an entity's queries to their centroid `[..., entity]`, in
            [-1, 1].
        entity_alignment: mean cosine of the entity's out-of-distribution queries to that centroid
            `[..., entity]`.
        entities: label of each entity `[entity]`, ascending.
    """

    cohesion: Float[Tensor, "*batch"]
    alignment: Float[Tensor, "*batch"] | None
    entity_cohesion: Float[Tensor, "*batch entity"]
    entity_alignment: Float[Tensor, "*batch entity"] | None
    entities: Int[Tensor, "entity"]


@full_precision
def cosine_clustering(
    hidden: Float[Tensor, "*batch query d_model"],
    entity: Int[Tensor, "query"],
    other_hidden: Float[Tensor, "*batch other_query d_model"] | None = None,
    other_entity: Int[Tensor, "other_query"] | None = None,
    leave_one_out: bool = True,
    mean_center: bool = False,
) -> CosineClustering:
    """Cosine of hidden states to the centroid of the queries that share their entity.

    Ye et al. (arXiv 2505.23653) take the states at the position where the bridge entity should
    appear; the centroid is the plain mean of the in-distribution queries. With the query inside
    its own centroid, as in the public notebook (`leave_one_out=False`), an entity with one query
    scores 1 and n independent directions score about 1/sqrt(n): compare with
    `shuffled_cosine_clustering`. In a looped model the batch axes are iteration and layer.

    Args:
        hidden: in-distribution states `[..., query, d_model]`.
        entity: entity of each query.
        other_hidden: out-of-distribution states, same batch axes.
        other_entity: entity of each of those queries.
        leave_one_out: compare a query with the centroid of the OTHER queries of its entity.
        mean_center: subtract the mean of all in-distribution states first, which removes a
            direction common to all (anisotropy).

    Returns:
        `CosineClustering`. An entity is NaN, in both numbers, where one of them is undefined: no
        query of one kind (when both are given), a single query with `leave_one_out`, a zero state
        or centroid. The means leave those entities out; over no entity they are NaN.

    Raises:
        ValueError: If the labels do not match the states, or only one of the two `other` arguments
            is given.
    """
    _check_labels("entity", entity, hidden)
    if (other_hidden is None) != (other_entity is None):
        raise ValueError("other_hidden and other_entity belong together; give both or neither")
    x = hidden.to(statistic_dtype(hidden))
    mean = x.mean(-2, keepdim=True) if mean_center else torch.zeros_like(x[..., :1, :])
    x = x - mean
    entities, index = torch.unique(entity, return_inverse=True)
    n_entities = len(entities)
    count = torch.bincount(index, minlength=n_entities)
    total = _sum_by(index, n_entities, x)
    # A centroid is compared by direction only, so sums stand for means.
    centroid = total[..., index, :] - x if leave_one_out else total[..., index, :]
    single = count[index] < 2
    cosine = direction_cosine(x, centroid)
    if leave_one_out:
        cosine = torch.where(single, torch.nan, cosine)
    entity_cohesion = _mean_by(index, n_entities, cosine)

    if other_hidden is None or other_entity is None:
        return CosineClustering(entity_cohesion.nanmean(-1), None, entity_cohesion, None, entities)
    _check_labels("other_entity", other_entity, other_hidden)
    y = other_hidden.to(x.dtype) - mean
    position = torch.searchsorted(entities, other_entity).clamp(max=n_entities - 1)
    shared = entities[position] == other_entity
    position, y = position[shared], y[..., shared, :]
    entity_alignment = _mean_by(position, n_entities, direction_cosine(y, total[..., position, :]))
    # One set of entities for both means, so that they can be compared.
    missing = entity_cohesion.isnan() | entity_alignment.isnan()
    entity_cohesion = entity_cohesion.masked_fill(missing, torch.nan)
    entity_alignment = entity_alignment.masked_fill(missing, torch.nan)
    return CosineClustering(
        entity_cohesion.nanmean(-1),
        entity_alignment.nanmean(-1),
        entity_cohesion,
        entity_alignment,
        entities,
    )


@full_precision
def shuffled_cosine_clustering(
    hidden: Float[Tensor, "*batch query d_model"],
    entity: Int[Tensor, "query"],
    seed: int,
    n_shuffles: int = 100,
    other_hidden: Float[Tensor, "*batch other_query d_model"] | None = None,
    other_entity: Int[Tensor, "other_query"] | None = None,
    leave_one_out: bool = True,
    mean_center: bool = False,
) -> tuple[Float[Tensor, "shuffle *batch"], Float[Tensor, "shuffle *batch"] | None]:
    """Null of `cosine_clustering`: the entities are shuffled over the queries.

    The in-distribution and the out-of-distribution labels are shuffled each among themselves, so
    every entity keeps its numbers of queries.

    Args:
        hidden: as in `cosine_clustering`.
        entity: as in `cosine_clustering`.
        seed: seed of the shuffles.
        n_shuffles: how many.
        other_hidden: as in `cosine_clustering`.
        other_entity: as in `cosine_clustering`.
        leave_one_out: as in `cosine_clustering`.
        mean_center: as in `cosine_clustering`.

    Returns:
        Cohesion `[shuffle, ...]`, and alignment `[shuffle, ...]` or None.

    Raises:
        ValueError: As `cosine_clustering`, or if `n_shuffles` is not positive.
    """
    if n_shuffles < 1:
        raise ValueError(f"n_shuffles={n_shuffles}; expected at least 1")
    generator = torch.Generator().manual_seed(seed)
    cohesion, alignment = [], []
    for _ in range(n_shuffles):
        result = cosine_clustering(
            hidden,
            _shuffled(entity, generator),
            other_hidden,
            None if other_entity is None else _shuffled(other_entity, generator),
            leave_one_out=leave_one_out,
            mean_center=mean_center,
        )
        cohesion.append(result.cohesion)
        if result.alignment is not None:
            alignment.append(result.alignment)
    return torch.stack(cohesion), torch.stack(alignment) if alignment else None


def _shuffled(labels: Tensor, generator: torch.Generator) -> Tensor:
    return labels[torch.randperm(len(labels), generator=generator).to(labels.device)]


def _sum_by(index: Tensor, n_groups: int, values: Tensor) -> Tensor:
    """Sum `[..., query, d_model]` into `[..., group, d_model]`."""
    sums = values.new_zeros(*values.shape[:-2], n_groups, values.shape[-1])
    return sums.index_add(-2, index, values)


def _mean_by(index: Tensor, n_groups: int, values: Tensor) -> Tensor:
    """Mean of `[..., query]` in each group `[..., group]`; NaN for an empty group."""
    sums = values.new_zeros(*values.shape[:-1], n_groups).index_add(-1, index, values)
    return sums / torch.bincount(index, minlength=n_groups)


def _check_labels(name: str, labels: Tensor, hidden: Tensor) -> None:
    if labels.shape != hidden.shape[-2:-1]:
        raise ValueError(
            f"{name} has shape {list(labels.shape)}, expected one label for each of the "
            f"{hidden.shape[-2]} queries"
        )
