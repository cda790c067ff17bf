"""Normal form: the syntax tree of a definition without all that computes nothing.

What is left out and what stays is described in `definitions`, which digests it.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from quantmatrix.proof.source_modules import (
    COMPREHENSIONS,
    PACKAGE,
    CodeError,
    Definition,
    Meaning,
    Outside,
    Piece,
    Submodule,
    UnknownValueError,
    is_docstring,
    is_for_types,
    list_bound,
    list_bound_by,
    pick_value,
    read_import,
    walk_scope,
)

if TYPE_CHECKING:
    from quantmatrix.proof.definitions import Package

UNSAID = frozenset(
    ("ctx", "type_comment", "kind", "annotation", "returns", "type_params", "type_ignores")
)
"""Fields of a syntax tree that compute nothing."""
WORDING = ("remedy", "help", "message")
"""Keywords that take text for people."""
OWN_MODULE = re.compile(rf"{PACKAGE}(\.\w+)*\.?")


@dataclass
class Scope:
    """The names of a function, a class or a comprehension."""

    kind: str
    names: dict[str, str | tuple[str, str]] = field(default_factory=dict)
    """Name to what stands for it in the digest, or to what its import means."""


class Normaliser:
    """Writes the normalised tree of one definition."""

    def __init__(self, package: Package, definition: Definition) -> None:
        """A definition without a name stands for an expression of its module."""
        self.package = package
        self.definition = definition
        self.module = package.need_module(definition.module)
        self.out: list[Piece] = []
        self.scopes: list[Scope] = []
        self.wording = False
        self.trying = False
        self._count = 0

    def normalise(self) -> list[Piece]:
        """The pieces of the definition."""
        name = self.definition.name
        for statement in self.module.effects:
            self.visit(statement)
        for statement in self.module.bound[name]:
            if isinstance(statement, ast.AnnAssign) and statement.value is not None:
                self.visit(statement.value)
            elif isinstance(statement, ast.Assign) and self._visit_value(statement, name):
                continue
            elif isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.visit_function(statement)
            elif isinstance(statement, ast.ClassDef):
                self.visit_class(statement)
            else:
                self.visit(statement)
        return self.out

    def _visit_value(self, node: ast.Assign, name: str) -> bool:
        try:
            self.visit(pick_value(node, name))
        except UnknownValueError:
            return False
        return True

    @cached_property
    def where(self) -> str:
        """Where the definition stands, for errors."""
        return f"{self.module.path}: {self.definition.name}"

    # names

    def find_local(self, name: str) -> str | tuple[str, str] | None:
        """What a name stands for in the scopes around, or None: it is the module's."""
        direct = True
        for scope in reversed(self.scopes):
            if name in scope.names and (scope.kind != "class" or direct):
                found = scope.names[name]
                if found == "?":
                    self._count += 1
                    found = scope.names[name] = f"local {self._count}"
                return None if found == "global" else found
            direct = direct and scope.kind == "comprehension"
        return None

    def find_meaning(self, node: ast.expr) -> Meaning | None:
        """What a dotted name means as a whole, or None where names alone do not say."""
        if isinstance(node, ast.Name):
            local = self.find_local(node.id)
            if isinstance(local, tuple):
                return self.package.resolve(*local, self.where)
            return None if local is not None else self.find_global(node)
        if isinstance(node, ast.Attribute):
            owner = self.find_meaning(node.value)
            if isinstance(owner, Outside):
                return Outside(f"{owner.name}.{node.attr}")
            if isinstance(owner, Submodule) and not node.attr.startswith("__"):
                module = self.package.need_module(owner.module, self.where)
                return self.package.look_up(module, node.attr, f"{self.where}, line {node.lineno}")
        return None

    def find_global(self, node: ast.Name) -> Meaning | None:
        """What a name of the module or of Python means; CodeError where it means nothing."""
        name = node.id
        if name in self.module.bound or name in self.module.imports:
            return self.package.look_up(self.module, name)
        if hasattr(builtins, name) or (name.startswith("__") and name.endswith("__")):
            return Outside(name)
        raise CodeError(f"{self.where}, line {node.lineno}: {name} cannot be resolved")

    def say(self, meaning: Meaning) -> None:
        """Write what a name means."""
        if isinstance(meaning, Definition):
            cut = self.package.is_cut(self.definition, meaning)
            self.out.append("entry" if cut else meaning)
        elif isinstance(meaning, Outside):
            self.out.append(f"outside {meaning.name}")
        else:
            module = self.package.need_module(meaning.module)
            self.out += [
                "module",
                *(Definition(module.name, name) for name in sorted(module.bound)),
            ]

    # nodes

    def visit(self, node: Any) -> None:
        """Write a node, a list of nodes or a value."""
        kind = type(node)
        if kind is list:
            self.out.append("[")
            for item in filter(self.counts, node):
                self.visit(item)
            self.out.append("]")
        elif isinstance(node, ast.AST):
            if self.wording and is_wording(node):
                self.out.append("words")
                return
            if kind is ast.Subscript and is_own_path(node):  # type: ignore[arg-type]
                node = ast.Attribute(node.value.value, "parent")  # type: ignore[attr-defined]
                kind = ast.Attribute
            special = SPECIAL.get(kind)
            if special is None:
                self.visit_fields(node)
            else:
                special(self, node)
        else:
            self.out.append(repr(node))

    def visit_fields(self, node: ast.AST, without: tuple[str, ...] = ()) -> None:
        """Write a node by its fields, empty ones left out: Pythons differ in these."""
        self.out.append(type(node).__name__)
        for name in node._fields:
            if name in UNSAID or name in without:
                continue
            value = getattr(node, name, None)
            if value is not None and value != []:
                self.out.append(name)
                self.visit(value)
        self.out.append(";")

    def counts(self, node: Any) -> bool:
        """Whether a node of a list computes anything."""
        if not isinstance(node, ast.stmt):
            return True
        if isinstance(node, (ast.Global, ast.Nonlocal)) or is_docstring(node) or is_log(node):
            return False
        if isinstance(node, ast.AnnAssign) and node.value is None:
            return bool(self.scopes) and self.scopes[-1].kind == "class"
        return self.trying or not isinstance(node, (ast.Import, ast.ImportFrom))

    def visit_name(self, node: ast.Name) -> None:
        """A local by its number, a parameter by its name, all else by what it means."""
        if not self.scopes and isinstance(node.ctx, ast.Store):
            self.out.append("own" if node.id == self.definition.name else "other")
            return
        local = self.find_local(node.id)
        if isinstance(local, str):
            self.out.append(local)
        elif (meaning := self.find_meaning(node)) is not None:
            self.say(meaning)

    def visit_attribute(self, node: ast.Attribute) -> None:
        """A dotted name by what it means; else the owner and the attribute."""
        if (meaning := self.find_meaning(node)) is not None:
            self.say(meaning)
            return
        self.visit_fields(node)

    def visit_constant(self, node: ast.Constant) -> None:
        """A literal; a module of the package is none."""
        own = isinstance(node.value, str) and OWN_MODULE.fullmatch(node.value)
        self.out.append("module" if own else repr(node.value))

    def visit_call(self, node: ast.Call) -> None:
        """A call: `cast` is none, and what is said to people does not count."""
        meaning = self.find_meaning(node.func)
        if meaning == Outside("typing.cast") and len(node.args) == 2:
            self.visit(node.args[1])
            return
        before = self.wording
        self.wording = before or is_warning(node.func) or self.package.is_exception(meaning)
        self.visit_fields(node)
        self.wording = before

    def visit_wording(self, node: ast.AST) -> None:
        """What is raised, or the text of a keyword for people."""
        before, self.wording = self.wording, True
        self.visit_fields(node)
        self.wording = before

    def visit_keyword(self, node: ast.keyword) -> None:
        """A keyword of a call."""
        (self.visit_wording if node.arg in WORDING else self.visit_fields)(node)

    def visit_change(self, node: ast.AugAssign) -> None:
        """`x += y`; what is added to a list of warnings is wording."""
        is_list = isinstance(node.target, ast.Name) and node.target.id == "warnings"
        (self.visit_wording if is_list else self.visit_fields)(node)

    def visit_assert(self, node: ast.Assert) -> None:
        """The condition; the message is wording."""
        self.visit_fields(node, ("msg",))

    def visit_try(self, node: ast.AST) -> None:
        """Imports count here, for they decide what runs."""
        before, self.trying = self.trying, True
        self.visit_fields(node)
        self.trying = before

    def visit_import(self, node: ast.Import | ast.ImportFrom) -> None:
        """The modules outside that are asked for."""
        meant = read_import(node, self.module.name, self.module.path.name == "__init__.py")
        for module, name in sorted(meant.values()):
            self.say(self.package.resolve(module, name, self.where))

    def visit_if(self, node: ast.If) -> None:
        """A condition; what is for types alone is left out."""
        if is_for_types(node):
            self.visit(node.orelse)
        else:
            self.visit_fields(node)

    def visit_annotated(self, node: ast.AnnAssign) -> None:
        """A field of a class, else an assignment."""
        if self.scopes and self.scopes[-1].kind == "class":
            self.visit_fields(node)
        else:
            value = node.value or ast.Constant(None)
            self.visit_fields(ast.Assign(targets=[node.target], value=value))

    def visit_binding(self, node: Any) -> None:
        """`except ... as name` and the names of patterns."""
        field_name = "rest" if isinstance(node, ast.MatchMapping) else "name"
        name = getattr(node, field_name)
        self.visit_fields(node, (field_name,))
        if name:
            self.visit(ast.copy_location(ast.Name(name, ast.Load()), node))

    def visit_local_function(self, node: ast.FunctionDef) -> None:
        """A function in a function is a local, in a class a name of the class."""
        self.visit(ast.copy_location(ast.Name(node.name, ast.Load()), node))
        self.visit_function(node)

    def visit_function(self, node: Any) -> None:
        """Decorators and defaults in the scope around; the rest in its own."""
        self.out.append(type(node).__name__)
        self.visit(getattr(node, "decorator_list", []))
        arguments = node.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        named += filter(None, (arguments.vararg, arguments.kwarg))
        self.visit([*arguments.defaults])
        self.visit([d if d is not None else "none" for d in arguments.kw_defaults])
        counts = (len(arguments.posonlyargs), len(arguments.args), len(arguments.kwonlyargs))
        kinds = (*counts, bool(arguments.vararg), bool(arguments.kwarg))
        self.out += [repr(kinds), *(argument.arg for argument in named)]
        body = node.body if isinstance(node.body, list) else [node.body]
        names = self.list_names(body)
        names |= {argument.arg: f"parameter {argument.arg}" for argument in named}
        self.enter(Scope("function", names), body)

    def list_names(self, body: list[Any]) -> dict[str, str | tuple[str, str]]:
        """The names of a function's own scope."""
        nodes = list(walk_scope(body))
        names: dict[str, str | tuple[str, str]] = dict.fromkeys(list_bound_by(nodes), "?")
        for node in nodes:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                package = self.module.path.name == "__init__.py"
                names |= read_import(node, self.module.name, package)
            elif isinstance(node, ast.Global):
                names |= dict.fromkeys(node.names, "global")
            elif isinstance(node, ast.Nonlocal):
                for name in node.names:
                    names.pop(name, None)
        return names

    def visit_class(self, node: ast.ClassDef) -> None:
        """Bases and decorators in the scope around; the names of a class are attributes."""
        self.out.append("ClassDef")
        for part in (node.decorator_list, node.bases, node.keywords):
            self.visit(part)
        names = self.list_names(node.body)
        own = {n: f"attribute {n}" if kind == "?" else kind for n, kind in names.items()}
        self.enter(Scope("class", own), node.body)

    def visit_local_class(self, node: ast.ClassDef) -> None:
        """A class in a function or a class."""
        self.visit(ast.copy_location(ast.Name(node.name, ast.Load()), node))
        self.visit_class(node)

    def visit_comprehension(self, node: Any) -> None:
        """What is looped over first belongs to the scope around."""
        self.out.append(type(node).__name__)
        first, *others = node.generators
        self.visit(first.iter)
        bound = list_bound([g.target for g in node.generators])
        names: dict[str, str | tuple[str, str]] = dict.fromkeys(bound, "?")
        parts: list[Any] = [first.target, [*first.ifs]]
        parts += [part for g in others for part in (g.target, g.iter, [*g.ifs])]
        parts += [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        self.enter(Scope("comprehension", names), parts)

    def enter(self, scope: Scope, parts: list[Any]) -> None:
        """Write what lies in an inner scope."""
        self.scopes.append(scope)
        for part in filter(self.counts, parts):
            self.visit(part)
        self.scopes.pop()
        self.out.append(";")


def is_own_path(node: ast.Subscript) -> bool:
    """Whether a node is `Path(__file__).parents[N]`: how deep a file lies computes nothing."""
    return (
        isinstance(node.slice, ast.Constant)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "parents"
        and ast.unparse(node.value) == "Path(__file__).parents"
    )


def is_wording(node: ast.AST) -> bool:
    """Whether an expression is wording, once it is known to be for people: a text with a blank, or
    one that is put together."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and any(letter.isspace() for letter in node.value)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mod)):
        return is_wording(node.left) or is_wording(node.right)
    if isinstance(node, ast.IfExp):
        return is_wording(node.body) and is_wording(node.orelse)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner = node.func.value
        return isinstance(owner, (ast.Constant, ast.JoinedStr)) and node.func.attr in (
            "join",
            "format",
        )
    return isinstance(node, ast.JoinedStr)


def is_warning(node: ast.expr) -> bool:
    """`warnings.warn` and `warnings.append`."""
    owner = node.value if isinstance(node, ast.Attribute) else None
    return isinstance(owner, ast.Name) and owner.id == "warnings"


LEVELS = ("debug", "info", "warning", "error")


def is_log(node: ast.AST) -> bool:
    """Whether a statement is a line for the log, in which nothing but a length is computed."""
    call = node.value if isinstance(node, ast.Expr) else None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
        return False
    owner = call.func.value
    if not (isinstance(owner, ast.Name) and owner.id == "logger" and call.func.attr in LEVELS):
        return False
    computing = (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)
    return not any(
        isinstance(inner, computing)
        or (isinstance(inner, ast.Call) and inner is not call and ast.unparse(inner.func) != "len")
        for inner in ast.walk(call)
    )


SPECIAL: Mapping[type, Callable[[Normaliser, Any], None]] = {
    ast.Name: Normaliser.visit_name,
    ast.Attribute: Normaliser.visit_attribute,
    ast.Constant: Normaliser.visit_constant,
    ast.Call: Normaliser.visit_call,
    ast.Raise: Normaliser.visit_wording,
    ast.keyword: Normaliser.visit_keyword,
    ast.AugAssign: Normaliser.visit_change,
    ast.Assert: Normaliser.visit_assert,
    ast.Try: Normaliser.visit_try,
    ast.Import: Normaliser.visit_import,
    ast.ImportFrom: Normaliser.visit_import,
    ast.If: Normaliser.visit_if,
    ast.AnnAssign: Normaliser.visit_annotated,
    ast.ExceptHandler: Normaliser.visit_binding,
    ast.MatchAs: Normaliser.visit_binding,
    ast.MatchStar: Normaliser.visit_binding,
    ast.MatchMapping: Normaliser.visit_binding,
    ast.FunctionDef: Normaliser.visit_local_function,
    ast.AsyncFunctionDef: Normaliser.visit_local_function,
    ast.Lambda: Normaliser.visit_function,
    ast.ClassDef: Normaliser.visit_local_class,
    **dict.fromkeys(COMPREHENSIONS, Normaliser.visit_comprehension),
}
