"""The house: which room may import which, and what no file of the package holds."""

import ast
import re
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "tl_loops"
FLOORS = (
    "argument_axes arguments errors later metrics printing tasks version writing",
    "layout upstream loop_losses",
    "mechanisms cache runs drawing loop_hooks",
    "config lens patching attribution measurements dynamics probes",
    "nn families plots steering training circuits",
    "loading",
    "model report",
    "cli registration public __init__ __main__",
)
"""The rooms of each floor, the lowest first."""

ANALYSES = "runs measurements lens patching attribution dynamics plots steering training".split()
ANALYSES += ["circuits", "probes"]
MODELS = "mechanisms config nn families loading model".split()
"""The two towers: neither imports the other. Both know the cache."""

MOST_LINES = 400
MOST_IGNORED_TYPES = 15

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS, start=1) for room in rooms.split()}
FILES = {path.relative_to(PACKAGE.parent): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def room_of(parts):
    """`tl_loops/lens/read.py` and `tl_loops.lens.read` are in the room `lens`."""
    return Path(parts[1]).stem if len(parts) > 1 else "__init__"


def imports(name, tree):
    """Full names of the modules that a part of a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = name.parts[: -node.level] if node.level else ()
            module = ".".join([*start, *filter(None, [node.module])])
            if module == PACKAGE.name:
                yield from (f"{module}.{alias.name}" for alias in node.names)
            else:
                yield module


@cache
def arrows():
    """Every import of one room by another: the file, its room, the room that it imports."""
    found = []
    for name, tree in TREES.items():
        here = room_of(name.parts)
        for module in imports(name, tree):
            parts = module.split(".")
            if parts[0] == PACKAGE.name:
                # `from tl_loops import LoopedTransformer` is the package itself.
                there = parts[1] if len(parts) > 1 and parts[1] in FLOOR else "__init__"
                if there != here:
                    found.append((name.as_posix(), here, there))
    return found


def test_every_room_has_a_floor():
    assert {room_of(name.parts) for name in FILES} == FLOOR.keys()


def test_arrows_point_down():
    up = {(file, there) for file, here, there in arrows() if FLOOR[there] > FLOOR[here]}
    assert not up, f"imports of a higher floor: {sorted(up)}"


def test_rooms_stand_in_no_circle():
    above = {room: {there for _, here, there in arrows() if here == room} for room in FLOOR}
    while free := [room for room, needs in above.items() if not needs]:
        above = {room: needs - {*free} for room, needs in above.items() if room not in free}
    assert not above, f"rooms that import each other: {above}"


def test_the_two_towers_do_not_import_each_other():
    across = {
        (file, there)
        for file, here, there in arrows()
        if (here in ANALYSES and there in MODELS) or (here in MODELS and there in ANALYSES)
    }
    assert not across, sorted(across)


def test_upstream_alone_imports_transformer_lens():
    found = {
        name.as_posix()
        for name, tree in TREES.items()
        if room_of(name.parts) != "upstream"
        and any(module.split(".")[0] == "transformer_lens" for module in imports(name, tree))
    }
    assert not found, sorted(found)


def test_functions_import_only_libraries():
    """An import of ours in a function hides a circle; a library may be missing, or slow."""
    found = {
        (name.as_posix(), module)
        for name, tree in TREES.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for module in imports(name, function)
        if module.split(".")[0] == PACKAGE.name
    }
    assert not found, sorted(found)


def test_files_are_short():
    n_lines = {
        name.as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for name, path in FILES.items()
    }
    long = {name for name, n in n_lines.items() if n > MOST_LINES}
    assert not long, f"one concept per file, up to {MOST_LINES} lines: {sorted(long)}"


def test_no_method_is_a_stub():
    found = {
        name.as_posix()
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise)
        and node.exc is not None
        and "NotImplementedError" in ast.unparse(node.exc)
    }
    assert not found, f"raise NotImplementedError: {sorted(found)}"


def test_ignored_types_are_few_and_have_a_reason():
    ignored = [
        f"{name.as_posix()}:{number}: {line.strip()}"
        for name, path in FILES.items()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if "type: ignore" in line or "pyright: ignore" in line
    ]
    bare = [
        line
        for line in ignored
        if not re.search(r"# (type|pyright): ignore(\[[\w-]+\])?  # \w", line)
    ]
    assert not bare, "\n".join(["ignored without a reason after it:", *bare])
    assert len(ignored) <= MOST_IGNORED_TYPES, "\n".join(ignored)
