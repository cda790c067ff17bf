"""Kernel tables: what the tables of the ops say, read from their source.

`KERNELS` and `ORDER` of an op's module are taken apart by backend and architecture, so that a cell
depends on its own entries alone. Names, tuples, tables and `dict.fromkeys` are followed; where an
entry is made otherwise it counts for every backend that no other entry has.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cached_property

from quantmatrix.proof.definitions import Package
from quantmatrix.proof.normal_form import Normaliser
from quantmatrix.proof.source_modules import PACKAGE, Definition, Outside, Piece, UnknownValueError

KERNEL = ("op", "backend", "numerics", "needs")
"""First arguments of a `Kernel`."""
Placed = tuple[str, ast.expr]
"""An expression and the module that its names belong to."""


class KernelTables:
    """The tables of the ops of a package."""

    def __init__(self, package: Package) -> None:
        """Nothing is read yet."""
        self.package = package
        self._kernels: dict[str, dict[str, list[Placed]]] = {}
        self._rules: dict[str, set[str]] = {}

    @cached_property
    def ops(self) -> dict[str, str]:
        """The module of each op, below the package."""
        found = self.package.evaluate(*self.package.open_constant("kernels", "OPS"))
        return {op: module.removeprefix(f"{PACKAGE}.") for op, module in found.items()}

    def digest_nodes(self, nodes: Iterable[Placed]) -> str:
        """sha256 of expressions, each with its module."""
        pieces: list[Piece] = []
        for module, node in nodes:
            writer = Normaliser(self.package, Definition(module, ""))
            writer.visit(node)
            pieces += writer.out
        return self.package.digest_pieces(pieces)

    def find_kernels(self, op: str) -> dict[str, list[Placed]]:
        """Entries of an op's KERNELS by backend; those whose backend is not plain to see under ''."""
        if op not in self._kernels:
            module, table = self.package.open_constant(self.ops[op], "KERNELS")
            found: dict[str, list[Placed]] = {}
            for node in getattr(table, "elts", [table]):
                try:
                    backend = self.package.evaluate(*self.find_argument((module, node), "backend"))
                except UnknownValueError:
                    backend = ""
                found.setdefault(backend, []).append((module, node))
            self._kernels[op] = found
        return self._kernels[op]

    def find_argument(self, placed: Placed, name: str) -> Placed:
        """An argument of a `Kernel(...)`, of `replace(KERNEL, ...)` or of what a name stands for.

        Raises UnknownValueError where it is not given, or the name stands for nothing.
        """
        module, node = placed
        if isinstance(node, (ast.Name, ast.Attribute)):
            return self.find_argument(self.follow(placed), name)
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == name:
                    return module, keyword.value
            if self.is_replace(placed):
                return self.find_argument((module, node.args[0]), name)
            index = KERNEL.index(name)
            if index < len(node.args):
                return module, node.args[index]
        raise UnknownValueError(name)

    def follow(self, placed: Placed) -> Placed:
        """The expression that a name stands for, with its module.

        Raises UnknownValueError for a name that stands for no definition of the package.
        """
        meaning = self.package.find_meaning(*placed)
        if not isinstance(meaning, Definition):
            raise UnknownValueError(ast.unparse(placed[1]))
        return meaning.module, self.package.value_of(meaning)

    def is_replace(self, placed: Placed) -> bool:
        """Whether an expression is a `dataclasses.replace(X, ...)`."""
        module, node = placed
        called = (
            self.package.find_meaning(module, node.func) if isinstance(node, ast.Call) else None
        )
        return called == Outside("dataclasses.replace")

    def list_needs(self, nodes: Iterable[Placed]) -> Iterator[Placed]:
        """The needs of kernels' entries; of entries made in a loop what it goes through, and the whole
        entry where they are not plain to see."""
        for module, node in nodes:
            loop = node.value if isinstance(node, ast.Starred) else None
            if isinstance(loop, (ast.GeneratorExp, ast.ListComp)):
                yield from ((module, part.iter) for part in loop.generators)
                continue
            try:
                yield self.find_argument((module, node), "needs")
            except UnknownValueError:
                yield module, node

    def find_rules(self, op: str) -> set[str]:
        """The rules by which kernels of an op refuse, among the other texts of their needs."""
        if op not in self._rules:
            nodes = [placed for entries in self.find_kernels(op).values() for placed in entries]
            pending, seen = list(self.list_needs(nodes)), set[Placed]()
            found: set[str] = set()
            while pending:
                module, part = placed = pending.pop()
                if placed in seen:
                    continue
                seen.add(placed)
                for node in ast.walk(part):
                    if isinstance(node, ast.Constant) and isinstance(node.value, str):
                        found.add(node.value)
                    elif isinstance(node, (ast.Name, ast.Attribute)):
                        with suppress(UnknownValueError):
                            pending.append(self.follow((module, node)))
            self._rules[op] = found
        return self._rules[op]

    def find_order(self, op: str, arch: str, vendor: str) -> tuple[str, ...] | Definition:
        """The backends that are tried on a machine; the whole ORDER where it cannot be read."""
        try:
            table = self.package.evaluate(*self.package.open_constant(self.ops[op], "ORDER"))
        except UnknownValueError:
            return Definition(self.ops[op], "ORDER")
        return next((table[key] for key in (arch, vendor, "*") if key in table), ())

    def find_schemes(self, definition: Definition) -> Iterator[tuple[str, str]]:
        """(name, op) of every `Scheme(op, name, ...)` and `replace(SCHEME, name=...)` in one."""
        statements = self.package.list_statements(definition)
        for node in (n for statement in statements for n in ast.walk(statement)):
            if not isinstance(node, ast.Call):
                continue
            try:
                name, op = (
                    self._find_text((definition.module, node), key) for key in ("name", "op")
                )
            except UnknownValueError:
                continue
            if isinstance(op, str) and op in self.ops:  # any call with two arguments gets here
                yield name, op

    def _find_text(self, placed: Placed, key: str) -> str:
        module, node = placed
        if not isinstance(node, ast.Call):
            return self._find_text(self.follow(placed), key)
        given = [keyword.value for keyword in node.keywords if keyword.arg == key]
        if not given and self.is_replace(placed):
            return self._find_text((module, node.args[0]), key)
        given += node.args[("op", "name").index(key) :]
        if not given:
            raise UnknownValueError(key)
        text: str = self.package.evaluate(module, given[0])
        return text
