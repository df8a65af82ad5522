"""Where the tensors of an unrolled model appear in a bridge: each firing of each hook point."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_loops.errors import LoopedSemanticsError
from tl_loops.layout.layout import LoopLayout

Kept = Mapping[str, Tensor]
"""Tensors of this run that later views need, by the name of the hook point that saw them."""


class View:
    """How a named tensor is held in the tensor that fires: the same tensor, unless overridden."""

    def get(self, fired: Tensor, kept: Kept) -> Tensor:
        """The named tensor."""
        return fired

    def put(self, fired: Tensor, value: Tensor, kept: Kept) -> Tensor:
        """What fires instead, once the named tensor has become ``value``."""
        return value


WHOLE = View()


@dataclass(frozen=True)
class Columns(View):
    """Part of the last axis, as heads if ``d_head`` is given, minus a bias that is added later.

    Attributes:
        start: First column.
        width: Number of columns.
        d_head: Size of a head: the columns become ``[head, d_head]``.
        bias: [head, d_head], added to what is shown and taken off what is put.
    """

    start: int
    width: int
    d_head: int | None = None
    bias: Tensor | None = None

    def get(self, fired: Tensor, kept: Kept) -> Tensor:
        part = fired.narrow(-1, self.start, self.width)
        if self.d_head is not None:
            part = part.unflatten(-1, (-1, self.d_head))
        return part if self.bias is None else part + self.bias

    def put(self, fired: Tensor, value: Tensor, kept: Kept) -> Tensor:
        part = value if self.bias is None else value - self.bias
        if self.d_head is not None:
            part = part.flatten(-2)
        stop = self.start + self.width
        return torch.cat([fired[..., : self.start], part.to(fired), fired[..., stop:]], dim=-1)


class HeadsFirst(View):
    """Positions before heads, where the bridge has them the other way round."""

    def get(self, fired: Tensor, kept: Kept) -> Tensor:
        return fired.transpose(1, 2)

    def put(self, fired: Tensor, value: Tensor, kept: Kept) -> Tensor:
        return value.transpose(1, 2)


HEADS_FIRST = HeadsFirst()


@dataclass(frozen=True)
class SumWith(View):
    """The stream after an addition, seen at the branch that is added.

    The addition itself lies inside the Hugging Face block, where nothing can hook it; an edit of
    the sum is the same edit of the branch.

    Attributes:
        stream: The hook point that saw the stream before the addition.
    """

    stream: str

    def get(self, fired: Tensor, kept: Kept) -> Tensor:
        return kept[self.stream] + fired

    def put(self, fired: Tensor, value: Tensor, kept: Kept) -> Tensor:
        return value - kept[self.stream]


@dataclass(frozen=True)
class PartOfSum(View):
    """One of several terms whose sum fires; an edit of it moves the sum alone.

    Attributes:
        term: The hook point that saw the term.
    """

    term: str

    def get(self, fired: Tensor, kept: Kept) -> Tensor:
        return kept[self.term]

    def put(self, fired: Tensor, value: Tensor, kept: Kept) -> Tensor:
        return fired + (value - kept[self.term])


@dataclass(frozen=True)
class Constant(View):
    """A weight, spread over batch and positions, that is a term of the sum that fires.

    Attributes:
        weight: [d_model].
    """

    weight: Tensor

    def get(self, fired: Tensor, kept: Kept) -> Tensor:
        return self.weight.expand_as(fired).clone()

    def put(self, fired: Tensor, value: Tensor, kept: Kept) -> Tensor:
        return fired + (value - self.weight)


@dataclass(frozen=True)
class Scaled(View):
    """The tensor times a factor that the Hugging Face model applies outside of any module.

    Attributes:
        factor: Not 0.
    """

    factor: float

    def get(self, fired: Tensor, kept: Kept) -> Tensor:
        return fired * self.factor

    def put(self, fired: Tensor, value: Tensor, kept: Kept) -> Tensor:
        return value / self.factor


@dataclass(frozen=True)
class Gate(View):
    """The gate of every head, [head, d_head] in 0 to 1, whose logits fire.

    Attributes:
        d_head: Size of a head.
    """

    d_head: int

    def get(self, fired: Tensor, kept: Kept) -> Tensor:
        return torch.sigmoid(fired).unflatten(-1, (-1, self.d_head))

    def put(self, fired: Tensor, value: Tensor, kept: Kept) -> Tensor:
        if bool(((value < 0) | (value > 1)).any()):
            raise LoopedSemanticsError(
                "the bridge takes the logits of this gate, which has none outside 0 to 1: edit "
                "hook_z instead"
            )
        return torch.logit(value).flatten(-2)


@dataclass(frozen=True)
class ReadOnly(View):
    """A tensor that may be looked at, but whose edit the bridge cannot take.

    Attributes:
        why: Why it cannot, and what to edit instead.
    """

    why: str

    def put(self, fired: Tensor, value: Tensor, kept: Kept) -> Tensor:
        if not torch.equal(value, fired):
            raise LoopedSemanticsError(self.why)
        return fired


@dataclass(frozen=True)
class Reading:
    """One name that a firing stands for.

    Attributes:
        name: Hook point of the unrolled model.
        view: How its tensor is held in the one that fires.
        needs: Hook points whose tensors the view asks for.
    """

    name: str
    view: View = WHOLE
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tap:
    """One place of the bridge that fires once or several times in a forward pass.

    Attributes:
        source: A hook point of the bridge; or, behind an ``@``, a module of the Hugging Face model
            whose output fires (with ``:in``: its first input).
        firings: For every firing, in order, the names that it stands for; an edit under one name
            is what the next one sees.
    """

    source: str
    firings: tuple[tuple[Reading, ...], ...]

    def names(self) -> Iterator[str]:
        """All names that this tap serves."""
        return (reading.name for firing in self.firings for reading in firing)


def tap(source: str, firings: Iterable[Iterable[str | Reading]]) -> Tap:
    """A :class:`Tap`, with plain names for tensors that fire as they are."""
    return Tap(
        source,
        tuple(
            tuple(Reading(one) if isinstance(one, str) else one for one in firing)
            for firing in firings
        ),
    )


def block_end(layout: LoopLayout, block: int) -> list[str]:
    """The hook points between blocks that see what leaves an unrolled block."""
    t = layout.ends_at(block)
    return [f"blocks.{block}.hook_resid_post"] + ([] if t is None else [f"iter.{t}.hook_state_out"])


def block_taps(
    source: str, blocks: list[int], places: Mapping[str, str | tuple[str, View]]
) -> Iterator[Tap]:
    """Taps of one physical layer, which fires once for each of the blocks that it is.

    Args:
        source: The layer in the bridge, e.g. ``"blocks.0"``.
        blocks: The unrolled blocks, in the order in which they run.
        places: Hook point inside the layer to hook point inside the block, with a view if need be;
            several of the latter separated by blanks share the tensor.
    """
    for place, shown in places.items():
        names, view = (shown, WHOLE) if isinstance(shown, str) else shown
        yield tap(
            f"{source}.{place}",
            [[Reading(f"blocks.{i}.{name}", view) for name in names.split()] for i in blocks],
        )
