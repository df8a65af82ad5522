"""Settings of the whole test run."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Workers share the cores; more threads than cores slows all of them.
torch.set_num_threads(1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile(
    "repository", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repository")

BOTH_LINES = """
    test_both_lines test_bridge test_cache test_cli test_fixtures test_guarantees test_guards
    test_hooks test_inherited test_measure test_patching test_registration test_upstream_tools
""".split()
"""Files whose tests run with both lines of TransformerLens: those that touch what differs."""


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in BOTH_LINES:
            item.add_marker(pytest.mark.both_lines)


@pytest.fixture(autouse=True)
def deterministic():
    """No test depends on the order of the others through torch's default generator."""
    torch.manual_seed(0)
