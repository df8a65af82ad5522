"""What tells whether a saved profile is whole: the number of its rows, and a checksum of them."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from tl_loops.layout.layout import LoopLayout
from tl_loops.measurements.registry import MEASUREMENTS
from tl_loops.measurements.table import COLUMNS, Row

SEAL = ("n_rows", "checksum")
"""Fields of a seal."""


def seal(
    header: Row, rows: list[Row], options: Mapping[str, Any], plain: Callable[[str, Any], Any]
) -> Row:
    """The seal of a profile.

    Args:
        header: What is one for the whole profile.
        rows: Its table.
        options: Of each metric.
        plain: Gives the value of a column as every format gives it back.
    """
    content = (
        {name: plain(name, value) for name, value in header.items()},
        [[plain(name, row[name]) for name in (*COLUMNS, "m2")] for row in rows],
        options,
    )
    written = json.dumps(content, sort_keys=True).encode()
    checksum = hashlib.blake2b(written, digest_size=16).hexdigest()
    return dict(zip(SEAL, (len(rows), checksum), strict=True))


def check_seal(found: Row, expected: Row) -> None:
    """Raise for a profile that is not the one that was sealed.

    Args:
        found: The seal that it has.
        expected: The seal of what is there.

    Raises:
        ValueError: Rows are missing or too many, or something else is changed.
    """
    if found["n_rows"] != expected["n_rows"]:
        raise ValueError(f"it has {expected['n_rows']} of its {found['n_rows']} rows")
    if found["checksum"] != expected["checksum"]:
        raise ValueError("its checksum does not fit its content: it is damaged or was edited")


def check_unsealed(rows: list[Row], layout: LoopLayout | None, n_layers: int) -> None:
    """Raise for a profile from before there were seals, as far as it can be judged.

    Args:
        rows: Its table.
        layout: ``None`` for a feedforward model.
        n_layers: Unrolled depth.

    Raises:
        ValueError: A metric of the registry lacks blocks that it always has.
    """
    blocks: dict[str, set[int]] = {}
    for row in rows:
        blocks.setdefault(row["metric"], set()).add(int(row["block"]))
    for name in blocks.keys() & MEASUREMENTS.keys():
        missing = {*MEASUREMENTS[name].blocks(layout, n_layers)} - blocks[name]
        if missing:
            raise ValueError(f"{name} lacks its row(s) at block(s) {sorted(missing)}")
