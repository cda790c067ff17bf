"""Families are known by the names of the protocol alone: counted in the source, without running it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import quantmatrix
from quantmatrix import families
from quantmatrix.errors import UsageError
from quantmatrix.families.protocol import Family, Needed, complete, list_names
from quantmatrix.scheme import Scheme

PACKAGE = Path(quantmatrix.__file__).parent
MODULES = {family: family.replace("-", "_") for family in families.IDS}
PREFIX = families.__name__
TABLE = "families/__init__.py"
"""The table of ids."""
MOST = 9
"""Files that may name a family beside its own, the tables, the tests, and adapters of other programs."""
OFFERED = {*list_names(Needed), *list_names(Family)}
ONE_FAMILY = {("tools/wan_repack.py", "msmodelslim")}
"""Programs that are about the files of one family, and may take more of it than the protocol has."""


Sources = dict[str, ast.Module]


@pytest.fixture(scope="module")
def sources() -> Sources:
    """Every file of the package in which a family may be named, by its path there."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    words = re.compile("|".join(["famil", *families.IDS, *MODULES.values()]))
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(text)
        for path, text in texts.items()
        if words.search(text)
    }


def is_own(file: str, family: str) -> bool:
    """Whether a file is a family's, or lies in its folder."""
    own = f"families/{MODULES[family]}"
    return file == f"{own}.py" or file.startswith(f"{own}/")


def list_docstrings(tree: ast.Module) -> set[ast.expr]:
    """Texts that are statements: docstrings, those of attributes among them."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def list_imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(family, name or nothing) of what a file imports of the modules of families."""
    for node in ast.walk(tree):
        found: list[tuple[str, str]] = []
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = [(node.module, alias.name) for alias in node.names]
        for module, name in found:
            parts = [*module.split("."), name]
            for family, own in MODULES.items():
                if parts[:3] == ["quantmatrix", "families", own]:
                    yield family, ".".join(parts[3:])


def list_named(file: str, tree: ast.Module) -> set[str]:
    """The families of other files that a file names: in a text that is an id, or by an import."""
    texts = set(ast.walk(tree)) - list_docstrings(tree)
    words = {node.value for node in texts if isinstance(node, ast.Constant)}
    named = (words & set(families.IDS)) | {family for family, _ in list_imports(tree)}
    return set() if file.startswith("peers/") else {f for f in named if not is_own(file, f)}


def test_few_files_name_a_family(sources: Sources) -> None:
    named = {file: found for file, tree in sources.items() if (found := list_named(file, tree))}
    assert named.pop(TABLE) == set(families.IDS)
    assert len(named) <= MOST, named


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("if family == 'fp8': pass", {"fp8"}),
        ("from quantmatrix.families.nunchaku_svdq.faults import check", {"nunchaku-svdq"}),
        ("from quantmatrix.families import msmodelslim", {"msmodelslim"}),
        ("import quantmatrix.families.modelopt_fp8", {"modelopt-fp8"}),
        ("def f():\n    'fp8'\n    from quantmatrix.families import layouts", set()),
    ],
)
def test_what_counts_as_naming_a_family(source: str, named: set[str]) -> None:
    assert list_named("runtime/plan/decide.py", ast.parse(source)) == named


def is_family(node: ast.AST, known: set[str]) -> bool:
    """Whether an expression is a family: a call of a known loader, or a known variable."""
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in known
    return isinstance(node, ast.Name) and node.id in known


def list_variables(function: ast.AST, load: str) -> set[str]:
    """The variables of a function, or of a module, that are families."""
    found: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.arg) and node.annotation is not None:
            found |= {node.arg} if ast.unparse(node.annotation).strip("'\"") == "Family" else set()
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            found |= {t.id for t, v in pairs if isinstance(t, ast.Name) and is_family(v, {load})}
    return found


