"""Which TransformerLens is installed, and whether tl_loops has been tried with it."""

import re
import warnings
from importlib.metadata import version

FIRST_TRIED, LAST_TRIED = (3, 9), (4, 3)
"""The releases, by their first two numbers, between which the test suite has been run."""


def release(text: str) -> tuple[int, int]:
    """The first two numbers of a version.

    Args:
        text: A version such as ``"4.3.0"`` or ``"4.0.0rc1"``.

    Returns:
        For example ``(4, 3)``; numbers that are missing are 0.
    """
    major, minor = (*re.findall(r"\d+", text)[:2], "0", "0")[:2]
    return int(major), int(minor)


INSTALLED = version("transformer-lens")
HAS_HOOKED_TRANSFORMER = release(INSTALLED) < (4, 0)
"""Whether HookedTransformer exists: until 3.9. From 4.0 on TransformerBridge takes its place."""


def warn_if_untried(installed: str = INSTALLED) -> None:
    """Give one warning where the installed TransformerLens lies outside the tried range.

    Args:
        installed: Its version.
    """
    if not FIRST_TRIED <= release(installed) <= LAST_TRIED:
        first, last = (".".join(map(str, tried)) for tried in (FIRST_TRIED, LAST_TRIED))
        warnings.warn(
            f"tl_loops has been tried with TransformerLens {first}.x - {last}.x, but {installed} "
            "is installed: hook names and numbers may differ. Install a tried release, or run "
            "tl_loops's tests.",
            stacklevel=2,
        )
