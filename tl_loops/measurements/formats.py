"""Profiles as Parquet, CSV or JSON: the same rows in each, and where they come from.

Parquet and CSV say in every row what was measured, so that tables of several models can be
concatenated; JSON says it once. A shard is no result yet: its file, which ends in ``.shard``, is
that of a run, with the numbers of each batch.
"""

import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas
import torch

from tl_loops.layout.layout import LoopLayout
from tl_loops.measurements.from_run import Parts, profile_parts
from tl_loops.measurements.provenance import Provenance
from tl_loops.measurements.seal import SEAL, check_seal, check_unsealed, seal
from tl_loops.measurements.table import COLUMNS, Row, table_rows
from tl_loops.runs.batch_file import SavedRun
from tl_loops.runs.merge import read_shard_file
from tl_loops.runs.moments import Moments
from tl_loops.writing import write_whole

if TYPE_CHECKING:  # a profile saves itself by this
    from tl_loops.measurements.profile import LoopProfile

Decoded = tuple[Row, list[Row], dict[str, Any], Row | None]
"""Header, rows, options of each metric, and the seal; files from before seals have none."""

ENDINGS = (".parquet", ".csv", ".json")
"""The endings of a profile's file."""
SHARD = ".shard"
"""The ending of a shard's file."""
_FORMAT = "tl_loops profile 2"
_UNSEALED_FORMAT = "tl_loops profile 1"
_SIZES = ("n_prelude", "n_core", "n_coda")
_SHARED = "(shared)"
_REPEATS = "(repeats)"
"""After the names of stacks: they are the same layers, or a number of times that a call runs its
layers follows. No stack can be called so."""

_TEXT = (
    "metric",
    "phase",
    "model",
    "weights",
    "notation",
    "tl_loops",
    "bos",
    "options",
    "stacks",
    "checksum",
)
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
    "bos",
)
"""What is one for the whole profile."""
_NEW = "bos"
"""What files of version 0.1.0 may lack."""


def save_profile(profile: "LoopProfile", path: str | os.PathLike[str]) -> None:
    """Write a profile by the ending of the path; see :meth:`LoopProfile.save`."""
    if profile.shard is not None:
        if Path(path).suffix.lower() != SHARD:
            raise ValueError(
                f"this profile is shard {profile.shard.shard} of a run, no result: save it as "
                f"{Path(path).with_suffix(SHARD)}, and merge all shards with LoopProfile.merge or "
                "tl-loops merge"
            )
        profile.shard.save(path)
        return
    encode, _ = _codec(path)
    header, rows, options = _header(profile), _rows(profile), profile.provenance.options
    write_whole(path, encode(header, rows, options, seal(header, rows, options, _plain)))


def load_profile(path: str | os.PathLike[str]) -> tuple[Parts, SavedRun | None]:
    """What a profile is made of, and the shard if it is one; see :meth:`LoopProfile.load`."""
    if Path(path).suffix.lower() == SHARD:
        saved = read_shard_file(path)
        return profile_parts(saved), saved
    _, decode = _codec(path)
    content = Path(path).read_bytes()
    try:
        return _profile(*decode(content)), None
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"{path} holds no whole profile of tl_loops: {error}") from error


def check_file_ending(path: str | os.PathLike[str]) -> None:
    """Raise, before anything is measured, for a file that a profile could not be written to.

    Args:
        path: Ends in ``.parquet``, ``.csv`` or ``.json``.

    Raises:
        ValueError: Another ending.
        ImportError: pyarrow, which Parquet needs, is missing.
    """
    encode, _ = _codec(path)
    if encode is _to_parquet:
        _require_pyarrow()


def _codec(path: str | os.PathLike[str]) -> tuple[Callable[..., bytes], Callable]:
    codecs = dict(
        zip(
            ENDINGS,
            ((_to_parquet, _from_parquet), (_to_csv, _from_csv), (_to_json, _from_json)),
            strict=True,
        )
    )
    ending = Path(path).suffix.lower()
    if ending not in codecs:
        raise ValueError(f"{path} ends in {ending!r}, expected {', '.join(codecs)}")
    return codecs[ending]


def _header(profile: "LoopProfile") -> Row:
    values = asdict(profile.provenance)
    at = profile.layout
    sizes = {name: None if at is None else getattr(at, name) for name in _SIZES}
    stacks = None
    if at is not None and at.stacks is not None:
        repeats = (_REPEATS, str(at.layer_repeats)) if at.layer_repeats > 1 else ()
        stacks = " ".join((*at.stacks, *((_SHARED,) if at.shared_stacks else ()), *repeats))
    values |= {**sizes, "stacks": stacks, "n_layers": profile.n_layers}
    return {name: values[name] for name in _MODEL}


def _rows(profile: "LoopProfile") -> list[Row]:
    """The rows of the table with the squared deviations, from which merging starts."""
    m2 = {name: moments.m2.tolist() for name, moments in profile.moments.items()}
    return [{**row, "m2": m2[row["metric"]][row["block"]]} for row in table_rows(profile)]


