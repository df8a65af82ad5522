"""What a transplant takes and where it puts it: sites of two runs, matched part by part."""

from dataclasses import dataclass
from dataclasses import replace as changed
from functools import cached_property

from jaxtyping import Bool
from torch import Tensor

from tl_loops.layout.layout import LoopLayout
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import layout_of
from tl_loops.layout.selection import distinct_indices, paired_parts
from tl_loops.patching.activation import replace
from tl_loops.patching.site import Site
from tl_loops.runs.activations import (
    Activation,
    cached_names,
    check_held,
    find_activation,
    known_axes,
)
from tl_loops.runs.cells import Edit
from tl_loops.runs.seen_keys import UnseenKeyError, unseen
from tl_loops.upstream import Cache

Parts = tuple[tuple[slice, slice], ...]
"""Contiguous parts of an axis: of the source, of the target."""


@dataclass(frozen=True)
class SourceRun:
    """The run that gives the values.

    Attributes:
        cache: Its cache, or a mapping by canonical hook name.
        model: Whose run it was; of a mapping it is that of the target.
        layout: Of that run; ``None``: of a feedforward model.
    """

    cache: Cache
    model: Model
    layout: LoopLayout | None

    @classmethod
    def of(cls, cache: Cache, target: Model) -> "SourceRun":
        """The run that a cache is of.

        Raises:
            ValueError: It is no cache.
        """
        cached_names(cache)
        model = getattr(cache, "model", None)
        model = target if model is None else model
        return cls(cache, model, getattr(cache, "layout", None) or layout_of(model))

    def n_cached_iterations(self, rest: str) -> int:
        """How many iterations the run had, as far as the cache shows.

        Args:
            rest: A hook name after ``iter.{t}.``.

        Raises:
            ValueError: The cache holds no such activation.
        """
        names = cached_names(self.cache)
        held = [
            int(name.split(".")[1])
            for name in names
            if name.startswith("iter.") and name.endswith(f".{rest}")
        ]
        if not held:
            raise ValueError(
                f"the cache holds no iter.*.{rest}: run run_with_cache with a names_filter that "
                "keeps it"
            )
        return max(held) + 1

    def value(self, name: str, activation: Activation) -> Tensor:
        """One activation, with its batch axis."""
        value = self.cache[name]
        whole = getattr(self.cache, "has_batch_dim", True) or value.ndim == len(activation.dims)
        return value if whole else value.unsqueeze(0)


