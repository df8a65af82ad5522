"""Profiles as Parquet, CSV or JSON: the same rows in each, and where they come from.

Parquet and CSV say in every row what was measured, so that tables of several models can be
concatenated; JSON says it once.
"""

import csv
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tl_loops.layout.layout import LoopLayout
from tl_loops.measurements.profile import LoopProfile, Provenance
from tl_loops.measurements.table import COLUMNS, Row, table_rows
from tl_loops.runs.moments import Moments
from tl_loops.runs.storage import write_whole

_FORMAT = "tl_loops profile 1"
_SIZES = ("n_prelude", "n_core", "n_coda")
_SHARED = "(shared)"
"""Behind the names of stacks: they are the same layers. No stack can be called so."""

_TEXT = ("metric", "phase", "model", "weights", "notation", "tl_loops", "options", "stacks")
_REAL = ("relative_depth", "mean", "std", "m2")
_MODEL = (
    "model",
    "weights",
    "notation",
    "n_iterations",
    *_SIZES,
    "stacks",
    "n_layers",
    "n_prompts",
    "n_tokens",
    "tl_loops",
)
"""What is one for the whole profile."""


def save_profile(profile: LoopProfile, path: str | os.PathLike[str]) -> None:
    """Write a profile by the ending of the path; see :meth:`LoopProfile.save`."""
    encode, _ = _codec(path)
    write_whole(path, encode(_header(profile), _rows(profile), profile.provenance.options))


def load_profile(path: str | os.PathLike[str]) -> LoopProfile:
    """Read a profile by the ending of the path; see :meth:`LoopProfile.load`."""
    _, decode = _codec(path)
    content = Path(path).read_bytes()
    try:
        return _profile(*decode(content))
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{path} holds no whole profile of tl_loops: {error}") from error


def check_file_ending(path: str | os.PathLike[str]) -> None:
    """Refuse, before anything is measured, a file that a profile could not be written to.

    Args:
        path: Ends in ``.parquet``, ``.csv`` or ``.json``.

    Raises:
        ValueError: Another ending.
        ImportError: pyarrow, which Parquet needs, is missing.
    """
    encode, _ = _codec(path)
    if encode is _to_parquet:
        _pyarrow()


def _codec(path: str | os.PathLike[str]) -> tuple[Callable[..., bytes], Callable]:
    codecs = {
        ".parquet": (_to_parquet, _from_parquet),
        ".csv": (_to_csv, _from_csv),
        ".json": (_to_json, _from_json),
    }
    ending = Path(path).suffix.lower()
    if ending not in codecs:
        raise ValueError(f"{path} ends in {ending!r}, expected {', '.join(codecs)}")
    return codecs[ending]


def _header(profile: LoopProfile) -> Row:
    values = asdict(profile.provenance)
    at = profile.layout
    sizes = {name: None if at is None else getattr(at, name) for name in _SIZES}
    stacks = None
    if at is not None and at.stacks is not None:
        stacks = " ".join((*at.stacks, _SHARED) if at.shared_stacks else at.stacks)
    values |= {**sizes, "stacks": stacks, "n_layers": profile.n_layers}
    return {name: values[name] for name in _MODEL}


def _rows(profile: LoopProfile) -> list[Row]:
    """The rows of the table with the squared deviations, from which merging starts."""
    m2 = {name: moments.m2.tolist() for name, moments in profile.moments.items()}
    return [{**row, "m2": m2[row["metric"]][row["block"]]} for row in table_rows(profile)]


def _profile(header: Row, rows: list[Row], options: dict[str, Any]) -> LoopProfile:
    n_layers = int(header["n_layers"])
    layout = None
    if header["n_core"] is not None:
        words = [] if header["stacks"] is None else header["stacks"].split(" ")
        stacks = tuple(word for word in words if word != _SHARED) or None
        sizes = {name: int(header[name]) for name in (*_SIZES, "n_iterations")}
        layout = LoopLayout(**sizes, stacks=stacks, shared_stacks=_SHARED in words)
    moments = {name: Moments.empty(n_layers) for name in options}
    for row in rows:
        one, block = moments[row["metric"]], int(row["block"])
        one.count[block], one.undefined[block] = int(row["count"]), int(row["undefined"])
        one.mean[block] = math.nan if row["mean"] is None else float(row["mean"])
        one.m2[block] = float(row["m2"])
    kept = {name: header[name] for name in Provenance.__dataclass_fields__ if name != "options"}
    if any(not torch.any(m.count + m.undefined) for m in moments.values()):
        raise ValueError("a metric has no row")
    return LoopProfile(moments, layout, Provenance(**kept, options=options))


# JSON.


def _to_json(header: Row, rows: list[Row], options: dict[str, Any]) -> bytes:
    content = {"format": _FORMAT, **header, "options": options, "rows": rows}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode()


def _from_json(content: bytes) -> tuple[Row, list[Row], dict[str, Any]]:
    whole = json.loads(content)
    if not isinstance(whole, dict) or whole.get("format") != _FORMAT:
        raise ValueError(f"its format is not {_FORMAT!r}")
    return {name: whole[name] for name in _MODEL}, whole["rows"], whole["options"]


# Tables.


def _table(header: Row, rows: list[Row], options: dict[str, Any]) -> list[Row]:
    written = {metric: json.dumps(value, sort_keys=True) for metric, value in options.items()}
    return [{**row, "options": written[row["metric"]], **header} for row in rows]


def _untable(rows: list[Row]) -> tuple[Row, list[Row], dict[str, Any]]:
    if not rows:
        raise ValueError("it has no row")
    missing = [name for name in (*COLUMNS, "m2", "options", *_MODEL) if name not in rows[0]]
    if missing:
        raise ValueError(f"it lacks the column(s) {', '.join(missing)}")
    headers = {tuple(row[name] for name in _MODEL) for row in rows}
    if len(headers) > 1:
        raise ValueError(f"its rows come from {len(headers)} profiles, expected one")
    header = {name: rows[0][name] for name in _MODEL}
    return header, rows, {row["metric"]: json.loads(row["options"]) for row in rows}


def _to_csv(header: Row, rows: list[Row], options: dict[str, Any]) -> bytes:
    table = _table(header, rows, options)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)  # floats by repr, which reads back exactly; None as an empty cell
    return text.getvalue().encode()


def _from_csv(content: bytes) -> tuple[Row, list[Row], dict[str, Any]]:
    def value(name: str, cell: str) -> Any:
        if cell == "":
            return None
        return cell if name in _TEXT else float(cell) if name in _REAL else int(cell)

    table = csv.DictReader(io.StringIO(content.decode(), newline=""))
    return _untable([{name: value(name, cell) for name, cell in row.items()} for row in table])


def _to_parquet(header: Row, rows: list[Row], options: dict[str, Any]) -> bytes:
    pyarrow, parquet = _pyarrow()
    table = _table(header, rows, options)
    kinds = {**dict.fromkeys(_TEXT, pyarrow.string()), **dict.fromkeys(_REAL, pyarrow.float64())}
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.int64())) for name in table[0]])
    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(table, schema), stream)
    return stream.getvalue()


def _from_parquet(content: bytes) -> tuple[Row, list[Row], dict[str, Any]]:
    _, parquet = _pyarrow()
    return _untable(parquet.read_table(io.BytesIO(content)).to_pylist())


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "Parquet needs pyarrow: pip install 'tl-loops[parquet]', or use .csv or .json"
        ) from error
    return pyarrow, pyarrow.parquet
