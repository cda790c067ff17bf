"""Kernel tables: what the tables of the ops say, read from their source.

`KERNELS` and `ORDER` of an op's module are taken apart by backend and architecture, so that a cell
depends on its own entries alone. Names, tuples, tables and `dict.fromkeys` are followed; where an
entry is made otherwise it counts for every backend that no other entry has.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cached_property

from quantmatrix.definitions import Package
from quantmatrix.normal_form import Normaliser
from quantmatrix.source_modules import PACKAGE, Definition, UnknownValueError

KERNEL = ("op", "backend", "numerics", "needs")
"""First arguments of a `Kernel`."""


class KernelTables:
    """The tables of the ops of a package."""

    def __init__(self, package: Package) -> None:
        """Nothing is read yet."""
        self.package = package
        self._kernels: dict[str, dict[str, list[ast.expr]]] = {}
        self._rules: dict[str, set[str]] = {}

    @cached_property
    def ops(self) -> dict[str, str]:
        """The module of each op, below the package."""
        table = self.package.value_of(Definition("kernels", "OPS"))
        found = self.package.evaluate("kernels", table)
        return {op: module.removeprefix(f"{PACKAGE}.") for op, module in found.items()}

    def digest_nodes(self, module: str, nodes: Iterable[ast.expr]) -> str:
        """sha256 of expressions of a module."""
        writer = Normaliser(self.package, Definition(module, ""))
        for node in nodes:
            writer.visit(node)
        return self.package.digest_pieces(writer.out)

    def find_kernels(self, op: str) -> dict[str, list[ast.expr]]:
        """Entries of an op's KERNELS by backend; those whose backend is not plain to see under ''."""
        if op in self._kernels:
            return self._kernels[op]
        module = self.ops[op]
        table = self.package.value_of(Definition(module, "KERNELS"))
        found: dict[str, list[ast.expr]] = {}
        for node in getattr(table, "elts", [table]):
            try:
                backend = self.package.evaluate(module, self.find_argument(module, node, "backend"))
            except UnknownValueError:
                backend = ""
            found.setdefault(backend, []).append(node)
        self._kernels[op] = found
        return found

    def find_argument(self, module: str, node: ast.expr, name: str) -> ast.expr:
        """An argument of a `Kernel(...)`, of `replace(KERNEL, ...)` or of what a name stands for."""
        if isinstance(node, (ast.Name, ast.Attribute)):
            meaning = self.package.find_meaning(module, node)
            if isinstance(meaning, Definition):
                return self.find_argument(meaning.module, self.package.value_of(meaning), name)
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == name:
                    return keyword.value
            if ast.unparse(node.func).endswith("replace"):
                return self.find_argument(module, node.args[0], name)
            place = KERNEL.index(name)
            if place < len(node.args):
                return node.args[place]
        raise UnknownValueError(name)

    def list_needs(self, module: str, nodes: Iterable[ast.expr]) -> Iterator[ast.expr]:
        """The needs of kernels' entries; of entries made in a loop what it goes through, and the whole
        entry where they are not plain to see."""
        for node in nodes:
            loop = node.value if isinstance(node, ast.Starred) else None
            if isinstance(loop, (ast.GeneratorExp, ast.ListComp)):
                yield from (part.iter for part in loop.generators)
                continue
            try:
                yield self.find_argument(module, node, "needs")
            except UnknownValueError:
                yield node

    def find_rules(self, op: str) -> set[str]:
        """The rules by which kernels of an op refuse."""
        if op in self._rules:
            return self._rules[op]
        module = self.ops[op]
        nodes = [n for entries in self.find_kernels(op).values() for n in entries]
        parts: list[tuple[str, ast.AST]] = [(module, n) for n in self.list_needs(module, nodes)]
        for node in [n for _, part in parts for n in ast.walk(part)]:
            if isinstance(node, (ast.Name, ast.Attribute)):
                meaning = self.package.find_meaning(module, node)
                if isinstance(meaning, Definition):
                    parts += [(meaning.module, s) for s in self.package.list_statements(meaning)]
        found: set[str] = set()
        for place, node in ((place, n) for place, part in parts for n in ast.walk(part)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Needs":
                rule = [k.value for k in node.keywords if k.arg == "rule"] + node.args[:1]
                found |= {self.package.evaluate(place, rule[0])} if rule else set()
        self._rules[op] = found
        return found

    def find_order(self, op: str, arch: str, vendor: str) -> tuple[str, ...] | Definition:
        """The backends that are tried on a machine; the whole ORDER where it cannot be read."""
        order = Definition(self.ops[op], "ORDER")
        try:
            table = self.package.evaluate(order.module, self.package.value_of(order))
        except UnknownValueError:
            return order
        return next((table[key] for key in (arch, vendor, "*") if key in table), ())

    def find_schemes(self, definition: Definition) -> Iterator[tuple[str, str]]:
        """(name, op) of every `Scheme(op, name, ...)` and `replace(SCHEME, name=...)` in one."""
        statements = self.package.list_statements(definition)
        for node in (n for statement in statements for n in ast.walk(statement)):
            if not isinstance(node, ast.Call):
                continue
            try:
                name, op = (
                    self._find_scheme_argument(definition.module, node, key)
                    for key in ("name", "op")
                )
            except UnknownValueError:
                continue
            if op in self.ops:
                yield name, op

    def _find_scheme_argument(self, module: str, node: ast.expr, key: str) -> str:
        if isinstance(node, ast.Call):
            given = [keyword.value for keyword in node.keywords if keyword.arg == key]
            function = ast.unparse(node.func)
            if function == "Scheme" and not given:
                given = node.args[("op", "name").index(key) :]
            if given and function in ("Scheme", "replace"):
                value: str = self.package.evaluate(module, given[0])
                return value
            if function == "replace" and isinstance(node.args[0], ast.Name):
                meaning = self.package.find_meaning(module, node.args[0])
                if isinstance(meaning, Definition):
                    base = self.package.value_of(meaning)
                    return self._find_scheme_argument(meaning.module, base, key)
        raise UnknownValueError(key)
