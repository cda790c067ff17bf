"""Docstrings say what a caller needs: shapes, dtypes, units, errors, sources, and two examples.

The rules are read off the source, without importing it. What a module lacks is listed by function.
"""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import quantmatrix
from quantmatrix.families import IDS

PACKAGE = Path(quantmatrix.__file__).parent
Function = ast.FunctionDef | ast.AsyncFunctionDef

TENSOR = re.compile(r"\bTensors?\b")
"""What an annotation that takes or gives tensors has in it: `torch.Tensor`, `Tensors`."""
SHAPE = re.compile(r"\[[\w .,+*/()-]*\](?!\()|\bany shape\b|'s? shape\b")
DTYPE = re.compile(r"\b(b?float\w*|u?int\d+|16-bit|dtypes?)\b")
STORED = re.compile(rf"{DTYPE.pattern}|\b(F8_E4M3|B?F16|F32|[UI]\d+)\b")
"""A dtype in a table: torch's word, or that of a file's header."""
TABLE = re.compile(r"as in (?:the module's table|the table of `([\w.]+)`)")
"""Tensors that a table lists with shapes and dtypes: in the module's docstring, or in another's."""
UNITS = {
    re.compile(r"(^|_)n?bytes$"): re.compile(r"\bbytes?\b", re.IGNORECASE),
    re.compile(r"(^|_)(s|seconds)$"): re.compile(r"\bseconds?\b", re.IGNORECASE),
    re.compile(r"_db$"): re.compile(r"\bdB\b"),
    re.compile(r"(^|_)gib$"): re.compile(r"\bGiB\b"),
}
"""Endings of names of numbers, and the unit that the docstring has to name."""
ERROR = re.compile(r"\b[A-Z]\w*Error\b")
LOADERS = {
    ("api", "load_transformer"): "UsageError CheckpointError WitnessError RefusedError",
    ("api", "load_pipeline"): "UsageError CheckpointError UnusableError RefusedError",
    ("api", "plan"): "UsageError CheckpointError",
    ("api", "generate_all"): "UsageError CheckpointError RefusedError BrokenRunError",
    ("runtime.load", "load_component"): "CheckpointError WitnessError",
    ("runtime.pipeline", "build_pipeline"): "UsageError CheckpointError",
    ("runtime.generate", "generate_all"): "UsageError CheckpointError WitnessError BrokenRunError",
    ("runtime.plan.decide", "plan"): "UsageError CheckpointError",
    ("runtime.plan.inspect", "inspect"): "CheckpointError",
}
"""Functions that people call, with the errors of what they call in turn."""
FORMATS = (
    *(f"families.{name.replace('-', '_')}" for name in IDS),
    *("families.modelopt_nvfp4.layouts", "families.msmodelslim.mx_blocks"),
    "families.unknown_quantization",
    *("kernels.number_formats", "kernels.scale_layouts", "kernels.svdq_packing"),
)
"""Modules that say how numbers are stored: each names where that is known from."""


@cache
def parse(module: str) -> ast.Module:
    path = PACKAGE / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def list_modules() -> list[str]:
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return sorted(str(path).replace("/", ".").removesuffix(".__init__") for path in paths)


