"""Annotations that are checked while tests run: shapes by jaxtyping, the rest by beartype alone.

jaxtyping's own wrapper binds the arguments of every call, and has them checked once more with what
the call returns. Here beartype checks each once, within one note of the axes; and within none where
an annotation names no axes, as most do.
"""

import inspect
from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any, Literal, get_args, get_origin

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, install_import_hook

# One name for each set of rooms. jaxtyping keeps byte code by the name, also that of the unchecked
# modules that a checked one imports: with one name the inner rooms would stay unchecked.
OUTER = ALL = beartype

_BY_BEARTYPE = beartype(conf=BeartypeConf(violation_type=TypeCheckError))


def check_annotations(packages: Iterable[str], rooms: str) -> None:
    """From here on, check arguments and results of all functions of packages not yet imported.

    Args:
        packages: Their names.
        rooms: Which these are: ``"outer"`` or ``"all"``.
    """
    install_import_hook(list(packages), f"tests.type_checks.{rooms.upper()}")
    jaxtyping.jaxtyped = partial(_checked, jaxtyping.jaxtyped)  # what the hook calls


def _checked(jaxtyped: Callable, /, *, typechecker: Callable) -> Callable:
    def check(made: Any) -> Any:
        hints = made.__annotations__.values() if inspect.isfunction(made) else ()
        if inspect.isfunction(made) and not any(map(_has_axes, hints)):
            return by_beartype(made)
        # What a generator yields is read in the calls of others, whose axes are not its own.
        if not inspect.isfunction(made) or inspect.isgeneratorfunction(inspect.unwrap(made)):
            return jaxtyped(made, typechecker=typechecker)
        if any(isinstance(hint, str) for hint in hints):
            return jaxtyped(made, typechecker=typechecker)
        checked = _BY_BEARTYPE(made)

        @wraps(made)
        def with_axes(*args: Any, **kwargs: Any) -> Any:
            if jaxtyping.config.jaxtyping_disable:
                return made(*args, **kwargs)
            with jaxtyped("context"):  # in which an axis has one length
                return checked(*args, **kwargs)

        return with_axes

    return check


def by_beartype(function: Callable) -> Callable:
    """Check a function that names no axes, as long as jaxtyping checks the others."""
    checked = _BY_BEARTYPE(function)
    if checked is function:  # its annotations say nothing
        return function

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else checked)(*args, **kwargs)

    return call


def _has_axes(annotation: Any) -> bool:
    """Whether it may name axes; a string is not read."""
    if isinstance(annotation, str):
        return True
    if get_origin(annotation) is Literal:
        return False
    if isinstance(annotation, (list, tuple)):  # arguments of a Callable
        return any(map(_has_axes, annotation))
    named = inspect.isclass(annotation) and issubclass(annotation, AbstractArray)
    return named or any(map(_has_axes, get_args(annotation)))
