"""What results over iterations and layers share: their rows as a table, and their file."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from jaxtyping import Float
from torch import Tensor

from tl_loops.runs.storage import load_artefact, save_artefact

if TYPE_CHECKING:
    import pandas

Result = TypeVar("Result", bound="SavedResult")


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


class SavedResult:
    """A dataclass that has a file; its fields are tensors, what JSON holds, or such dataclasses."""

    _kind: ClassVar[str]
    """What the file says that it holds."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        metadata: dict[str, Any] = {}
        for name, value in _flat(self):
            (tensors if isinstance(value, Tensor) else metadata)[name] = value
        save_artefact(os.fspath(path), self._kind, tensors, metadata)

    @classmethod
    def load(cls: type[Result], path: str | os.PathLike[str]) -> Result:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged or holds something else.
        """
        tensors, metadata = load_artefact(os.fspath(path), cls._kind, _tensor_names(cls))
        # JSON's lists are the tuples that they were.
        others = {n: tuple(v) if isinstance(v, list) else v for n, v in metadata.items()}
        return _made(cls, {**tensors, **others})


def _flat(result: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a dataclass, those of a dataclass in it as ``part.field``."""
    for name, value in vars(result).items():
        if is_dataclass(value):
            yield from ((f"{name}.{inner}", x) for inner, x in _flat(value))
        else:
            yield name, value


def _parts(cls: Any) -> dict[str, Any]:
    """The fields that are dataclasses themselves, and their classes."""
    return {field.name: field.type for field in fields(cls) if is_dataclass(field.type)}


def _tensor_names(cls: Any) -> list[str]:
    own = [field.name for field in fields(cls) if hasattr(field.type, "dim_str")]
    inner = [f"{part}.{name}" for part, of in _parts(cls).items() for name in _tensor_names(of)]
    return own + inner


def _made(cls: type[Result], flat: Mapping[str, Any]) -> Result:
    """The dataclass of such fields."""
    given = {name: value for name, value in flat.items() if "." not in name}
    for part, of in _parts(cls).items():
        start = f"{part}."
        inner = {n.removeprefix(start): x for n, x in flat.items() if n.startswith(start)}
        given[part] = _made(of, inner)
    return cls(**given)