def list_public(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Functions and methods of public classes, by name, none with a leading underscore."""
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) else []
        for name, one in ((node, node), *((node, method) for method in inside)):
            owner = f"{name.name}." if isinstance(name, ast.ClassDef) else ""
            if isinstance(one, Function) and not owner.startswith("_") and one.name[0] != "_":
                yield f"{owner}{one.name}", one


def docstring(node: Function | ast.Module) -> str:
    return " ".join((ast.get_docstring(node) or "").split())


def annotations(function: Function) -> Iterator[tuple[str, str]]:
    """(name, annotation) of each parameter and, under the function's own name, of what it returns."""
    found = function.args
    extra = [one for one in (found.vararg, found.kwarg) if one is not None]
    for one in (*found.posonlyargs, *found.args, *found.kwonlyargs, *extra):
        if one.annotation is not None:
            yield one.arg, ast.unparse(one.annotation)
    if function.returns is not None:
        yield function.name, ast.unparse(function.returns)


def has_table(tree: ast.Module) -> bool:
    """Whether a module's docstring has a table of tensors, a line each with dtype and shape."""
    lines = [line for line in (ast.get_docstring(tree) or "").splitlines() if line[:1] == "|"]
    listed = [line for line in lines if re.search(r"\[[^]]*\]", line) and STORED.search(line)]
    return len(listed) >= 2 and any(re.search(r"\btensor\b", line) for line in lines)


def find_tensor_gap(function: Function, tree: ast.Module) -> str:
    if not any(TENSOR.search(kind) for _, kind in annotations(function)):
        return ""
    text = docstring(function)
    listed = TABLE.search(text)
    if listed is not None and has_table(parse(listed[1]) if listed[1] else tree):
        return ""
    lacks = [
        what for what, rule in (("a shape", SHAPE), ("a dtype", DTYPE)) if not rule.search(text)
    ]
    if listed is not None and lacks:
        return f"{listed[0]}: there is no such table"
    return f"takes or gives tensors, without {' and '.join(lacks)}" if lacks else ""


def list_raised(body: list[ast.stmt], caught: frozenset[str] = frozenset()) -> Iterator[ast.expr]:
    """What is raised by the statements themselves, functions inside them left out.

    What the same function catches and does not raise again is no error of its own.
    """
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if ast.unparse(raised) not in {*caught, "NotImplementedError"}:
                yield raised
        if isinstance(node, ast.Try):
            yield from list_raised(node.body, caught | set(list_caught(node)))
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            inside = getattr(node, name, [])
            if name == "body" and isinstance(node, ast.Try):
                continue
            if name in ("handlers", "cases"):
                inside = [line for one in inside for line in one.body]
            yield from list_raised(inside, caught)


def list_caught(block: ast.Try) -> Iterator[str]:
    for handler in block.handlers:
        again = any(isinstance(node, ast.Raise) for line in handler.body for node in ast.walk(line))
        if handler.type is not None and not again:
            names = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
            yield from map(ast.unparse, names)


@cache
def makers() -> dict[str, str]:
    """Functions that return an error for others to raise, by name."""
    found = {}
    for module in list_modules():
        for node in ast.walk(parse(module)):
            if isinstance(node, Function) and node.returns is not None:
                kind = ast.unparse(node.returns).strip("'\"")
                if ERROR.fullmatch(kind):
                    found[node.name] = kind
    return found


def find_error_gaps(function: Function) -> Iterator[str]:
    text = docstring(function)
    for raised in list_raised(function.body):
        name = ast.unparse(raised).rpartition(".")[2]
        name = makers().get(name, name)
        if name[0].isupper():
            named = re.search(rf"\b{name}\b", text) is not None
        else:  # what was caught before, or is chosen: some error has to be named
            named = ERROR.search(text) is not None
        if not named:
            yield f"raises {name}, line {raised.lineno}"


def find_unit_gaps(function: Function) -> Iterator[str]:
    text = docstring(function)
    for name, kind in annotations(function):
        for ending, unit in UNITS.items():
            number = re.search(r"\b(int|float)\b", kind)
            if number and ending.search(name) and not unit.search(text):
                yield f"{name} without its unit"


def list_gaps(tree: ast.Module) -> list[str]:
    """`function: what its docstring lacks` for all that is public in a module."""
    gaps = []
    for name, function in list_public(tree):
        found = [find_tensor_gap(function, tree), *find_error_gaps(function)]
        gaps += [f"{name}: {gap}" for gap in (*found, *find_unit_gaps(function)) if gap]
    return gaps


@pytest.mark.parametrize("module", list_modules())
def test_docstrings_say_what_a_caller_needs(module: str) -> None:
    gaps = [f"quantmatrix.{module}.{gap}" for gap in list_gaps(parse(module))]
    assert not gaps, "\n".join(gaps)


@pytest.mark.parametrize(("module", "name"), LOADERS, ids=".".join)
def test_loaders_name_the_errors_of_what_they_call(module: str, name: str) -> None:
    text = docstring(dict(list_public(parse(module)))[name])
    missing = set(LOADERS[module, name].split()) - set(ERROR.findall(text))
    assert not missing, f"quantmatrix.{module}.{name} does not name {', '.join(sorted(missing))}"


@pytest.mark.parametrize("module", FORMATS)
def test_formats_name_their_source(module: str) -> None:
    found = re.search(r"\bSources?: \w.{10}", docstring(parse(module)))
    assert found, f"quantmatrix.{module}: expected a `Source:` of the format in its docstring"


@pytest.mark.parametrize("name", ["load_transformer", "load_pipeline"])
def test_example_runs(name: str) -> None:
    [example] = doctest.DocTestFinder().find(getattr(quantmatrix, name), name, globs={})
    runner = doctest.DocTestRunner()
    result = runner.run(example)
    assert result.failed == 0
    assert result.attempted >= 3


TABLES = '"""A.\n\n| tensor | is |\n| - | - |\n| `a` | F32 [] |\n| `b` | int8 [n] |\n"""\n'
TAKES = "def f(x: torch.Tensor) -> int:\n"
RAISES = "    try:\n        raise KeyError(1)\n    except KeyError:\n        "
SOURCES = {
    "no docstring": (TAKES + "    return 1", "f: takes or gives tensors, without a shape and a dtype"),
    "no dtype": (TAKES + '    """[a, b]."""', "f: takes or gives tensors, without a dtype"),
    "no shape": (TAKES + '    """Of float32."""', "f: takes or gives tensors, without a shape"),
    "half-open range": (TAKES + '    """float32 in [a, b)."""', "f: takes or gives tensors, without a shape"),
    "given": ('def f() -> Tensors:\n    """Any."""', "f: takes or gives tensors, without a shape and a dtype"),
    "no table": (
        TAKES + '    """Tensors as in the module\'s table."""',
        "f: as in the module's table: there is no such table",
    ),
    "table of shapes": (
        TABLES.replace("F32", "the").replace("int8", "the")
        + TAKES
        + '    """Tensors as in the module\'s table."""',
        "f: as in the module's table: there is no such table",
    ),
    "no table there": (
        TAKES + '    """Tensors as in the table of `kernels.portable`."""',
        "f: as in the table of `kernels.portable`: there is no such table",
    ),
    "method": (
        "class A:\n    def f(self):\n        if 1:\n            raise ValueError(2)",
        "A.f: raises ValueError, line 4",
    ),
    "maker": (
        'def f():\n    """A."""\n    raise describe_codes(1)',
        "f: raises CheckpointError, line 3",
    ),
    "kept": ('def f():\n    """A."""\n    raise errors[0]', "f: raises errors[0], line 3"),
    "raised again": (f'def f():\n    """A."""\n{RAISES}raise', "f: raises KeyError, line 4"),
    "unit": ("def f(read_bytes: int) -> None:\n    pass", "f: read_bytes without its unit"),
    "decibels": ('def mean_db() -> float:\n    """A."""', "mean_db: mean_db without its unit"),
}  # fmt: skip
FINE = {
    "shape and dtype": TAKES + '    """float32 [out, in]."""',
    "any shape": TAKES + '    """Of any shape and dtype."""',
    "table": TABLES + TAKES + '    """Tensors as in the module\'s table."""',
    "table there": TAKES + '    """Tensors as in the table of `kernels.linear_fp8`."""',
    "private": "def _f(x: torch.Tensor) -> int:\n    raise ValueError(1)",
    "private class": "class _A:\n    def f(self):\n        raise ValueError(1)",
    "named": 'def f():\n    """Raises ValueError."""\n    raise ValueError(1)',
    "again": 'def f():\n    """A."""\n    try:\n        g()\n    except KeyError:\n        raise',
    "caught": f'def f():\n    """A."""\n{RAISES}pass',
    "protocol": 'def f():\n    """A."""\n    raise NotImplementedError',
    "inside": 'def f():\n    """A."""\n    def g():\n        raise ValueError(1)',
    "unit": 'def f(read_bytes: int) -> None:\n    """`read_bytes` is in bytes."""',
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_missing_is_found(name: str) -> None:
    source, gap = SOURCES[name]
    assert list_gaps(ast.parse(source)) == [gap]


@pytest.mark.parametrize("name", FINE)
def test_what_is_there_is_no_gap(name: str) -> None:
    assert list_gaps(ast.parse(FINE[name])) == []
