"""Docstrings and annotations as the reference shows them.

``:func:`name``` becomes a link. What a function returns is a sentence, whose colon does not end a
type. The axes of jaxtyping are words, not arithmetic: ``"iteration *batch"`` is no product.
"""

import ast
import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|data|attr|exc|mod):`(~?)([\w.]+)`")
RETURNED = re.compile(r"^( *Returns:\n +)(.+)$", re.M)
COLON = re.compile(r":(?=\s|$)")
DTYPES = {"Bool", "Complex", "Float", "Int", "Shaped"}
LOGGER = griffe.get_logger("sphinx_roles")


class SphinxRoles(griffe.Extension):
    """Docstrings keep the roles that Python tools know; the site shows links."""

    def on_node(self, *, node: Any, **kwargs: Any) -> None:
        """Keep axes from being read as code: with a space in front they are none."""
        if isinstance(node, (ast.FunctionDef, ast.AnnAssign)):
            for part in ast.walk(node):
                if isinstance(part, ast.Subscript) and getattr(part.value, "id", None) in DTYPES:
                    for axes in ast.walk(part.slice):
                        if isinstance(axes, ast.Constant) and isinstance(axes.value, str):
                            axes.value = f" {axes.value.lstrip()}"

    def on_package(self, *, pkg: griffe.Module, loader: Any, **kwargs: Any) -> None:
        """Rewrite every docstring of a package, once all of its names are known."""
        self._rewrite(pkg, pkg)

    def _rewrite(self, obj: griffe.Object, package: griffe.Module) -> None:
        if obj.docstring is not None:
            linked = ROLE.sub(
                lambda match: _link(obj, package, *match.groups()), obj.docstring.value
            )
            obj.docstring.value = RETURNED.sub(lambda m: m[1] + _sentence(m[2]), linked)
        if isinstance(obj, griffe.Function):
            _tidy(obj.returns)
            for parameter in obj.parameters:
                _tidy(parameter.annotation)
        elif isinstance(obj, griffe.Attribute):
            _tidy(obj.annotation)
        for member in obj.members.values():
            if not member.is_alias:
                self._rewrite(member, package)  # type: ignore[arg-type]


def _sentence(line: str) -> str:
    """A line whose colons, but for those in code, are characters of a text."""
    parts = line.split("`")
    return "`".join([*(COLON.sub("&#58;", p) if i % 2 == 0 else p for i, p in enumerate(parts))])


def _tidy(annotation: Any) -> None:
    """Take the spaces away again that :meth:`SphinxRoles.on_node` has put in front of axes."""
    if not isinstance(annotation, griffe.Expr):
        return
    for name in ("elements", "slice", "left", "right"):
        inner = getattr(annotation, name, None)
        if isinstance(inner, str):
            setattr(annotation, name, _without_space(inner))
        elif isinstance(inner, list):
            setattr(annotation, name, [_without_space(e) for e in inner])
        for part in inner if isinstance(inner, list) else [inner]:
            _tidy(part)


def _without_space(part: Any) -> Any:
    return part[0] + part[2:] if isinstance(part, str) and part[:2] in ("' ", '" ') else part


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
