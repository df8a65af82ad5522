"""Prompts from data sets: a column of a Hugging Face data set or of a local file, or token ids."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tl_loops.errors import did_you_mean, shortened
from tl_loops.tasks.prompts import PromptFileError

_LOCAL = (".parquet", ".json", ".jsonl")
_IDS = ("tokens", "input_ids")


def read_column(
    source: str | Path,
    column: str,
    split: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
) -> list[str] | list[list[int]]:
    """One column of a data set: texts, or lists of token ids.

    Args:
        source: A ``.parquet``, ``.json`` (a list of objects, or one per line) or ``.jsonl`` file;
            or what ``datasets.load_dataset`` takes, a name or a directory, which is streamed. No
            code of a data set is run.
        column: Its name.
        split: Which split of a Hugging Face data set; ``None``: the only one.
        subset: Which configuration of it, such as ``"main"`` of ``openai/gsm8k``.
        limit: How many rows are read; ``None``: all.

    Raises:
        PromptFileError: The source cannot be read, or the column is absent, empty or holds anything
            else; the message names the row.
        ValueError: ``limit`` is below 1, or a local file is given a split or subset.
        ImportError: The library for this source is missing; the message says how to install it.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    path = Path(source)
    if path.suffix.lower() in _LOCAL:
        if split is not None or subset is not None:
            raise ValueError(f"{source} is a file: it has neither splits nor subsets")
        if not path.is_file():
            raise PromptFileError(f"{source}: no such file")
        rows = _parquet(path, column) if path.suffix.lower() == ".parquet" else _json(path)
    else:
        rows = _hugging_face(str(source), split, subset)
    values: list[Any] = []
    for number, row in enumerate(islice(rows, limit)):
        values.append(_value(row, column, f"{source}, row {number}"))
    if not values:
        raise PromptFileError(f"{source}: holds no row")
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        raise PromptFileError(f"{source}: column {column!r} mixes texts and token ids")
    return values


def read_tokens(path: str | Path) -> list[list[int]]:
    """Prompts that are tokenised: JSON lines, each a list of ids, or an object that holds one.

    Args:
        path: Of the file; an object has the list under ``tokens`` or ``input_ids``.

    Raises:
        PromptFileError: The file cannot be read, or a line is not as above; the message names it.
    """
    prompts = []
    for number, entry in enumerate(_json(Path(path)), start=1):
        if isinstance(entry, dict):
            entry = next((entry[name] for name in _IDS if name in entry), entry)
        if not _is_ids(entry):
            raise PromptFileError(
                f"{path}, prompt {number}: expected a list of token ids, got {shortened(entry)}"
            )
        prompts.append(entry)
    if not prompts:
        raise PromptFileError(f"{path}: holds no prompt")
    return prompts


def _value(row: Any, column: str, where: str) -> str | list[int]:
    if not isinstance(row, dict):
        raise PromptFileError(f"{where}: expected an object, got {shortened(row)}")
    if column not in row:
        hint = did_you_mean(column, row, f"it has {', '.join(row) or 'none'}")
        raise PromptFileError(f"{where}: there is no column {column!r}: {hint}")
    value = row[column]
    if (isinstance(value, str) and value.strip()) or _is_ids(value):
        return value
    raise PromptFileError(
        f"{where}: {column!r} must be text or a list of token ids, got {shortened(value)}"
    )


def _is_ids(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(token, int) and not isinstance(token, bool) for token in value)


def _json(path: Path) -> Iterator[Any]:
    """The entries of a list, or of the lines."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise PromptFileError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise PromptFileError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise PromptFileError(f"{path}: {error.strerror}") from None
    whole = _parsed(text) if text.lstrip().startswith("[") else None
    if isinstance(whole, list) and whole and not isinstance(whole[0], int):
        yield from whole  # one list of rows; a list of numbers is the only line
        return
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if line.strip():
            entry = _parsed(line)
            if entry is None:
                raise PromptFileError(f"{path}, line {number}: not JSON")
            yield entry


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # also numbers of thousands of digits
        return None


def _parquet(path: Path, column: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "a Parquet file needs pyarrow: pip install 'tl-loops[parquet]'"
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are among them
        raise PromptFileError(f"{path}: not a Parquet file ({error})") from None
    names = file.schema_arrow.names
    if column not in names:
        hint = did_you_mean(column, names, f"it has {', '.join(names) or 'none'}")
        raise PromptFileError(f"{path}: there is no column {column!r}: {hint}")
    for batch in file.iter_batches(columns=[column]):
        yield from batch.to_pylist()


def _hugging_face(name: str, split: str | None, subset: str | None) -> Iterable[Any]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"{name} is no .parquet, .json or .jsonl file, and a Hugging Face data set needs the "
            "library datasets: pip install 'tl-loops[datasets]'"
        ) from error
    try:
        found: Any = datasets.load_dataset(name, subset, split=split, streaming=True)
    except Exception as error:  # the library raises errors of many kinds
        raise PromptFileError(f"the data set {name} cannot be opened: {error}") from error
    if split is not None:
        return found
    if len(found) != 1:
        raise PromptFileError(f"the data set {name} has the splits {', '.join(found)}: name one")
    return next(iter(found.values()))
