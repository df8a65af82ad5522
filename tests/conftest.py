"""Settings of the whole test run: which files belong together, and what is checked at run time."""

import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.type_checks import check_annotations

# Workers share the cores, and so do the processes that they start; more threads slow all of them.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile(
    "repository", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repository")

FILES = {
    # With both lines of TransformerLens: those that touch what differs.
    "both_lines": """
        test_both_lines test_bridge test_cache test_cli test_doc_examples test_figures_page
        test_fixtures test_guarantees test_guards test_hooks test_inherited test_looping_bridges
        test_looping_own_blocks test_measure test_neighbours test_patching test_registration
        test_splicing test_upstream_tools
    """.split(),
    # With the inner rooms checked too: those that run every mechanism and every kind of layout.
    "inner": """
        test_fixtures test_forward test_hrm_text test_initial_state test_kv_sharing test_layout
        test_looping test_mechanisms test_names test_readout test_two_stacks
    """.split(),
}
"""Files of tests, by the marker that their tests get; ``-m MARKER`` collects no others."""

INNER = ("config", "layout", "mechanisms", "nn")
"""Rooms that each block of each forward pass calls: checks of their arguments cost most. A config
checks its fields itself, and these errors are what its tests read."""


def pytest_addoption(parser):
    parser.addoption(
        "--check-types",
        choices=["outer", "all"],
        help="check arguments and results of functions while they run, in all rooms but the inner "
        "ones (config, layout, mechanisms, nn), or in all",
    )


def pytest_configure(config):
    # Workers are told the width of the terminal; commands are tried as in a pipe, which has none.
    os.environ.pop("COLUMNS", None)
    checked = config.getoption("--check-types")
    starts_workers = bool(getattr(config.option, "numprocesses", None))  # and runs no test itself
    if checked is not None and not starts_workers:
        package = Path(__file__).parents[1] / "tl_loops"
        rooms = {path.stem for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
        rooms -= {"__init__", "__pycache__", *(INNER if checked == "outer" else ())}
        check_annotations([f"tl_loops.{room}" for room in sorted(rooms)], checked)


def pytest_ignore_collect(collection_path, config):
    files = FILES.get(config.getoption("markexpr"))
    is_test = collection_path.suffix == ".py" and collection_path.stem.startswith("test_")
    return True if files is not None and is_test and collection_path.stem not in files else None


def pytest_collection_modifyitems(items):
    for item in items:
        for marker, files in FILES.items():
            if item.path.stem in files:
                item.add_marker(marker)


def pytest_collection_finish():
    """What is imported and collected stays until the end: no collection looks through it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def deterministic():
    """No test depends on the order of the others through torch's default generator."""
    torch.manual_seed(0)
