"""Which nodes of a syntax tree compute something, one construct at a time."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from quantmatrix.proof import normal_form, source_modules
from quantmatrix.proof.definitions import Package, hash_texts
from quantmatrix.proof.source_modules import CodeError, Definition, Module, UnknownValueError

HEAD = "import math\nfrom typing import cast\nfrom pathlib import Path\nlogger = math\n"


def digest(folder: Path, text: str) -> str:
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "main.py").write_text(HEAD + text)
    return Package(folder).digest(Definition("main", "entry"))


def body(*lines: str) -> str:
    return "def entry(x, warnings=()):\n" + "".join(f"    {line}\n" for line in lines)


SAME = {
    "message of an assert": (body("assert x, 'a b'"), body("assert x, f'{x} c'")),
    "no message": (body("assert x, 'a b'"), body("assert x")),
    "keyword remedy": (body("return x(remedy='a b')"), body("return x(remedy='c d')")),
    "keyword help": (body("return x(help='a b')"), body("return x(help=f'{x}')")),
    "keyword message": (body("return x(message='a b')"), body("return x(message='c ' + x)")),
    "warnings added to": (body("warnings += ['a b']"), body("warnings += ['c d']")),
    "warnings.warn": (body("warnings.warn('a b')"), body("warnings.warn('c d' % x)")),
    "joined words": (body("raise ValueError(', '.join(x))"), body("raise ValueError('a {}'.format(x))")),
    "words by a condition": (body("raise ValueError('a b' if x else 'c d')"),
                             body("raise ValueError('e f' if x else f'g')")),
    "pass": (body("pass", "return x"), body("return x")),
    "dots": (body("...", "return x"), body("return x")),
    "local annotation alone": (body("y: int", "return x"), body("return x")),
    "import in a function": (body("import math as m", "return m.sqrt(x)"), body("return math.sqrt(x)")),
    "dotted import": (body("import os.path", "return os.path.join(x)"),
                      body("from os import path", "return path.join(x)")),
    "how deep a file lies": (body("return Path(__file__).parents[2]"), body("return Path(__file__).parent")),
    "depth and depth": (body("return Path(__file__).parents[2]"), body("return Path(__file__).parents[5]")),
    "log of info": (body("logger.info('%s', len(x))", "return x"), body("return x")),
    "log of error": (body("logger.error(x.name)", "return x"), body("return x")),
    "log of warning": (body("logger.warning('a')", "return x"), body("return x")),
    "caught name": (body("try:", "    return x()", "except ValueError as e:", "    return e"),
                    body("try:", "    return x()", "except ValueError as error:", "    return error")),
    "name of a pattern": (body("match x:", "    case [a, *b]:", "        return a, b"),
                          body("match x:", "    case [c, *d]:", "        return c, d")),
    "rest of a mapping": (body("match x:", "    case {'k': a, **b}:", "        return a, b"),
                          body("match x:", "    case {'k': c, **d}:", "        return c, d")),
    "whole of a pattern": (body("match x:", "    case [1] as a:", "        return a"),
                           body("match x:", "    case [1] as b:", "        return b")),
    "local class": (body("class A:", "    y = 1", "return A"), body("class B:", "    y = 1", "return B")),
    "local async": (body("async def f(): return x", "return f"), body("async def g(): return x", "return g")),
    "walrus": (body("return [y := z for z in x], y"), body("return [a := b for b in x], a")),
    "loops in a loop": (body("return {a: b for a in x for b in a if b}"),
                        body("return {c: d for c in x for d in c if d}")),
    "global": (f"Y = 1\n{body('global Y', 'return Y')}", f"Y = 1\n{body('return Y')}"),
    "nonlocal": (body("y = 1", "def f():", "    nonlocal y", "    y = 2", "return f"),
                 body("z = 1", "def f():", "    nonlocal z", "    z = 2", "return f")),
    "for types with else": (
        "from typing import TYPE_CHECKING\n" + body("if TYPE_CHECKING: x = 1", "else: x = 2", "return x"),
        "from typing import TYPE_CHECKING\n" + body("if TYPE_CHECKING: x = 9", "else: x = 2", "return x")),
    "entry point": (body("return x") + "if __name__ == '__main__':\n    entry(1)\n", body("return x")),
    "annotated constant": ("entry: int = 3\n", "entry = 3\n"),
    "one of a chain": ("entry = other = 3\n", "entry = 3\n"),
    "one of a list": ("[a, entry] = 1, 2\n", "entry = 2\n"),
    "annotated class field": ("class entry:\n    a: int\n", "class entry:\n    a: str\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_what_computes_nothing(name: str, tmp_path: Path) -> None:
    one, other = SAME[name]
    assert digest(tmp_path / "a", one) == digest(tmp_path / "b", other)


OTHERWISE = {
    "condition of an assert": (body("assert x"), body("assert not x")),
    "another keyword": (body("return x(text='a b')"), body("return x(text='c d')")),
    "keyword remedy without a blank": (body("return x(remedy='ab')"), body("return x(remedy='cd')")),
    "other list added to": (body("y = []", "y += ['a b']"), body("y = []", "y += ['c d']")),
    "attribute added to": (body("x.warnings += ['a b']"), body("x.warnings += ['c d']")),
    "other words": (body("return ', '.join(x)"), body("return '; '.join(x)")),
    "other method of a text": (body("raise ValueError('ab'.strip(x))"), body("raise ValueError('ac'.strip(x))")),
    "words by a condition that are none": (body("raise ValueError('a b' if x else 'c')"),
                                           body("raise ValueError('a b' if x else 'd')")),
    "product of words": (body("raise ValueError(x * 'ab')"), body("raise ValueError(x * 'ac')")),
    "cast of one": (body("return cast(x)"), body("return x")),
    "cast of three": (body("return cast(x, x, 1)"), body("return x")),
    "value of a cast": (body("return cast('int', x.a)"), body("return cast('int', x.b)")),
    "parents of another path": (body("return Path(x).parents[2]"), body("return Path(x).parents[3]")),
    "parents by a name": (body("return Path(__file__).parents[x]"), body("return Path(__file__).parents[1]")),
    "parts of a path": (body("return Path(__file__).parts[2]"), body("return Path(__file__).parts[3]")),
    "log of another level": (body("logger.critical('a')"), body("pass")),
    "log of a call": (body("logger.info(max(x))"), body("pass")),
    "log that waits": ("async " + body("logger.info(await x)"), "async " + body("pass")),
    "log that gives": (body("logger.info((yield x))"), body("pass")),
    "log elsewhere": ("log = math\n" + body("log.info('a')"), body("pass")),
    "what is caught": (body("try:", "    x()", "except ValueError:", "    pass"),
                       body("try:", "    x()", "except TypeError:", "    pass")),
    "import that is tried": (body("try:", "    import numpy", "except ValueError:", "    pass"),
                             body("try:", "    pass", "except ValueError:", "    pass")),
    "which of two names": (body("match x:", "    case [a, b]:", "        return a"),
                           body("match x:", "    case [a, b]:", "        return b")),
    "name of a class's own": (body("class A:", "    y = 1", "return A"), body("class A:", "    z = 1", "return A")),
    "order of a chain": ("entry, a = 1, 2\n", "a, entry = 1, 2\n"),
    "starred": ("entry, *a = 1, 2\n", "entry, *a = 1, 3\n"),
    "class fields": ("class entry:\n    a: int\n", "class entry:\n    b: int\n"),
    "class field or none": ("class entry:\n    a: int\n", "class entry: ...\n"),
    "keyword of a class": ("class entry(metaclass=dict): ...\n", "class entry(metaclass=list): ...\n"),
    "only positional": ("def entry(a, /, b): ...\n", "def entry(a, b, /): ...\n"),
    "rest": ("def entry(*a): return a\n", "def entry(**a): return a\n"),
    "keyword without a default": ("def entry(*, a, b=None): ...\n", "def entry(*, a=None, b): ...\n"),
    "lambda": ("entry = lambda a: a\n", "entry = lambda a: -a\n"),
    "async": ("async def entry(a): return a\n", "def entry(a): return a\n"),
    "kind of loop": (body("return [a for a in x]"), body("return {a for a in x}")),
    "what is looped over": (body("return [a for a in x.b]"), body("return [a for a in x.c]")),
    "condition of a loop": (body("return [a for a in x if a]"), body("return [a for a in x]")),
    "key of a table": (body("return {a: 1 for a in x}"), body("return {1: a for a in x}")),
    "global or local": (f"Y = 1\n{body('global Y', 'Y = 2', 'return Y')}", f"Y = 1\n{body('Y = 2', 'return Y')}"),
    "condition": (body("if x: return 1"), body("if not x: return 1")),
    "else": (body("if x: y = 1", "else: y = 2", "return y"), body("if x: y = 1", "else: y = 3", "return y")),
    "statement beside": ("math.seed(1)\nentry = 1\n", "math.seed(2)\nentry = 1\n"),
    "changed twice": ("entry = []\nentry.append(1)\n", "entry = []\nentry.append(2)\n"),
    "changed attribute": ("entry = math\nentry.a = 1\n", "entry = math\nentry.b = 1\n"),
    "added to": ("entry = 1\nentry += 1\n", "entry = 1\nentry -= 1\n"),
    "class body sees no class": (
        "y = 1\nclass entry:\n    y = 2\n    def f(self): return y\n",
        "y = 3\nclass entry:\n    y = 2\n    def f(self): return y\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_computes_something(name: str, tmp_path: Path) -> None:
    one, other = OTHERWISE[name]
    assert digest(tmp_path / "a", one) != digest(tmp_path / "b", other)


def expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("'a b'", True), ("'ab'", False), ("'a\\tb'", True), ("7", False), ("None", False), ("b'a b'", False),
        ("f'{x}'", True), ("'a b' + x", True), ("x + 'a b'", True), ("x + y", False), ("'a b' % x", True),
        ("'a b' * x", False), ("'a b' - x", False), ("'a b' if x else 'c d'", True),
        ("'a b' if x else 'c'", False), ("'a' if x else 'c d'", False), ("', '.join(x)", True),
        ("''.join(x)", True), ("'{}'.format(x)", True), ("f'{x}'.join(y)", True), ("'a b'.strip()", False),
        ("x.join(y)", False), ("join('a b')", False), ("x", False), ("'a b'.format", False),
    ],
)  # fmt: skip
def test_wording(text: str, found: bool) -> None:
    assert bool(normal_form.is_wording(expression(text))) is found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("warnings.warn", True), ("warnings.append", True), ("warnings", False), ("x.warnings.warn", False),
        ("warninga.warn", False), ("warningz.warn", False),
    ],
)  # fmt: skip
def test_warnings(text: str, found: bool) -> None:
    assert normal_form.is_warning(expression(text)) is found


def statement(text: str) -> ast.stmt:
    [one] = ast.parse(text).body
    return one


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("'a'", True), ("...", True), ("7", True), ("pass", True), ("x", False), ("x()", False),
        ("y = 'a'", False), ("return", False),
    ],
)  # fmt: skip
def test_statements_without_effect(text: str, found: bool) -> None:
    node = statement(f"def f():\n    {text}").body[0]  # type: ignore[attr-defined]
    assert source_modules.is_docstring(node) is found


@pytest.mark.parametrize(
    ("text", "entry", "types"),
    [
        ("if __name__ == '__main__': x", True, False), ("if TYPE_CHECKING: x", False, True),
        ("if typing.TYPE_CHECKING: x", False, True), ("if not TYPE_CHECKING and y: x", False, True),
        ("if y: x", False, False), ("if y.__name__: x", True, False), ("if 'TYPE_CHECKING': x", False, False),
    ],
)  # fmt: skip
def test_conditions_of_a_module(text: str, entry: bool, types: bool) -> None:
    node = statement(text)
    assert source_modules.is_entry(node) is entry
    assert isinstance(node, ast.If)
    assert source_modules.is_for_types(node) is types


@pytest.mark.parametrize(
    ("text", "root"),
    [
        ("A.append(1)", "A"), ("A['b'] = 1", "A"), ("A.b = 1", "A"), ("A.b['c'].d(1)['e'] = 2", "A"),
        ("A += 1", "A"), ("A.b += 1", "A"), ("A.b()", "A"), ("A()", "A"), ("'a'.b()", ""), ("del A", ""),
        ("A.b = B.c = 1", "A"), ("assert A", ""),
    ],
)  # fmt: skip
def test_what_a_statement_changes(text: str, root: str) -> None:
    assert source_modules.find_root(statement(text)) == root


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a = b = c", ["a", "b"]), ("a, (b, *c) = d", ["a", "b", "c"]), ("def f(x): y = 1", ["f"]),
        ("class C:\n    y = 1", ["C"]), ("async def f(): ...", ["f"]), ("for a in b: c = 1", ["a", "c"]),
        ("with a as b: ...", ["b"]), ("import a", []), ("x = [y := z for z in w]", ["x", "y"]),
        ("try: a = 1\nexcept E as b: c = 1", ["a", "b", "c"]), ("x = lambda y: (z := y)", ["x"]),
        ("match a:\n    case [b, *c]: ...\n    case {'d': 1, **e}: ...\n    case 1 as f: ...\n"
         "    case _: ...", ["b", "c", "e", "f"]),
        ("del a", ["a"]), ("a.b = 1", []), ("a: int = 1", ["a"]), ("a += 1", ["a"]),
        ("match a:\n    case {'d': 1}: ...\n    case [*_]: ...", []),
    ],
)  # fmt: skip
def test_names_that_statements_bind(text: str, names: list[str]) -> None:
    assert source_modules.list_bound(ast.parse(text).body) == names


@pytest.mark.parametrize(
    ("text", "module", "is_package", "found"),
    [
        ("import a", "m", False, {"a": ("a", "")}), ("import a.b.c", "m", False, {"a": ("a", "")}),
        ("import a.b as c, d", "m", False, {"c": ("a.b", ""), "d": ("d", "")}),
        ("from a.b import c as d, e", "m", False, {"d": ("a.b", "c"), "e": ("a.b", "e")}),
        ("from . import a", "p.q.m", False, {"a": ("quantmatrix.p.q", "a")}),
        ("from . import a", "p.q", True, {"a": ("quantmatrix.p.q", "a")}),
        ("from .x import a", "p.q.m", False, {"a": ("quantmatrix.p.q.x", "a")}),
        ("from ..x.y import a", "p.q.m", False, {"a": ("quantmatrix.p.x.y", "a")}),
        ("from .. import a", "p.q", True, {"a": ("quantmatrix.p", "a")}),
        ("from . import a", "", True, {"a": ("quantmatrix", "a")}),
        ("from ... import a", "p.q.m", False, {"a": ("quantmatrix", "a")}),
    ],
)  # fmt: skip
def test_what_an_import_means(
    text: str, module: str, is_package: bool, found: dict[str, tuple[str, str]]
) -> None:
    node = statement(text)
    assert isinstance(node, (ast.Import, ast.ImportFrom))
    assert source_modules.read_import(node, module, is_package) == found


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a = 1", "1"), ("b = a = 2", "2"), ("b, a = 3, 4", "4"), ("[a, b] = 5, 6", "5"),
        ("b = c, a = 7, 8", "8"), ("a, *b = 1, 2", None), ("a, b = 1, *c", None), ("a, b = c", None),
        ("a, b = [1, 2]", None), ("b = 1", None), ("a.b = 1", None),
    ],
)  # fmt: skip
def test_the_value_of_one_name(text: str, value: str | None) -> None:
    node = statement(text)
    assert isinstance(node, ast.Assign)
    if value is None:
        with pytest.raises(UnknownValueError, match=r"^a$"):
            source_modules.pick_value(node, "a")
        return
    assert ast.unparse(source_modules.pick_value(node, "a")) == value


def test_statements_of_a_module_are_sorted() -> None:
    text = (
        "'doc'\nimport z\nif TYPE_CHECKING:\n    import t\nelse:\n    e = 1\n"
        "A = []\nA.append(1)\nz.seed(1)\nA[0] = B = 2\nif x:\n    C = 1\nelse:\n    C = 2\n"
        "if __name__ == '__main__':\n    D = 1\nz = 3\n"
    )
    found = Module("m", Path("m.py"), ast.parse(text))
    assert {name: len(statements) for name, statements in found.bound.items()} == {
        "e": 1, "A": 1 + 1, "B": 1, "C": 1
    }  # fmt: skip
    assert found.imports == {"z": ("z", "")}
    assert [ast.unparse(one) for one in found.effects] == ["z.seed(1)", "z = 3"]


def make_package(folder: Path, **files: str) -> Package:
    (folder / "__init__.py").touch()
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return Package(folder)


VALUES = (
    "from quantmatrix.other import WIDE\n"
    "A = 1\nB: int = 2\nC = (A, *WIDE, 'x')\nD = {'k': A, **{'l': B}, A: C}\nE = [B]\n"
    "F = dict.fromkeys(('p', 'q'), A)\nG = len(C)\nH = 1 + 2\nI = 1\nI = 2\n"
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("A", 1), ("B", 2), ("C", (1, 7, 8, "x")), ("D", {"k": 1, "l": 2, 1: (1, 7, 8, "x")}),
        ("E", (2,)), ("F", {"p": 1, "q": 1}), ("WIDE", (7, 8)), ("G", None), ("H", None), ("I", None),
    ],
)  # fmt: skip
def test_values_of_constants(name: str, value: object, tmp_path: Path) -> None:
    package = make_package(tmp_path, main=VALUES, other="WIDE = 7, 8\n")
    if value is None:
        with pytest.raises(UnknownValueError):
            package.evaluate(*package.open_constant("main", name))
        return
    module, node = package.open_constant("main", name)
    assert module == ("other" if name == "WIDE" else "main")
    assert package.evaluate(module, node) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def entry(x):\n    return nothing(x)\n", "{main}: entry, line 2: nothing cannot be resolved"),
        ("from quantmatrix.gone import y\nentry = y\n", "{main}: no module quantmatrix.gone is there"),
        ("from quantmatrix.other import y\nentry = y\n", "{main}: y cannot be resolved in {other}"),
        ("from quantmatrix import other\ndef entry():\n    return other.y\n",
         "{main}: entry, line 3: y cannot be resolved in {other}"),
        ("def entry(x:\n", "{main}: not Python '(' was never closed (<unknown>, line 1): expected source code"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_in_words(text: str, words: str, tmp_path: Path) -> None:
    package = make_package(tmp_path, main=text, other="x = 1\n")
    said = words.format(main=tmp_path / "main.py", other=tmp_path / "other.py")
    with pytest.raises(CodeError, match=f"^{re.escape(said)}$"):
        package.digest(Definition("main", "entry"))
    with pytest.raises(
        CodeError, match=f"^{re.escape(f'{tmp_path}: no module quantmatrix.z is there')}$"
    ):
        package.need_module("z")


def test_texts_are_kept_apart() -> None:
    assert hash_texts(["ab", "c"]) != hash_texts(["a", "bc"])
    assert hash_texts(["a\ud800"]) != hash_texts(["a"])
    assert len(hash_texts([])) == 64
