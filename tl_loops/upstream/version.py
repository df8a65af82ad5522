"""Which TransformerLens is installed, and whether tl_loops has been tried with it."""

import re
import warnings
from importlib.metadata import version

TRIED = ((3, 9), (4, 3))
"""The releases, by their first two numbers, that the test suite is run with."""


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
    """Give one warning where the installed TransformerLens is not one that has been tried.

    Args:
        installed: Its version.
    """
    if release(installed) not in TRIED:
        tried = " and ".join(f"{major}.{minor}.x" for major, minor in TRIED)
        warnings.warn(
            f"tl_loops has been tried with TransformerLens {tried}, but {installed} is installed: "
            "hook names and numbers may differ. Install a tried release, or run tl_loops's tests.",
            stacklevel=2,
        )
