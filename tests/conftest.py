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


@pytest.fixture(autouse=True)
def deterministic():
    """No test depends on the order of the others through torch's default generator."""
    torch.manual_seed(0)
