"""Definitions: what the names of a package mean, and a digest of what each of them computes.

A *definition* is what a name stands for at the top of a module: a function, a class with all its
methods, a constant, a table. Its digest is that of its normalised syntax tree:

| not in the digest                          | in the digest |
| ------------------------------------------ | ------------- |
| file, folder, module, order and name of a  | literals, operators, defaults, decorators, names of |
| definition, names of local variables       | attributes, parameters and keywords |
| docstrings, comments, annotations, `cast`, | dotted names of what other packages offer, however they |
| what is under `TYPE_CHECKING`              | are imported |
| wording: texts in a `raise`, an exception  | the class of an exception, a text without a blank (a rule) |
| or a warning; a line of `logger`           | |
| the name of a module of the package in a   | the digest of every definition of the package that is named |
| text                                       | |

Definitions that need each other (recursion, cycles) are digested together, independent of their names and
their order. A name that means nothing is a CodeError. Files are read, never imported, and each Python
gives the same digests.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from quantmatrix.proof.normal_form import Normaliser
from quantmatrix.proof.source_modules import (
    PACKAGE,
    CodeError,
    Definition,
    Meaning,
    Module,
    Outside,
    Piece,
    Submodule,
    UnknownValueError,
    parse,
    pick_value,
)

ENDINGS = ("Error", "Exception", "Warning")


class Package:
    """The definitions of a package's folder."""

    def __init__(
        self,
        folder: Path,
        doors: Collection[str] = (),
        protocols: Collection[str] = (),
        rooms: Collection[str] = (),
    ) -> None:
        """Nothing is read yet.

        Definitions are not followed from outside into the modules below the packages `doors`, but for
        `protocols`, nor into `rooms`; `list_crossed` names these. Neither are they into `edges`.
        """
        self.folder = folder
        self.edges: Collection[Meaning] = ()
        self._doors, self._protocols = doors, protocols
        self._rooms = rooms
        self._crossed: dict[Definition, set[Definition]] = {}
        self._modules: dict[str, Module | None] = {}
        self._pieces: dict[Definition, list[Piece]] = {}
        self._named: dict[Definition, list[Definition]] = {}
        self._digests: dict[Definition, str] = {}
        self._exceptions: dict[Definition, bool] = {}

    def find_module(self, name: str) -> Module | None:
        """A module by its dotted name below the package (nothing: the package itself), or None."""
        if name not in self._modules:
            path = self.folder.joinpath(*filter(None, name.split(".")))
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            self._modules[name] = self._parse(name, path) if path.is_file() else None
        return self._modules[name]

    def _parse(self, name: str, path: Path) -> Module:
        try:
            return Module(name, path, parse(path.read_text(encoding="utf-8")))
        except (SyntaxError, ValueError) as error:
            raise CodeError(f"{path}: not Python {error}: expected source code") from error

    def need_module(self, name: str, where: str = "") -> Module:
        """A module that must be there; raises CodeError where it is not."""
        module = self.find_module(name)
        if module is None:
            raise CodeError(f"{where or self.folder}: no module {PACKAGE}.{name} is there")
        return module

    def resolve(self, module: str, name: str, where: str = "") -> Meaning:
        """What a dotted module and a name in it (or nothing: the module) mean."""
        if module != PACKAGE and not module.startswith(f"{PACKAGE}."):
            return Outside(f"{module}.{name}" if name else module)
        inner = module.removeprefix(PACKAGE).lstrip(".")
        found = self.need_module(inner, where)
        return self.look_up(found, name, where) if name else Submodule(inner)

    def look_up(self, module: Module, name: str, where: str = "") -> Meaning:
        """What a name means in a module; CodeError where it means nothing."""
        if name in module.bound:
            return Definition(module.name, name)
        below = f"{module.name}.{name}".lstrip(".")
        own = (
            f"{PACKAGE}.{module.name}".rstrip("."),
            name,
        )  # a package that imports a part of itself
        if name in module.imports and module.imports[name] != own:
            return self.resolve(*module.imports[name], where or str(module.path))
        if module.path.name == "__init__.py" and self.find_module(below) is not None:
            return Submodule(below)
        raise CodeError(f"{where or module.path}: {name} cannot be resolved in {module.path}")

    def find(self, module: str, name: str) -> Meaning:
        """What a name means in a module below the package."""
        return self.look_up(self.need_module(module), name)

    def has(self, module: str, name: str) -> bool:
        """Whether a module is there and gives this name a meaning."""
        found = self.find_module(module)
        return found is not None and (name in found.bound or name in found.imports)

    def list_statements(self, definition: Definition) -> list[ast.stmt]:
        """The statements that make a definition what it is."""
        return self.need_module(definition.module).bound[definition.name]

    def open_constant(self, module: str, name: str) -> tuple[str, ast.expr]:
        """The module that a constant is really bound in, and its expression.

        Raises UnknownValueError for a name that stands for none.
        """
        found = self.find(module, name)
        if not isinstance(found, Definition):
            raise UnknownValueError(name)
        return found.module, self.value_of(found)

    def value_of(self, definition: Definition) -> ast.expr:
        """The expression that a constant is bound to; UnknownValueError for what is no constant."""
        statements = self.list_statements(definition)
        if len(statements) == 1:
            node = statements[0]
            if isinstance(node, ast.AnnAssign) and node.value is not None:
                return node.value
            if isinstance(node, ast.Assign):
                return pick_value(node, definition.name)
        raise UnknownValueError(definition)

    def is_exception(self, meaning: Meaning | None) -> bool:
        """Whether something is a class of exceptions."""
        if isinstance(meaning, Outside):
            own = getattr(builtins, meaning.name, None)
            known = isinstance(own, type) and issubclass(own, BaseException)
            return known or meaning.name.endswith(ENDINGS)
        if not isinstance(meaning, Definition):
            return False
        if meaning not in self._exceptions:
            self._exceptions[meaning] = False  # a class is not above itself
            [node, *more] = self.list_statements(meaning)
            bases = node.bases if isinstance(node, ast.ClassDef) and not more else []
            above = [Normaliser(self, meaning).find_meaning(base) for base in bases]
            self._exceptions[meaning] = any(self.is_exception(base) for base in above)
        return self._exceptions[meaning]

    def pieces(self, definition: Definition) -> list[Piece]:
        """The normalised tree of a definition: texts, and the definitions that it names."""
        if definition not in self._pieces:
            self._pieces[definition] = Normaliser(self, definition).normalise()
        return self._pieces[definition]

    def is_inside(self, module: str) -> bool:
        """Whether a module lies behind a door."""
        below = module.partition(".")[0] in self._doors and "." in module
        return module in self._rooms or (below and module not in self._protocols)

    def is_cut(self, user: Definition, used: Definition) -> bool:
        """Whether the way of a definition ends before one that it names."""
        if used in self.edges:
            return True
        if not self.is_inside(used.module) or self.is_inside(user.module):
            return False
        self._crossed.setdefault(user, set()).add(used)
        return True

    def list_crossed(self, definition: Definition) -> set[Definition]:
        """What a definition names behind the doors."""
        self.pieces(definition)
        return self._crossed.get(definition, set())

    def digest(self, definition: Definition) -> str:
        """sha256 of a definition and of everything that it names, in hexadecimal digits."""
        if definition not in self._digests:
            for group in self._list_groups(definition):
                self._digest_group(group)
        return self._digests[definition]

    def digest_pieces(self, pieces: Iterable[Piece]) -> str:
        """sha256 of texts and definitions."""
        return hash_texts(p if isinstance(p, str) else self.digest(p) for p in pieces)

    def _list_groups(self, start: Definition) -> Iterator[list[Definition]]:
        """Definitions below `start` that are not digested yet, those that need each other in one
        group, what is needed before what needs it (Tarjan's algorithm, without recursion)."""
        index: dict[Definition, int] = {}
        low: dict[Definition, int] = {}
        stack: list[Definition] = []
        work = [(start, iter(self.list_named(start)))]
        index[start] = low[start] = 0
        stack.append(start)
        while work:
            node, named = work[-1]
            after = next((n for n in named if n not in self._digests and n not in index), None)
            if after is not None:
                index[after] = low[after] = len(index)
                stack.append(after)
                work.append((after, iter(self.list_named(after))))
                continue
            work.pop()
            open_ones = [n for n in self.list_named(node) if n in index and n not in self._digests]
            low[node] = min([low[node], *(low[n] for n in open_ones)])
            if low[node] == index[node]:
                position = stack.index(node)
                group, stack[position:] = stack[position:], []
                yield group

    def list_named(self, definition: Definition) -> list[Definition]:
        """The definitions that one names, each once."""
        if definition not in self._named:
            named = (p for p in self.pieces(definition) if isinstance(p, Definition))
            self._named[definition] = list(dict.fromkeys(named))
        return self._named[definition]

    def _digest_group(self, group: list[Definition]) -> None:
        """Digests of definitions that need each other: in round n each knows the others n deep."""
        known = dict.fromkeys(group, "")
        inside = any(name in known for one in group for name in self.list_named(one))
        for _ in range(len(group) + 1 if inside else 1):
            known = {
                one: hash_texts(
                    p
                    if isinstance(p, str)
                    else f"cycle {known[p]}"
                    if p in known
                    else self.digest(p)
                    for p in self.pieces(one)
                )
                for one in group
            }
        self._digests |= known

    def list_reached(self, start: Iterable[Definition]) -> set[Definition]:
        """Every definition that these name, and those name, and so on."""
        pending, found = list(start), set[Definition]()
        while pending:
            one = pending.pop()
            if one not in found:
                found.add(one)
                pending += self.list_named(one)
        return found

    def find_meaning(self, module: str, node: ast.expr) -> Meaning | None:
        """What a dotted name means in a module; None for other expressions and for locals."""
        try:
            return Normaliser(self, Definition(module, "")).find_meaning(node)
        except CodeError:
            return None

    def evaluate(self, module: str, node: ast.expr) -> Any:
        """The value of an expression of constants, tuples and tables; UnknownValueError otherwise."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, (ast.Name, ast.Attribute)):
            meaning = self.find_meaning(module, node)
            if isinstance(meaning, Definition):
                return self.evaluate(meaning.module, self.value_of(meaning))
        elif isinstance(node, (ast.Tuple, ast.List)):
            return tuple(self._spread(module, node.elts))
        elif isinstance(node, ast.Dict):
            return self._evaluate_table(module, node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "dict.fromkeys":
            keys, value = (self.evaluate(module, argument) for argument in node.args)
            return dict.fromkeys(keys, value)
        raise UnknownValueError(ast.unparse(node))

    def _spread(self, module: str, nodes: Iterable[ast.expr]) -> Iterator[Any]:
        for node in nodes:
            if isinstance(node, ast.Starred):
                yield from self.evaluate(module, node.value)
            else:
                yield self.evaluate(module, node)

    def _evaluate_table(self, module: str, node: ast.Dict) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                found |= self.evaluate(module, value)
            else:
                found[self.evaluate(module, key)] = self.evaluate(module, value)
        return found


def hash_texts(texts: Iterable[str]) -> str:
    """sha256 of texts, each kept apart from the next."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
