"""Which keys the queries of a run see, and patterns from elsewhere that look at others."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from jaxtyping import Bool
from torch import Tensor

from tl_loops.layout.model import Model
from tl_loops.runs.grid import Region

_SCORES = "hook_attn_scores"


class SeenKeys:
    """Which keys the queries of a run do not see, noted while it runs."""

    def __init__(self) -> None:
        self.hidden: dict[str, Tensor] = {}

    @staticmethod
    def points(name: str) -> list[str]:
        """The hook points to be noted for attention scores or a pattern: its scores, and itself."""
        return list(dict.fromkeys([name.replace("hook_pattern", _SCORES), name]))

    def watch(self, model: Model, names: Iterable[str]) -> dict[str, Callable[[Tensor], None]]:
        """What is to be shown to :meth:`note`, for the patterns and scores among hook points.

        Args:
            model: The model that runs.
            names: Canonical hook names, of any kind.
        """
        patterns = [name for name in names if is_pattern(name)]
        points = dict.fromkeys(point for name in patterns for point in self.points(name))
        return {name: partial(self.note, name) for name in points if name in model.hook_dict}

    def note(self, name: str, value: Tensor) -> None:
        """Take note of an activation of the run.

        Args:
            name: One of :meth:`points`.
            value: Before anything is put in.
        """
        self.hidden[name] = _masked(value) if name.endswith(_SCORES) else value == 0

    def hidden_at(self, name: str) -> Bool[Tensor, "batch head query key"]:
        """Which keys each query does not see, at a pattern or at scores.

        A bridge of TransformerLens shows patterns in the place of scores, in which nothing is
        masked. There it is the keys to which the run's own pattern gives nothing.
        """
        scores = self.hidden.get(self.points(name)[0])
        if scores is not None and bool(scores.any()):
            return scores
        return self.hidden[name]

    def check(self, regions: Iterable[Region], values: Mapping[str, Tensor]) -> None:
        """Raise where patterns attend to what the places that they are put in do not see.

        Args:
            regions: The places.
            values: What is put in, by hook name, over the same positions and heads as the run's.

        Raises:
            ValueError: They do.
        """
        wrong = {}
        for name, value in values.items():
            if is_pattern(name):
                found = unseen(value, self.hidden_at(name).to(value.device), name).any(0)
                if bool(found.any()):
                    wrong[name] = found
        for region in regions if wrong else ():
            for name in wrong.keys() & set(region.names):
                for pos, head, src in region.parts():
                    part = torch.zeros_like(wrong[name])
                    part[head or slice(None), pos, src or slice(None)] = True
                    if len(places := (wrong[name] & part).nonzero()):
                        _, query, key = places[0].tolist()
                        raise UnseenKeyError(name, query, key, query)


class UnseenKeyError(ValueError):
    """A pattern from elsewhere attends to what its new place does not see.

    Args:
        name: Canonical hook name of the place.
        query: The position that attends, in the run that the pattern is from.
        key: What it attends to.
        place: The position of the run that it is put into.
    """

    def __init__(self, name: str, query: int, key: int, place: int):
        super().__init__(
            f"the source's attention from position {query} is on position {key}, which position "
            f"{place} of the target run does not see at {name!r}: causality, padding or a window "
            "differ; choose a place that sees as much, or put in 'z' in place of the pattern"
        )


def is_pattern(name: str) -> bool:
    """Whether a hook point shows where queries look: a pattern, or the scores before it."""
    return name.endswith(("hook_pattern", _SCORES))


def unseen(
    value: Tensor, hidden: Bool[Tensor, "batch head query key"], name: str
) -> Bool[Tensor, "batch head query key"]:
    """Where a pattern or scores attend to what is hidden."""
    return (~_masked(value) if name.endswith(_SCORES) else value != 0) & hidden


def _masked(scores: Tensor) -> Tensor:
    # Minus infinity here; on bridges of Hugging Face's models the least number of the type.
    return scores.detach() <= torch.finfo(scores.dtype).min / 2