def _plain(column: str, value: Any) -> Any:
    """A value as text, a float, an integer or ``None``."""
    if value is None or value == "":  # CSV does not tell one from the other
        return None
    kind = str if column in _TEXT else float if column in _REAL else int
    return kind(value)


def _profile(header: Row, rows: list[Row], options: dict[str, Any], sealed: Row | None) -> Parts:
    if sealed is not None:
        check_seal(sealed, seal(header, rows, options, _plain))
    n_layers = int(header["n_layers"])
    layout = None
    if header["n_core"] is not None:
        text, _, repeats = (header["stacks"] or "").partition(f" {_REPEATS} ")
        words = text.split(" ") if text else []
        stacks = tuple(word for word in words if word != _SHARED) or None
        sizes = {name: int(header[name]) for name in (*_SIZES, "n_iterations")}
        shared = _SHARED in words
        layout = LoopLayout(
            **sizes, stacks=stacks, shared_stacks=shared, layer_repeats=int(repeats or 1)
        )
    if sealed is None:
        check_unsealed(rows, layout, n_layers)
    moments = {name: Moments.empty(n_layers) for name in options}
    if len({(row["metric"], int(row["block"])) for row in rows}) != len(rows):
        raise ValueError("a block of a metric has two rows")
    for row in rows:
        one, block = moments[row["metric"]], int(row["block"])
        one.count[block], one.undefined[block] = int(row["count"]), int(row["undefined"])
        one.mean[block] = math.nan if row["mean"] is None else float(row["mean"])
        one.m2[block] = float(row["m2"])
    kept = {name: header[name] for name in Provenance.__dataclass_fields__ if name != "options"}
    if any(not torch.any(m.count + m.undefined) for m in moments.values()):
        raise ValueError("a metric has no row")
    return moments, layout, Provenance(**kept, options=options)


# JSON.


def _to_json(header: Row, rows: list[Row], options: dict[str, Any], sealed: Row) -> bytes:
    content = {"format": _FORMAT, **header, **sealed, "options": options, "rows": rows}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode()


def _from_json(content: bytes) -> Decoded:
    whole = json.loads(content)
    if not isinstance(whole, dict) or whole.get("format") not in (_FORMAT, _UNSEALED_FORMAT):
        raise ValueError(f"its format is not {_FORMAT!r}")
    sealed = None
    if whole["format"] == _FORMAT:
        sealed = {name: whole[name] for name in SEAL}
    header = {name: whole[name] for name in _MODEL if name != _NEW}
    return {**header, _NEW: whole.get(_NEW)}, whole["rows"], whole["options"], sealed


# Tables.


def _table(header: Row, rows: list[Row], options: dict[str, Any], sealed: Row) -> pandas.DataFrame:
    written = {metric: json.dumps(value, sort_keys=True) for metric, value in options.items()}
    table = pandas.DataFrame(
        [{**row, "options": written[row["metric"]], **header, **sealed} for row in rows]
    )
    return table.astype({name: _kind(name) for name in table})


def _kind(column: str) -> str:
    return "string" if column in _TEXT else "float64" if column in _REAL else "Int64"


def _untable(table: pandas.DataFrame) -> Decoded:
    if table.empty:
        raise ValueError("it has no row")
    if _NEW not in table:
        table = table.assign(**{_NEW: None})
    missing = [name for name in (*COLUMNS, "m2", "options", *_MODEL) if name not in table]
    if missing:
        raise ValueError(f"it lacks the column(s) {', '.join(missing)}")
    whole = [*_MODEL, *(name for name in SEAL if name in table)]
    n_profiles = len(table[whole].drop_duplicates())
    if n_profiles > 1:
        raise ValueError(f"its rows come from {n_profiles} profiles, expected one")
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    header = {name: rows[0][name] for name in _MODEL}
    sealed = {name: rows[0][name] for name in SEAL} if whole[len(_MODEL) :] else None
    return header, rows, {row["metric"]: json.loads(row["options"]) for row in rows}, sealed


def _to_csv(header: Row, rows: list[Row], options: dict[str, Any], sealed: Row) -> bytes:
    table = _table(header, rows, options, sealed)
    return table.to_csv(index=False, lineterminator="\n").encode()


def _from_csv(content: bytes) -> Decoded:
    # As text first: every float reads back exactly, and a model may be called "NA".
    text = io.BytesIO(content)
    table = pandas.read_csv(text, dtype="string", keep_default_na=False, na_values=[""])
    return _untable(table.astype({name: _kind(name) for name in table}))


def _to_parquet(header: Row, rows: list[Row], options: dict[str, Any], sealed: Row) -> bytes:
    _require_pyarrow()
    return _table(header, rows, options, sealed).to_parquet(None, index=False, engine="pyarrow")


def _from_parquet(content: bytes) -> Decoded:
    _require_pyarrow()
    return _untable(pandas.read_parquet(io.BytesIO(content), engine="pyarrow"))


def _require_pyarrow() -> None:
    """Say what to do; the message of pandas does not know of the other formats."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Parquet needs pyarrow: pip install 'tl-loops[parquet]', or use .csv or .json"
        ) from error
