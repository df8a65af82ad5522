"""Turn ``:func:`name``` in docstrings into links of the reference."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|data|attr|exc|mod):`(~?)([\w.]+)`")
LOGGER = griffe.get_logger("sphinx_roles")


class SphinxRoles(griffe.Extension):
    """Docstrings keep the roles that Python tools know; the site shows links."""

    def on_package(self, *, pkg: griffe.Module, loader: Any, **kwargs: Any) -> None:
        """Rewrite every docstring of a package, once all of its names are known."""
        self._rewrite(pkg, pkg)

    def _rewrite(self, obj: griffe.Object, package: griffe.Module) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(
                lambda match: _link(obj, package, *match.groups()), obj.docstring.value
            )
        for member in obj.members.values():
            if not member.is_alias:
                self._rewrite(member, package)  # type: ignore[arg-type]


def _link(obj: griffe.Object, package: griffe.Module, short: str, name: str) -> str:
    shown = name.rsplit(".", 1)[-1] if short or name.startswith(f"{package.name}.") else name
    target = _find(obj, package, name)
    if target is None:
        LOGGER.warning("%s: the docstring refers to %r, which is unknown", obj.path, name)
        return f"`{shown}`"
    # Optional: what a private module defines has no page, and is shown as code.
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'


def _find(obj: griffe.Object, package: griffe.Module, name: str) -> str | None:
    """The path of what a docstring calls by a full or a relative name."""
    first, *rest = name.split(".")
    if first == package.name:
        return _member(package, rest)
    scope: griffe.Object | None = obj
    while scope is not None:
        found = _member(scope, [first, *rest])
        if found is not None:
            return found
        scope = scope.parent
    return None


def _member(obj: griffe.Object, names: list[str]) -> str | None:
    found: Any = obj
    try:
        for name in names:
            found = found.all_members[name]
        return found.canonical_path
    except (KeyError, griffe.AliasResolutionError):
        return None
