"""The shape of the classes: a newcomer who opens one does not have to open ten others."""

import importlib
import inspect
import pkgutil

import pytest

import tl_loops

MOST = 3
"""Classes of ours among all the ancestors of one."""


def modules():
    for info in pkgutil.walk_packages(tl_loops.__path__, "tl_loops."):
        if not info.name.startswith("tl_loops.upstream."):
            yield info.name


def ours(cls):
    name = cls.__module__
    return name.startswith("tl_loops.") and not name.startswith("tl_loops.upstream")


@pytest.mark.parametrize("name", list(modules()))
def test_no_class_has_more_than_three_of_our_classes_among_its_ancestors(name):
    module = importlib.import_module(name)
    for cls in vars(module).values():
        if inspect.isclass(cls) and cls.__module__ == name:
            ancestors = [parent.__name__ for parent in cls.__mro__[1:] if ours(parent)]
            assert len(ancestors) <= MOST, f"{cls.__name__} stands on {', '.join(ancestors)}"
