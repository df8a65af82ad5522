"""Labels of prompts: their classes, which prompts are held out, and the labels shuffled."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_loops.errors import shortened

Label = str | int | bool
"""What a class can be called."""


@dataclass(frozen=True, eq=False)
class LabelSplit:
    """Class ids of the prompts to fit on and of those held out, as they are and shuffled.

    Attributes:
        classes: Name of each class, in order.
        train: Indices of the prompts to fit on.
        held_out: Indices of the prompts to test on.
        train_labels: Class of each; row 0 as given, each further row shuffled.
        held_out_labels: The same for those held out, shuffled among themselves.
    """

    classes: tuple[Label, ...]
    train: Int[Tensor, "train"]
    held_out: Int[Tensor, "held_out"]
    train_labels: Int[Tensor, "set train"]
    held_out_labels: Int[Tensor, "set held_out"]

    @property
    def majority(self) -> float:
        """Share of the held-out prompts that are of the most frequent class of the others."""
        most = self.train_labels[0].bincount(minlength=len(self.classes)).argmax()
        return float((self.held_out_labels[0] == most).double().mean())


def split_labels(
    labels: Any, n_prompts: int, train: Any, train_fraction: float, seed: int, n_shuffles: int
) -> LabelSplit:
    """Read labels, split the prompts, and shuffle the labels within each part.

    Args:
        labels: One for each prompt: texts, integers or booleans, in a list, an array or a tensor.
        n_prompts: How many prompts there are.
        train: True for each prompt to fit on, False for each to test on; ``None``: drawn, within
            each class.
        train_fraction: Share of each class that is drawn to fit on, at least one prompt of it and
            at most all but one.
        seed: Fixes the draw and the shuffles.
        n_shuffles: How many shuffled rows there are.

    Raises:
        ValueError: The labels do not fit the prompts, are not all labels, or of one class alone; a
            class has a single prompt, or none to fit on; or fewer prompts are held out than there
            are classes.
    """
    given = read_labels(labels, n_prompts)
    names = _in_order(set(given))
    if len(names) < 2:
        raise ValueError(
            f"all {n_prompts} labels are {names[0]!r}: a probe needs at least two classes"
        )
    if n_shuffles < 1:
        raise ValueError(f"n_shuffles must be at least 1, got {n_shuffles}")
    number = {name: i for i, name in enumerate(names)}
    ids = torch.tensor([number[name] for name in given])
    generator = torch.Generator().manual_seed(seed)
    if train is None:
        fitted = _drawn(ids, names, train_fraction, generator)
    else:
        fitted = _checked_train(train, n_prompts)
    parts = fitted.nonzero().flatten(), (~fitted).nonzero().flatten()
    counts = ids[parts[0]].bincount(minlength=len(names))
    if not bool(counts.all()):
        raise ValueError(
            f"no prompt of class {names[int(counts.argmin())]!r} is among those to fit on; "
            "give train= other prompts"
        )
    if len(parts[1]) < len(names):
        raise ValueError(
            f"{len(parts[1])} prompt(s) held out are fewer than the {len(names)} classes: hold out "
            "more"
        )
    rows = [
        torch.stack([ids[part], *(_shuffled(ids[part], generator) for _ in range(n_shuffles))])
        for part in parts
    ]
    return LabelSplit(tuple(names), *parts, *rows)


def read_labels(labels: Any, n_prompts: int) -> list[Label]:
    """Labels as Python's own values.

    Raises:
        ValueError: There is another number of them, or one is no label.
    """
    listed = labels.tolist() if hasattr(labels, "tolist") else labels
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise ValueError(f"labels must be a list, one for each prompt, got {shortened(labels)}")
    if len(listed) != n_prompts:
        raise ValueError(f"got {n_prompts} prompts but {len(listed)} labels")
    read: list[Label] = []
    for i, label in enumerate(listed):
        label = label.item() if hasattr(label, "item") else label
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if not isinstance(label, str | int):
            what = "NaN" if isinstance(label, float) and math.isnan(label) else shortened(label)
            raise ValueError(
                f"label {i} is {what}, expected text, an integer or a boolean: leave prompts "
                "without a label out, and cut numbers into classes"
            )
        read.append(label)
    kinds = {type(label) for label in read}
    if len(kinds) > 1:
        shown = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"labels mixes {shown}: give labels of one kind")
    return read


def check_fit(fit: str, ridge: float, train_fraction: float) -> None:
    """Raise for options of a fit that are out of range.

    Raises:
        ValueError: The message names the option.
    """
    if fit not in ("ridge", "logistic"):
        raise ValueError(f"fit must be 'ridge' or 'logistic', got {fit!r}")
    if not 0 < ridge < math.inf:
        raise ValueError(f"ridge must be positive, got {ridge}")
    if not 0 < train_fraction < 1:
        raise ValueError(f"train_fraction must be between 0 and 1, got {train_fraction}")


def _in_order(names: set[Label]) -> list[Label]:
    return sorted(names, key=lambda name: (0, name) if not isinstance(name, str) else (1, name))  # pyright: ignore[reportReturnType]  # of one kind


def _drawn(
    ids: Tensor, names: Sequence[Label], train_fraction: float, generator: torch.Generator
) -> Tensor:
    """True for a share of each class."""
    counts = Counter(ids.tolist())
    single = [names[i] for i, n in counts.items() if n < 2]
    if single:
        raise ValueError(
            f"class {single[0]!r} has a single prompt, which cannot be both fitted and tested on: "
            "give more of it, or leave it out"
        )
    fitted = torch.zeros(len(ids), dtype=torch.bool)
    for i in range(len(names)):
        members = (ids == i).nonzero().flatten()
        n = min(max(round(train_fraction * len(members)), 1), len(members) - 1)
        fitted[members[torch.randperm(len(members), generator=generator)[:n]]] = True
    return fitted


def _checked_train(train: Any, n_prompts: int) -> Tensor:
    fitted = torch.as_tensor(train)
    if fitted.dtype != torch.bool or tuple(fitted.shape) != (n_prompts,):
        raise ValueError(
            f"train must be one boolean for each of {n_prompts} prompts, got {fitted.dtype} of "
            f"shape {list(fitted.shape)}"
        )
    return fitted.cpu()


def _shuffled(ids: Tensor, generator: torch.Generator) -> Tensor:
    return ids[torch.randperm(len(ids), generator=generator)]