def list_uses(tree: ast.Module, load: str = "families.load") -> Iterator[tuple[str, str]]:
    """(what is done, with what) to the families in a file: `ask NAME`, or `probe FUNCTION`."""
    functions = [
        n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    outside = [node for node in ast.walk(tree) if id(node) not in inside]
    scopes = [(list(ast.walk(f)), {load, *list_variables(f, load)}) for f in functions]
    scopes.append((outside, {load}))
    for nodes, known in scopes:
        for node in nodes:
            if isinstance(node, ast.Attribute) and is_family(node.value, known):
                yield "ask", node.attr
            if not isinstance(node, ast.Call):
                continue
            function = ast.unparse(node.func).rpartition(".")[2]
            arguments = [part for argument in node.args for part in ast.walk(argument)]
            if function in PROBES and any(is_family(part, known) for part in arguments):
                yield "probe", function


PROBES = ("getattr", "hasattr", "vars", "dir", "signature", "getmembers", "isinstance", "setattr")


@pytest.fixture(scope="module")
def uses(sources: Sources) -> dict[str, set[tuple[str, str]]]:
    """What is done to families in each file."""
    return {
        file: set(list_uses(tree, "load" if file == TABLE else "families.load"))
        for file, tree in sources.items()
    }


def test_families_are_asked_by_the_names_of_the_protocol(
    uses: dict[str, set[tuple[str, str]]],
) -> None:
    asked = {(file, name) for file, found in uses.items() for what, name in found if what == "ask"}
    assert {(file, name) for file, name in asked if name not in OFFERED} == set()
    assert {"find_fault", "ignored", "doubts", "scheme_of", "ONLINE"} <= {name for _, name in asked}


def test_families_are_not_probed(uses: dict[str, set[tuple[str, str]]]) -> None:
    probed = [(f, name) for f, found in uses.items() for what, name in found if what == "probe"]
    assert probed == []


def test_only_programs_about_one_family_import_one(sources: Sources) -> None:
    imported = {(file, f) for file, tree in sources.items() for f, _ in list_imports(tree)}
    assert {pair for pair in imported if not is_own(*pair)} == ONE_FAMILY


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a = getattr(families.load(x), 'ignored', None)", {("probe", "getattr")}),
        ("def f():\n    own = families.load(x)\n    hasattr(own, 'a')", {("probe", "hasattr")}),
        ("def f(own: Family):\n    signature(own.quantize)", {("probe", "signature"), ("ask", "quantize")}),
        ("def f(own: str):\n    getattr(own, 'a')", set()),
        ("def f():\n    own, b = families.load(x), 1\n    own.caveat(b)", {("ask", "caveat")}),
        ("families.load(x).RANKS", {("ask", "RANKS")}),
    ],
)  # fmt: skip
def test_what_counts_as_asking_and_as_probing(source: str, expected: set[tuple[str, str]]) -> None:
    assert set(list_uses(ast.parse(source))) == expected


def describe_call(function: object, *, bound: bool) -> list[tuple[str, object, object]]:
    """How a function is called: kind and default of each parameter, the names that callers give."""
    assert callable(function)
    parameters = list(inspect.signature(function).parameters.values())[0 if bound else 1 :]
    return [
        (p.name if p.kind is p.KEYWORD_ONLY else "", p.kind, p.default is not p.empty)
        for p in parameters
    ]


@pytest.mark.parametrize("family", families.IDS)
def test_a_family_offers_names_as_the_protocol_has_them(family: str) -> None:
    module = families.load(family)
    assert family == module.ID
    assert module.SCHEMES
    for name in sorted(OFFERED):
        own, stated = getattr(module, name), getattr(Family, name, None)
        if callable(stated):
            assert describe_call(own, bound=True) == describe_call(stated, bound=False), name
        elif isinstance(stated, (tuple, bool)):
            assert type(own) is type(stated), name


def test_every_name_that_may_be_left_out_is_defined_by_some_family() -> None:
    defined = set()
    for family in families.IDS:
        tree = ast.parse(inspect.getsource(importlib.import_module(f"{PREFIX}.{MODULES[family]}")))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                defined.add(node.name)
            elif isinstance(node, ast.Assign):
                defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.ImportFrom):
                defined |= {alias.asname or alias.name for alias in node.names}
    assert set(list_names(Family)) <= defined


def make_module(**names: object) -> ModuleType:
    """A family that has no more than it must."""
    module = ModuleType("toy")
    for name in list_names(Needed):
        setattr(module, name, lambda *_: {})
    scheme = Scheme("linear.fp8", "toy", "e4m3", "tensor", "none")
    vars(module).update({"ID": "toy", "SCHEMES": {"one": scheme, "two": scheme}, **names})
    return module


def test_defaults_are_bound_to_the_module() -> None:
    toy = complete(make_module(ONLINE="two"))
    assert toy.ONLINE == "two"
    assert toy.CODE_LEAVES == ("weight",)
    assert toy.name_scheme(None, None, None) == "one"
    scheme = toy.SCHEMES["one"]
    assert toy.scheme_of("a", scheme, raw=True, gelu=True, interleaved=True, columns=64) is scheme
    assert toy.find_fault({}, scheme) is None
    with pytest.raises(UsageError, match="--scheme three: toy has one, two"):
        toy.name_scheme("three", None, None)
    assert {name for name in vars(toy) if not name.startswith("_")} == OFFERED


def test_a_family_without_a_needed_name_is_refused() -> None:
    module = make_module()
    del module.cut_rows
    with pytest.raises(TypeError, match=re.escape("toy has no cut_rows: every family defines")):
        complete(module)
