"""Source modules: a package's files, parsed: which names each defines, and what its imports mean."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from quantmatrix.errors import QuantmatrixError

PACKAGE = "quantmatrix"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SCOPES = (*FUNCTIONS, ast.ClassDef)
LEAVES = (ast.Name, ast.Constant)


class CodeError(QuantmatrixError):
    """A file of the package that cannot be read as code, or a name in it that means nothing."""


class UnknownValueError(Exception):
    """An expression whose value is not plain to see."""


class Definition(NamedTuple):
    """A definition by its address: module below the package (`kernels.linear_fp8`), and name."""

    module: str
    name: str


@dataclass(frozen=True)
class Outside:
    """Something of another package, by its dotted name."""

    name: str


@dataclass(frozen=True)
class Submodule:
    """A module of this package."""

    module: str


Meaning = Definition | Outside | Submodule
Piece = str | Definition


@dataclass
class Module:
    """A parsed file: what it defines and what its imports mean."""

    name: str
    path: Path
    tree: ast.Module
    bound: dict[str, list[ast.stmt]] = field(default_factory=dict)
    """Top-level statements that define (or change) a name."""
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name to (module, name in it or nothing), as written."""
    effects: list[ast.stmt] = field(default_factory=list)
    """Top-level statements that define nothing: they count for every definition of the file."""

    def __post_init__(self) -> None:
        """Sort the statements."""
        for statement in self.tree.body:
            self._take(statement)

    def _take(self, statement: ast.stmt) -> None:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            self.imports |= read_import(statement, self.name, self.path.name == "__init__.py")
            return
        if is_docstring(statement) or is_entry(statement):
            return
        if isinstance(statement, ast.If) and is_for_types(statement):
            for other in statement.orelse:
                self._take(other)
            return
        names = [name for name in list_bound([statement]) if name not in self.imports]
        if not names and (root := find_root(statement)) in self.bound:
            names = [root]
        for name in names:
            self.bound.setdefault(name, []).append(statement)
        if not names:
            self.effects.append(statement)


def read_import(
    node: ast.Import | ast.ImportFrom, module: str, is_package: bool
) -> dict[str, tuple[str, str]]:
    """What the names of an import statement in a module mean: (module, name in it or nothing)."""
    if isinstance(node, ast.Import):
        return {
            alias.asname or alias.name.split(".")[0]: (
                alias.name if alias.asname else alias.name.split(".")[0],
                "",
            )
            for alias in node.names
        }
    base = node.module or ""
    if node.level:
        parts = [PACKAGE, *filter(None, module.split("."))]
        above = parts[: len(parts) - node.level + is_package]
        base = ".".join([*above, *filter(None, [base])])
    return {alias.asname or alias.name: (base, alias.name) for alias in node.names}


def is_docstring(node: ast.AST) -> bool:
    """Whether a statement is a text or `...` alone, or `pass`."""
    lone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return lone or isinstance(node, ast.Pass)


def is_entry(node: ast.stmt) -> bool:
    """`if __name__ == "__main__":`, which an import does not run."""
    return isinstance(node, ast.If) and mentions(node.test, "__name__")


def is_for_types(node: ast.If) -> bool:
    """`if TYPE_CHECKING:`, which a run never enters."""
    return mentions(node.test, "TYPE_CHECKING")


def mentions(node: ast.expr, name: str) -> bool:
    """Whether a name, or an attribute of it, stands in an expression."""
    return any(name in (getattr(n, "id", ""), getattr(n, "attr", "")) for n in ast.walk(node))


def find_root(node: ast.stmt) -> str:
    """The name that `NAME.append(...)`, `NAME[...] = ...` or `NAME.x = ...` changes, or nothing."""
    target: Any = node.targets[0] if isinstance(node, ast.Assign) else None
    if isinstance(node, (ast.Expr, ast.AugAssign)):
        target = node.value if isinstance(node, ast.Expr) else node.target
    while isinstance(target, (ast.Attribute, ast.Subscript, ast.Call)):
        target = target.func if isinstance(target, ast.Call) else target.value
    return target.id if isinstance(target, ast.Name) else ""


def list_bound(body: Iterable[ast.AST]) -> list[str]:
    """Names that statements bind in their own scope, imports left out, in order."""
    return list_bound_by(walk_scope(body))


def list_bound_by(nodes: Iterable[ast.AST]) -> list[str]:
    """Names that nodes of one scope bind, imports left out, in order."""
    found: dict[str, None] = {}
    for node in nodes:
        if isinstance(node, ast.Name):
            if not isinstance(node.ctx, ast.Load):
                found[node.id] = None
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or (
            isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name
        ):
            found[str(node.name)] = None
        elif isinstance(node, ast.MatchMapping) and node.rest:
            found[node.rest] = None
    return list(found)


def walk_scope(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Nodes of one scope; of an inner scope only the node itself, and what `:=` binds here.

    Leaves that say how a node is used (`Load()`, `Add()`), which bind nothing, are left out.
    """
    pending = list(body)[::-1]
    while pending:
        node = pending.pop()
        yield node
        kind = type(node)
        if kind in COMPREHENSIONS:
            pending += [n.target for n in ast.walk(node) if isinstance(n, ast.NamedExpr)]
        elif kind not in SCOPES and kind not in LEAVES:
            pending += list_children(node)[::-1]


def list_children(node: ast.AST) -> list[ast.AST]:
    """The nodes that a node consists of, in order, those without fields left out."""
    found: list[ast.AST] = []
    for name in node._fields:
        value = getattr(node, name, None)
        if type(value) is list:
            found += [item for item in value if isinstance(item, ast.AST)]
        elif isinstance(value, ast.AST) and value._fields:
            found.append(value)
    return found


@lru_cache(maxsize=1024)
def parse(text: str) -> ast.Module:
    """The syntax tree of a file: two revisions of a package have most of them in common."""
    return ast.parse(text)


def pick_value(node: ast.Assign, name: str) -> ast.expr:
    """The value that one name of an assignment gets; UnknownValueError where it is a part of one."""
    for target in node.targets:
        if isinstance(target, ast.Name) and target.id == name:
            return node.value
        if not (isinstance(target, (ast.Tuple, ast.List)) and isinstance(node.value, ast.Tuple)):
            continue
        if not any(isinstance(e, ast.Starred) for e in (*target.elts, *node.value.elts)):
            for own, value in zip(target.elts, node.value.elts, strict=True):
                if isinstance(own, ast.Name) and own.id == name:
                    return value
    raise UnknownValueError(name)
