"""Follow entities and intermediate answers through iterations: when each becomes readable."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.layout.model import Model
from tl_loops.lens.decode import CodaLens, Lens
from tl_loops.lens.points import LensPoint
from tl_loops.lens.read import read_lens
from tl_loops.lens.tracked_tokens import TrackedTokens
from tl_loops.metrics.answers import first_of_final_run
from tl_loops.printing import prints_short
from tl_loops.runs.inputs import Positions, lens_inputs
from tl_loops.upstream import TextOrTokens

NEVER = -1
"""What a point index is where the thing asked for does not happen."""


@prints_short
@dataclass(frozen=True, eq=False)
class EntityTracks:
    """Ranks and probabilities of entities, each at its own position, at every point.

    Attributes:
        entities: Their names.
        lens: Name of the lens.
        points: Where it read, in order.
        positions: Where each entity was looked for, [entity, batch].
        rank: 1 is the top, [entity, point, batch].
        probability: [entity, point, batch].
    """

    entities: tuple[str, ...]
    lens: str
    points: tuple[LensPoint, ...]
    positions: Int[Tensor, "entity batch"]
    rank: Int[Tensor, "entity point batch"]
    probability: Float[Tensor, "entity point batch"]

    @property
    def labels(self) -> list[str]:
        """Short labels of the points, for plots."""
        return [point.label for point in self.points]

    @checked
    def accuracy(self, max_rank: int = 1) -> Float[Tensor, "entity point"]:
        """Fraction of prompts whose entity is among the top tokens (2604.07822, lens accuracy).

        Raises:
            ValueError: ``max_rank`` is below 1, the rank of the top token.
        """
        _check_rank(max_rank)
        return (self.rank <= max_rank).float().mean(-1)

    def mean_log_rank(self) -> Float[Tensor, "entity point"]:
        """Mean of log10 rank over prompts; ranks themselves have tails too heavy to average."""
        return self.rank.float().log10().mean(-1)

    @checked
    def first_point(self, max_rank: int = 1) -> Int[Tensor, "entity batch"]:
        """Index of the first point at which an entity is among the top tokens; -1: never.

        Raises:
            ValueError: ``max_rank`` is below 1, the rank of the top token.
        """
        _check_rank(max_rank)
        reached = self.rank <= max_rank
        first = reached.to(torch.uint8).argmax(1)
        return torch.where(reached.any(1), first, NEVER)

    @checked
    def leads_from(self, entity: str, rival: str) -> Int[Tensor, "batch"]:
        """Index of the point from which on an entity ranks above another one; -1: not at the end.

        With the final answer as entity and an intermediate one as rival this is where the
        trajectories cross for good (2507.02199, section 4).

        Raises:
            KeyError: One of them was not tracked.
        """
        ahead = self._rank(entity) < self._rank(rival)
        return torch.where(ahead[-1], first_of_final_run(ahead), NEVER)

    def _rank(self, entity: str) -> Int[Tensor, "point batch"]:
        if entity not in self.entities:
            raise KeyError(f"{entity!r} was not tracked; tracked: {', '.join(self.entities)}")
        return self.rank[self.entities.index(entity)]


def _check_rank(max_rank: int) -> None:
    if max_rank < 1:
        raise ValueError(f"max_rank must be at least 1, the rank of the top token, got {max_rank}")


@checked
def track_entities(
    model: Model,
    input: TextOrTokens,
    entities: Mapping[str, TrackedTokens],
    *,
    positions: Mapping[str, Positions] | None = None,
    lens: Lens | None = None,
    **options: Any,
) -> EntityTracks:
    """Follow entities, such as intermediate and final answers, through the points of a lens.

    Args:
        model: A looped model.
        input: Text, or tokens [batch, pos] or [pos].
        entities: The tokens of each, as ``track`` of :func:`tl_loops.lens.read_lens`.
        positions: Where to look for each: one position, or one per prompt as [batch, 1]; the last
            real token where an entity is not named.
        lens: Any lens; ``None``: the coda lens.
        **options: Further arguments of :func:`tl_loops.lens.read_lens`, such as ``points``.

    Returns:
        Ranks and probabilities, [entity, point, batch].

    Raises:
        ValueError: No entity, a position for one that is not tracked, several positions for one,
            or as :func:`tl_loops.lens.read_lens`.

    Source: rank trajectories of final and intermediate answers, 2507.02199, section 4; the bridge
    entity and the target at positions of their own, 2604.07822.
    """
    if not entities:
        raise ValueError("entities is empty: name at least one token to follow")
    wanted: dict[str, Positions] = {} if positions is None else dict(positions)
    for name in wanted:
        if name not in entities:
            raise ValueError(f"positions names {name!r}, which is not among the entities")
    columns = []
    for name in entities:
        where: Positions = wanted[name] if name in wanted else "last"
        inputs = lens_inputs(model, input, where, options.get("attention_mask"))
        if inputs.positions.shape[1] != 1:
            raise ValueError(
                f"positions of {name!r} must be one per prompt, got {inputs.positions.shape[1]}"
            )
        columns.append(inputs.positions)
    result = read_lens(
        model,
        input,
        CodaLens() if lens is None else lens,
        positions=torch.cat(columns, dim=1),
        track=entities,
        **options,
    )
    tracks = list(result.tracked.values())
    return EntityTracks(
        tuple(entities),
        result.lens,
        result.points,
        result.positions.T,
        torch.stack([track.rank[..., column] for column, track in enumerate(tracks)]),
        torch.stack([track.probability[..., column] for column, track in enumerate(tracks)]),
    )


@checked
def rank_jumps(rank: Int[Tensor, "point *batch"]) -> Float[Tensor, "step *batch"]:
    """How far a token's rank moves from one point to the next, in decades.

    |log10 rank[v + 1] - log10 rank[v]|; large where neighbouring points are not read alike, as
    between Huginn's third and fourth core layer under the logit lens.

    Args:
        rank: [point, ...], from 1.

    Returns:
        [point - 1, ...], at least 0.

    Raises:
        ValueError: A rank is below 1.
    """
    if rank.numel() and int(rank.min()) < 1:
        raise ValueError(f"ranks count from 1, got {int(rank.min())}")
    return rank.double().log10().diff(dim=0).abs().float()
