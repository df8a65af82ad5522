"""What a lens says: predictions, ranks and divergences at each point, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_loops.arguments import checked
from tl_loops.lens.points import LensPoint
from tl_loops.metrics.answers import answer_flips, saturation_iteration
from tl_loops.printing import prints_short


@prints_short
@dataclass(frozen=True, eq=False)
class TokenTrajectory:
    """How one tracked token (or its best spelling) fares at each point.

    Attributes:
        tokens: Its ids, [batch, spelling]; -1 where a prompt has fewer spellings.
        rank: Best rank of the spellings, 1 is the top, [point, batch, read].
        probability: Total probability of the spellings, [point, batch, read].
    """

    tokens: Int[Tensor, "batch spelling"]
    rank: Int[Tensor, "point batch read"]
    probability: Float[Tensor, "point batch read"]


@prints_short
@dataclass(frozen=True, eq=False)
class LensResult:
    """Readouts at points of the residual stream, reduced as they were made.

    ``point`` is the order of :attr:`points`, ``read`` that of :attr:`positions`. Statistics are
    float32 (float64 for a float64 model), divergences and entropies in nats.

    Attributes:
        lens: Name of the lens.
        points: Where it read.
        tokens: The prompts, [batch, pos].
        positions: Position of each column of ``read``, [batch, read].
        real: Whether that position holds a token rather than padding, [batch, read].
        predictions: Top token of each readout, [point, batch, read].
        top_tokens: Best first, [point, batch, read, k].
        top_probabilities: Their probabilities, [point, batch, read, k].
        entropy: Of each readout's distribution, [point, batch, read].
        kl_to_final: KL(model's output || readout), [point, batch, read].
        kl_from_previous: KL(previous || this) between the readouts of one place in successive
            iterations, [point, batch, read]; NaN where there is no previous iteration.
        final_predictions: Top token of the model's own output, [batch, read].
        tracked: Trajectories of the chosen tokens by name.
        logits: [point, batch, read, d_vocab] if asked for.
        final_logits: The model's own, [batch, read, d_vocab], if asked for.
        tokenizer: The model's, for :meth:`text`.
    """

    lens: str
    points: tuple[LensPoint, ...]
    tokens: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch read"]
    real: Bool[Tensor, "batch read"]
    predictions: Int[Tensor, "point batch read"]
    top_tokens: Int[Tensor, "point batch read k"]
    top_probabilities: Float[Tensor, "point batch read k"]
    entropy: Float[Tensor, "point batch read"]
    kl_to_final: Float[Tensor, "point batch read"]
    kl_from_previous: Float[Tensor, "point batch read"]
    final_predictions: Int[Tensor, "batch read"]
    tracked: Mapping[str, TokenTrajectory]
    logits: Float[Tensor, "point batch read d_vocab"] | None = None
    final_logits: Float[Tensor, "batch read d_vocab"] | None = None
    tokenizer: Any = field(default=None, repr=False)

    @checked
    def text(self, tokens: Int[Tensor, "..."]) -> list[str]:
        """One text per token, in the order of memory; without a tokenizer its id.

        Raises:
            ValueError: A token is below 0.
        """
        ids = tokens.flatten().tolist()
        if min(ids, default=0) < 0:
            raise ValueError(f"tokens holds {min(ids)}, expected ids of at least 0")
        if self.tokenizer is None:
            return [str(token) for token in ids]
        known = {token: str(self.tokenizer.decode([token])) for token in dict.fromkeys(ids)}
        return [known[token] for token in ids]

    def to_frame(self) -> pandas.DataFrame:
        """One row per point and real token that is read.

        Columns: ``point`` (its label), ``name``, ``kind``, ``phase``, ``iteration``, ``layer``,
        ``prompt``, ``position``, ``token`` and ``prediction`` (text), ``prediction_id``,
        ``probability`` (of the prediction), ``entropy``, ``kl_to_final``, ``kl_from_previous``,
        ``agrees`` (with the model's own prediction), ``top`` (the best tokens as text, a tuple),
        and for each tracked token ``rank NAME`` and ``probability NAME``. Divergences and entropies
        are in nats.
        """
        n_points = len(self.points)
        prompt, read = self.real.nonzero(as_tuple=True)
        n_rows = len(prompt)

        def column(values: Tensor) -> Any:
            """[point, batch, read] in the order of the rows."""
            return values[:, prompt, read].flatten().tolist()

        def repeated(values: list[Any]) -> list[Any]:
            return values * n_points

        positions = self.positions[prompt, read]
        best = self.text(self.top_tokens[:, prompt, read])
        k = self.top_tokens.shape[-1]
        columns: dict[str, Any] = {
            "point": [point.label for point in self.points for _ in range(n_rows)]
        }
        for name in ("name", "kind", "phase"):
            columns[name] = [getattr(p, name) for p in self.points for _ in range(n_rows)]
        for name in ("iteration", "layer"):
            numbers = [getattr(p, name) for p in self.points for _ in range(n_rows)]
            columns[name] = pandas.array(numbers, dtype="Int64")
        columns |= {
            "prompt": repeated(prompt.tolist()),
            "position": repeated(positions.tolist()),
            "token": repeated(self.text(self.tokens[prompt, positions])),
            "prediction": self.text(self.predictions[:, prompt, read]),
            "prediction_id": column(self.predictions),
            "probability": column(self.top_probabilities[..., 0]),
            "entropy": column(self.entropy),
            "kl_to_final": column(self.kl_to_final),
            "kl_from_previous": column(self.kl_from_previous),
            "agrees": column(self.agreement()),
            "top": [tuple(best[i : i + k]) for i in range(0, len(best), k)],
        }
        for name, trajectory in self.tracked.items():
            columns[f"rank {name}"] = column(trajectory.rank)
            columns[f"probability {name}"] = column(trajectory.probability)
        return pandas.DataFrame(columns)

    @property
    def labels(self) -> list[str]:
        """Short labels of the points, for plots."""
        return [point.label for point in self.points]

    @checked
    def index(self, name: str) -> int:
        """Index of a point by hook name, alias or label.

        Raises:
            KeyError: The lens did not read there.
        """
        for index, point in enumerate(self.points):
            if name in (point.name, point.alias, point.label):
                return index
        raise KeyError(f"the lens did not read at {name!r}; it read at {', '.join(self.labels)}")

    @checked
    def by_iteration(self, values: Shaped[Tensor, "point *rest"]) -> Tensor:
        """Arrange values per point by iteration; points outside of the loop are left out.

        Args:
            values: [point, ...], such as :attr:`entropy` or a tracked rank.

        Returns:
            [iteration, ...] for states, [iteration, layer, ...] for points in core blocks.

        Raises:
            ValueError: The points do not form such a grid.
        """
        if values.shape[0] != len(self.points):
            raise ValueError(
                f"values has {values.shape[0]} entries, expected {len(self.points)}, one per point"
            )
        series = [
            [index for index, _ in members]
            for members in self._series().values()
            if members[0][1].iteration is not None
        ]
        core = [point for point in self.points if point.iteration is not None]
        kinds = {point.kind for point in core}
        iterations = {tuple(self.points[i].iteration for i in members) for members in series}
        if len(kinds) != 1 or len(iterations) != 1:
            raise ValueError(
                "values by iteration need points of one kind at the same iterations of every "
                f"layer, for example points='core' or 'states'; got {', '.join(self.labels)}"
            )
        if core[0].layer is None:
            return values[series[0]]
        return torch.stack([values[members] for members in series], dim=1)

    def answer_flips(self) -> Int[Tensor, "*layer batch read"]:
        """How often the top token changes from one iteration to the next.

        Returns:
            [batch, read] for states, [layer, batch, read] for points in core blocks.

        Raises:
            ValueError: As :meth:`by_iteration`.
        """
        return answer_flips(self.by_iteration(self.predictions))

    def saturation_iteration(self) -> Int[Tensor, "*layer batch read"]:
        """First of the iterations that were read from which on the top token stays.

        Returns:
            Index into the iterations that were read, of the shape of :meth:`answer_flips`.

        Raises:
            ValueError: As :meth:`by_iteration`.
        """
        return saturation_iteration(self.by_iteration(self.predictions))

    @checked
    def agreement(self, k: int = 1) -> Bool[Tensor, "point batch read"]:
        """Whether the model's own prediction is among the readout's top k.

        Raises:
            ValueError: More top tokens are asked for than were kept.
        """
        kept = self.top_tokens.shape[-1]
        if not 1 <= k <= kept:
            raise ValueError(f"k={k}, but the lens kept {kept} top tokens: pass top_k={max(k, 1)}")
        if k == 1:
            return self.predictions == self.final_predictions
        return (self.top_tokens[..., :k] == self.final_predictions.unsqueeze(-1)).any(-1)

    def _series(self) -> dict[tuple, list[tuple[int, LensPoint]]]:
        return point_series(self.points)


def point_series(points: tuple[LensPoint, ...]) -> dict[tuple, list[tuple[int, LensPoint]]]:
    """Points grouped by what they share but the iteration, each group by rising iteration."""
    groups: dict[tuple, list[tuple[int, LensPoint]]] = {}
    for index, point in enumerate(points):
        groups.setdefault(point.series, []).append((index, point))
    for members in groups.values():
        members.sort(key=lambda member: member[1].iteration or 0)
    return groups
