"""Code path: the modules whose text decides what a cell computes, and a digest of them.

The path of a cell starts at its family's and its model's module, follows what they import, and
takes in the layer that holds the tensors and the loader that fills it. Command line, reports and
tests are not part of it: a change there leaves evidence fresh. Neither do docstrings, comments and
blank lines count. Sources are read, never imported.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).parent
ENDS = ("layers", "load", "placement")
"""Modules that belong to every path, without what they import."""
FOLLOWED = ("families", "kernels", "models", "formats", "scheme", "svdq_packing")
"""Modules and packages that are followed; what else is imported does not compute."""


@lru_cache(maxsize=256)
def digest_code(family: str, model: str) -> str:
    """`sha256:...` of the code path of a family on a model."""
    digest = hashlib.sha256()
    for module in list_modules(family, model):
        digest.update(f"{module}\n{read_statements(module)}".encode())
    return f"sha256:{digest.hexdigest()}"


@lru_cache(maxsize=256)
def list_modules(family: str, model: str) -> tuple[str, ...]:
    """Modules of a code path by their names below the package, sorted."""
    pending = [f"families.{family.replace('-', '_')}", f"models.{model.replace('-', '_')}"]
    found = set(ENDS)
    while pending:
        module = pending.pop()
        if module not in found and find_file(module).is_file():
            found.add(module)
            pending += list_imports(module)
    return tuple(sorted(found))


def find_file(module: str) -> Path:
    """The file of a module, which need not be there."""
    path = PACKAGE / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@lru_cache(maxsize=256)
def list_imports(module: str) -> tuple[str, ...]:
    """Followed modules that a module imports, at import time or inside functions."""
    found = []
    for node in walk_code(ast.parse(find_file(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quantmatrix"):
            base = (node.module or "").removeprefix("quantmatrix").lstrip(".")
            names = [".".join(filter(None, (base, alias.name))) for alias in node.names]
            found += [name for name in (base, *names) if name.split(".")[0] in FOLLOWED]
    return tuple(name for name in dict.fromkeys(found) if find_file(name).is_file())


def walk_code(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a module, imports for type checkers left out."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from walk_code(node)


@lru_cache(maxsize=256)
def read_statements(module: str) -> str:
    """A module's text without docstrings, comment lines and blank lines."""
    text = find_file(module).read_text(encoding="utf-8")
    told: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            told.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    kept = [line.rstrip() for number, line in lines if number not in told]
    return "\n".join(line for line in kept if line and not line.lstrip().startswith("#"))
