"""The exceptions that tl_loops raises on purpose, and the names that a message suggests."""

import difflib
from collections.abc import Iterable
from typing import Any


class LoopedSemanticsError(NotImplementedError):
    """A tool has no exact meaning on this looped model; the message says what to call instead."""


class ConfigError(ValueError):
    """A configuration contradicts itself, lacks a field, or asks for what is not supported."""


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded exactly; the message names file, key, expected and found."""


class NoLoopError(TypeError, ValueError):
    """What was asked for needs a loop, and the model has none."""


class ArgumentError(TypeError, ValueError):
    """An argument is of a kind that the function does not take; the message says which it takes."""


class UnknownModelError(ValueError):
    """A model name is neither a known looped model nor a local checkpoint directory."""


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """Up to three known names that resemble an unknown one; letters' case does not matter."""
    by_lower = {other.lower(): other for other in known}
    return [by_lower[n] for n in difflib.get_close_matches(name.lower(), by_lower, 3, 0.5)]


def did_you_mean(
    name: str, known: Iterable[str], otherwise: str | None = None, quoted: bool = False
) -> str:
    """The end of a message about an unknown name: near matches, or what is known.

    Args:
        name: What was given.
        known: The names that exist.
        otherwise: Said where nothing is near; ``None``: all known names.
        quoted: Whether the near matches stand in quotes.

    Returns:
        ``"did you mean resid_pre, resid_post?"`` or ``"known: resid_pre, ..."``.
    """
    names = list(known)
    near = near_names(name, names)
    if near:
        return f"did you mean {', '.join(map(repr, near) if quoted else near)}?"
    return f"known: {', '.join(names) or 'none'}" if otherwise is None else otherwise


def shortened(value: Any, most: int = 80) -> str:
    """``repr`` of a value of unknown size, for a message."""
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # Python prints no integers of thousands of digits
        return f"<a huge {type(value).__name__}>"
    shown = shown.encode("utf-8", "backslashreplace").decode("utf-8")
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def first_line(error: BaseException) -> str:
    """What an error of another library says, without its further lines."""
    return (str(error).strip().splitlines() or [""])[0]
