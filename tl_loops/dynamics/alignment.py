"""Likeness of the geometry at all points of a loop, or of two models: streamed kernel alignment."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_loops.arguments import checked
from tl_loops.layout.model import Model
from tl_loops.layout.of_model import layout_of, with_iterations
from tl_loops.layout.selection import Selection, distinct_indices
from tl_loops.metrics.geometry import alignment
from tl_loops.metrics.precision import without_autocast
from tl_loops.runs.activations import find_activation
from tl_loops.runs.batches import batches, check_batch_size, longest_first, token_prompts
from tl_loops.runs.cells import hooked, named_hooks
from tl_loops.upstream import Prompts, left_as_it_was

if TYPE_CHECKING:
    import pandas

MOST_BYTES = 2 * 2**30
"""Memory that the covariances of all pairs may take."""


@dataclass(frozen=True, eq=False)
class KernelAlignment:
    """Linear centred kernel alignment of pairs of points.

    Attributes:
        matrix: [row, column], in [0, 1]; NaN where a point does not vary over the tokens.
        rows: Labels of the first model's points, such as ``"t3"`` for a state that leaves
            iteration 3, or those of blocks (``"r3.1"``, ``"p0"``).
        columns: Labels of the second's; of a feedforward model block numbers.
        n_tokens: How many tokens of all prompts were compared.
    """

    matrix: Float[Tensor, "row column"]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    n_tokens: int

    def to_frame(self) -> "pandas.DataFrame":
        """The matrix with its labels."""
        import pandas

        return pandas.DataFrame(self.matrix.numpy(), index=self.rows, columns=self.columns)

    def __repr__(self) -> str:
        return (
            f"KernelAlignment({len(self.rows)} x {len(self.columns)} points, "
            f"{self.n_tokens} tokens)"
        )


@dataclass(frozen=True)
class _Points:
    """Hook points of one model, with labels."""

    model: Model
    names: tuple[str, ...]
    labels: tuple[str, ...]


@checked
@left_as_it_was
def kernel_alignment(
    model: Model,
    prompts: Prompts,
    other: Model | None = None,
    *,
    activation: str | None = None,
    other_activation: str | None = None,
    where: Selection | None = None,
    other_where: Selection | None = None,
    n_iterations: int | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> KernelAlignment:
    """How alike the geometry of the tokens is at all pairs of points, streamed over prompts.

    ‖YᵀX‖_F² / (‖XᵀX‖_F ‖YᵀY‖_F) of the centred activations of all tokens of all prompts. Sums of
    products are kept in float64 and merged exactly, so the number of prompts costs no memory; for
    n points of width d they take 8 n² d² bytes at most (half of that within one model).

    Args:
        model: A looped model or a plain HookedTransformer.
        prompts: Strings, or 1-D tensors of tokens.
        other: The model of the columns, for instance a feedforward one; ``None``: ``model`` itself.
            Both are given the same strings or tokens, and must read each prompt as as many tokens.
        activation: What is compared, such as ``"state_out"``, ``"resid_post"``, ``"mlp_out"``:
            something [batch, pos, width]. ``None``: the states of a looped model, ``"resid_post"``
            of another.
        other_activation: The same for ``other``.
        where: Iterations (or blocks) that are compared; ``None``: all.
        other_where: The same for ``other``.
        n_iterations: Number of iterations of ``model``.
        batch_size: Prompts of equal length in one pass at most.
        progress: Whether to show a progress bar.

    Returns:
        The alignments, symmetric with ones on the diagonal within one model.

    Raises:
        ValueError: ``other_activation`` or ``other_where`` without ``other``, a prompt cannot be
            fed, an activation is unknown or has heads, the two models
            read a prompt as different numbers of tokens, or the sums would not fit into 2 GB.
        NoLoopError: ``n_iterations`` for a model without a loop.
        IndexError: There is no such iteration or block.

    Source: 1905.00414; between iterations as in 2602.11451.
    """
    check_batch_size(batch_size)
    if other is None and not (other_activation is None and other_where is None):
        raise ValueError(
            "other_activation and other_where are about the model other, and there is none: pass "
            "other=model to compare two kinds of points of one model"
        )
    listed = list(prompts)
    tokens = token_prompts(model, listed)
    with with_iterations(model, n_iterations):
        x = _points(model, activation, where)
        y = None if other is None else _points(other, other_activation, other_where)
        theirs = tokens if other is None else token_prompts(other, listed)
        for number, (a, b) in enumerate(zip(tokens, theirs, strict=True)):
            if len(a) != len(b):
                raise ValueError(
                    f"prompt {number} has {len(a)} tokens for the one model and {len(b)} for the "
                    "other: token by token they can only be compared where both read as many; "
                    "give tokens, or models with one tokenizer"
                )
        lengths = [len(t) for t in tokens]
        sums: _Sums | None = None
        bar = tqdm(total=len(tokens), desc="alignment", disable=not progress)
        with bar, torch.no_grad(), without_autocast():
            order = longest_first(lengths, lengths)
            for members in batches(order, lengths.__getitem__, batch_size):
                rows = _read(x, torch.stack([tokens[i] for i in members]))
                columns = None
                if y is not None:
                    columns = _read(y, torch.stack([theirs[i] for i in members]))
                    columns = [column.to(rows[0].device) for column in columns]
                sums = _Sums(rows, columns) if sums is None else sums
                sums.add(rows, columns)
                bar.update(len(members))
    assert sums is not None
    columns = (x if y is None else y).labels
    return KernelAlignment(sums.alignments(), x.labels, columns, sums.n)


class _Sums:
    """Sums of x yᵀ over tokens, about the mean of the first batch, for all pairs of points.

    Centring about something near the mean keeps the digits that a sum of raw products would lose.
    """

    def __init__(self, rows: list[Tensor], columns: list[Tensor] | None):
        self.one = columns is None
        points = rows if columns is None else [*rows, *columns]
        self.n_rows, self.n = len(rows), 0
        self.shift = [x.mean(0) for x in points]
        self.total = [torch.zeros_like(shift) for shift in self.shift]
        self.products: dict[tuple[int, int], Tensor] = {}
        size = sum(8 * len(self.shift[i]) * len(self.shift[j]) for i, j in self._pairs())
        if size > MOST_BYTES:
            raise ValueError(
                f"the products of all pairs of points would take {size / 2**30:.1f} GB, more than "
                f"{MOST_BYTES / 2**30:.0f}: choose fewer points with where="
            )
        for i, j in self._pairs():
            self.products[i, j] = self.shift[0].new_zeros(len(self.shift[i]), len(self.shift[j]))

    def _pairs(self) -> list[tuple[int, int]]:
        n = len(self.shift)
        if self.one:
            return [(i, j) for i in range(n) for j in range(i, n)]
        crossing = [(i, j) for i in range(self.n_rows) for j in range(self.n_rows, n)]
        return [*crossing, *((i, i) for i in range(n))]

    def add(self, rows: list[Tensor], columns: list[Tensor] | None) -> None:
        """Take a batch of tokens."""
        points = rows if columns is None else [*rows, *columns]
        moved = [x - shift for x, shift in zip(points, self.shift, strict=True)]
        self.n += len(moved[0])
        for total, x in zip(self.total, moved, strict=True):
            total += x.sum(0)
        for (i, j), product in self.products.items():
            product += moved[i].T @ moved[j]

    def _centred(self, i: int, j: int) -> Tensor:
        return self.products[i, j] - torch.outer(self.total[i], self.total[j]) / self.n

    def alignments(self) -> Float[Tensor, "row column"]:
        """The alignment of every pair."""
        n = len(self.shift)
        own = [self._centred(i, i) for i in range(n)]
        columns = range(n) if self.one else range(self.n_rows, n)
        values = [
            [
                alignment(self._centred(min(i, j), max(i, j)), own[max(i, j)], own[min(i, j)])
                for j in columns
            ]
            for i in range(self.n_rows)
        ]
        return torch.tensor(values, dtype=torch.float64)


def _points(model: Model, name: str | None, where: Selection | None) -> _Points:
    """The points of a model that are compared."""
    layout = layout_of(model)
    name = name or ("resid_post" if layout is None else "state_out")
    found = find_activation(model, name)
    if found.kind not in ("stream", "iteration"):
        raise ValueError(
            f"activation {name!r} is not [batch, pos, width] at every block or iteration: compare "
            "'state_out', 'resid_post', 'attn_out', 'mlp_out' or the like"
        )
    if found.kind == "stream":
        every, what = model.cfg.n_layers, "block"
        labels = [str(i) for i in range(every)] if layout is None else layout.labels()
    else:
        assert layout is not None
        every, what = layout.n_iterations, "iteration"
        labels = [f"t{t}" for t in range(every)]
    chosen = distinct_indices(what, every, where)
    return _Points(
        model, tuple(found.hook_name(i) for i in chosen), tuple(labels[i] for i in chosen)
    )


def _read(points: _Points, tokens: Int[Tensor, "batch pos"]) -> list[Float[Tensor, "token width"]]:
    """The activations of all tokens of a batch, in float64."""
    model, found = points.model, {}
    device = next(model.parameters()).device
    tokens = tokens.to(device)

    work = "cpu" if device.type == "mps" else device  # some devices have no float64

    def keep(name: str, value: Tensor) -> None:
        found[name] = value.flatten(0, 1).to(work).double()

    with hooked(model, named_hooks(points.names, keep)):
        model(tokens, return_type=None, attention_mask=torch.ones_like(tokens))
    return [found[name] for name in points.names]