@dataclass(frozen=True)
class Transplant:
    """What one hook point of the source gives to one hook point of the target.

    Attributes:
        source: The site where the value is read.
        target: The site where it is put.
        activation: Of the target.
        source_name: Canonical hook name in the source run.
        name: Canonical hook name in the target run.
        value: What is read, with its batch axis.
        n_heads: Heads that the target has; ``None`` without a head axis.
    """

    source: Site
    target: Site
    activation: Activation
    source_name: str
    name: str
    value: Tensor
    n_heads: int | None

    @property
    def is_pattern(self) -> bool:
        """Whether it says where queries look, which a mask bounds."""
        return self.activation.kind == "pattern"

    @cached_property
    def heads(self) -> Parts | None:
        """The heads that change hands.

        Raises:
            ValueError: The two sites name different numbers of heads.
            IndexError: There is no such head.
        """
        dim = self.activation.head_dim
        if dim is None or self.n_heads is None:
            return None
        return self._matched("head", self.value.shape[dim], self.n_heads)

    def positions(self, n_pos: int) -> Parts:
        """The positions that change hands.

        Args:
            n_pos: Of the target run.

        Raises:
            ValueError: The two sites name different numbers of positions, or a pattern is over
                another number of keys.
            IndexError: There is no such position.
        """
        found = self.value.shape[self.activation.pos_dim]
        if self.is_pattern and found != n_pos:
            raise ValueError(
                f"the source's {self.source_name!r} is over {found} positions but the target run "
                f"has {n_pos}: a pattern moves between runs of the same number of tokens alone"
            )
        return self._matched("pos", found, n_pos)

    def edits(self, n_pos: int) -> list[Edit]:
        """The edits of a target run of so many positions."""
        act, value = self.activation, self.value
        return [
            replace(act, value, there, to, None, n_pos, from_pos=here, from_head=take)
            for here, there in self.positions(n_pos)
            for take, to in self.heads or ((None, None),)
        ]

    def check_rows(self, n_prompts: int) -> None:
        """Raise where the source has neither one prompt nor as many as the target run.

        Raises:
            ValueError: It has not.
        """
        n_given = self.value.shape[0]
        if n_given not in (1, n_prompts):
            raise ValueError(
                f"the source has batch size {n_given} but there are {n_prompts} prompts: give one "
                "source prompt for each, or a single one for all"
            )

    def check_seen(self, hidden: Bool[Tensor, "batch head query key"]) -> None:
        """Raise where a pattern attends to what its new place cannot see.

        Args:
            hidden: Which keys each query of the target run does not see.

        Raises:
            ValueError: It does.
        """
        hidden = hidden.to(self.value.device)
        for here, there in self.positions(hidden.shape[2]):
            for take, to in self.heads or ((slice(None), slice(None)),):
                part = self.value[:, take, here]
                wrong = unseen(part, hidden[:, to, there], self.name).nonzero()
                if len(wrong):
                    query, key = wrong[0, 2:].tolist()
                    raise UnseenKeyError(self.name, here.start + query, key, there.start + query)

    def _matched(self, axis: str, n_source: int, n_target: int) -> Parts:
        """Indices of both sites along an axis, in pairs."""
        asked = getattr(self.source, axis), getattr(self.target, axis)
        source = distinct_indices(axis, n_source, asked[0])
        target = distinct_indices(axis, n_target, asked[1])
        if asked[0] is not None and len(source) == 1:
            source *= len(target)
        if len(source) != len(target):
            words = {"pos": "positions", "head": "heads"}[axis]
            raise ValueError(
                f"the source {self.source_name!r} gives {len(source)} {words} and the target "
                f"{self.name!r} takes {len(target)}: choose as many on both sides with "
                f"{axis}=, or one in the source for all"
            )
        return paired_parts(source, target)


def match(model: Model, run: SourceRun, source: Site, target: Site) -> list[Transplant]:
    """Match one site of a source run with one of a model; nothing is run.

    Raises:
        ValueError: A site that a model does not have, a cache that lacks it, axes, widths, heads or
            numbers of places that do not fit.
        IndexError: A coordinate is out of range.
        LoopedSemanticsError: Keys or values of a model whose iterations share them.
    """
    given = find_activation(run.model, source.activation)
    taken = find_activation(model, target.activation)
    is_other = given.dims != taken.dims or (taken.kind == "pattern" and given.rest != taken.rest)
    if is_other:
        raise ValueError(
            f"the source gives {given.name!r} [{', '.join(given.dims)}], but the target takes "
            f"{taken.name!r} [{', '.join(taken.dims)}]: name the same activation on both sides"
        )
    source_names = _names(run.model, source, run.layout)
    names = _names(model, target, None)
    check_held(run.cache, run.model, source_names, "the source")
    if len(source_names) == 1:
        source_names *= len(names)
    if len(source_names) != len(names):
        raise ValueError(
            f"the source {source} names {len(source_names)} hook points and the target {target} "
            f"{len(names)}: name as many on both sides, or one in the source for all"
        )
    found = []
    for here, there in zip(source_names, names, strict=True):
        value = run.value(here, given)
        _check_width(model, there, value)
        n_heads = taken.n_heads(model.cfg)
        found.append(Transplant(source, target, taken, here, there, value, n_heads))
        _ = found[-1].heads  # raises where they do not fit
    return found


def _names(model: Model, site: Site, layout: LoopLayout | None) -> tuple[str, ...]:
    """The hook points of a site, in the order in which it names iterations and layers."""
    # Positions are looked at once it is known how many there are.
    (region,) = changed(site, pos=None).grid(model, 1, layout).regions
    return region.names


def _check_width(model: Model, name: str, value: Tensor) -> None:
    axis, width = (known_axes(model, name) or [("", None)])[-1]
    if width not in (None, value.shape[-1]):
        raise ValueError(
            f"the source is {value.shape[-1]} wide but {name!r} of the model has {axis}={width}: "
            f"values move between models of equal {axis} alone"
        )
