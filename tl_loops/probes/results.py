"""What results over iterations and layers share: their rows as a table, and their file."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from jaxtyping import Float
from torch import Tensor

from tl_loops.runs.storage import load_artefact, save_artefact

if TYPE_CHECKING:
    import pandas

Result = TypeVar("Result")


def frame_by_place(
    result: Any, columns: Mapping[str, Float[Tensor, "iteration layer"]]
) -> "pandas.DataFrame":
    """One row per iteration and layer: its label and numbers, then the columns.

    Args:
        result: Has ``points``, ``iterations`` and ``layers``.
        columns: Values by name.
    """
    import pandas

    places = [(t, layer) for t in result.iterations for layer in result.layers]
    return pandas.DataFrame(
        {
            "point": result.points,
            "iteration": [t for t, _ in places],
            "layer": [layer for _, layer in places],
            **{name: values.flatten().tolist() for name, values in columns.items()},
        }
    )


def save_result(
    result: Any, path: str | os.PathLike[str], kind: str, tensors: Sequence[str]
) -> None:
    """Write the fields of a dataclass to a safetensors file, whole or not at all.

    Args:
        result: The dataclass.
        path: The file.
        kind: What the file says that it holds.
        tensors: The fields that are tensors; the others go into the metadata.
    """
    fields = vars(result)
    held = {name: fields[name] for name in tensors}
    metadata = {name: value for name, value in fields.items() if name not in tensors}
    save_artefact(os.fspath(path), kind, held, metadata)


def load_result(
    cls: type[Result], path: str | os.PathLike[str], kind: str, tensors: Sequence[str]
) -> Result:
    """Read what :func:`save_result` wrote; JSON's lists are the tuples that they were.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or holds something else.
    """
    held, metadata = load_artefact(os.fspath(path), kind, tensors)
    others = {n: tuple(v) if isinstance(v, list) else v for n, v in metadata.items()}
    return cls(**{name: held[name] for name in tensors}, **others)
