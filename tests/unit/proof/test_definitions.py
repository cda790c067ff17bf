"""Definitions: what makes two texts compute the same, shown on small packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantmatrix.proof.definitions import Package
from quantmatrix.proof.source_modules import CodeError, Definition

HEAD = "import math\nfrom quantmatrix.other import helper, LIMIT\nfrom quantmatrix import other\n"
OTHER = (
    "LIMIT = 3\n\n\ndef helper(x):\n    return x * LIMIT\n\n\nclass Wrong(ValueError):\n    pass\n"
)


def digest(folder: Path, text: str, name: str = "entry", **files: str) -> str:
    """The digest of a definition in `main.py` of a package with these files."""
    for module, source in {"main": text, "other": OTHER, **files}.items():
        path = folder / f"{module.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    (folder / "__init__.py").touch()
    return Package(folder).digest(Definition("main", name))


@pytest.fixture
def compare(tmp_path: Path):  # type: ignore[no-untyped-def]
    def find(one: str, two: str, **files: str) -> bool:
        first = digest(tmp_path / "one", HEAD + one)
        return first == digest(tmp_path / "two", HEAD + two, **files)

    return find


SAME = {
    "docstring": ('def entry(x):\n    "a"\n    return x', "def entry(x):\n    return x"),
    "comment": ("def entry(x):\n    return x  # why", "def entry(x):\n    return x"),
    "annotations": ("def entry(x: int = 1) -> int:\n    y: int = x\n    return y",
                    "def entry(x=1):\n    y = x\n    return y"),
    "locals": ("def entry(x):\n    y = [z for z in x]\n    return y",
               "def entry(x):\n    found = [one for one in x]\n    return found"),
    "wording": ('def entry(x):\n    raise ValueError(f"{x} is bad")',
                'def entry(x):\n    raise ValueError("not a " + "good number")'),
    "wording of an own exception": ('def entry(x):\n    return other.Wrong("it is bad")',
                                    'def entry(x):\n    return other.Wrong(f"is {x} good?")'),
    "wording of a warning": ('def entry(x, warnings):\n    warnings.append("so it is")',
                             'def entry(x, warnings):\n    warnings.append(f"it is {x}")'),
    "a line for the log": ('def entry(x):\n    logger.debug("%s has %d", x.name, len(x))\n    return x',
                           "def entry(x):\n    return x"),
    "how a library is imported": ("def entry(x):\n    return math.sqrt(x)",
                                  "from math import sqrt as root\ndef entry(x):\n    return root(x)"),
    "how a definition is imported": ("def entry(x):\n    return helper(x)",
                                     "def entry(x):\n    return other.helper(x)"),
    "import in a function": ("def entry(x):\n    return helper(x)",
                             "def entry(x):\n    from quantmatrix.other import helper as h\n    return h(x)"),
    "cast": ("from typing import cast\ndef entry(x):\n    return cast('int', x)",
             "def entry(x):\n    return x"),
    "for types": ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gone import T\n"
                  "def entry(x: T):\n    return x", "def entry(x):\n    return x"),
    "a module's name in a text": ("from importlib import import_module\n"
                                  "def entry():\n    return import_module('quantmatrix.other')",
                                  "from importlib import import_module\n"
                                  "def entry():\n    return import_module('quantmatrix.new.place')"),
    "both names of a tuple": ("A, entry = 1, 2", "entry = 2"),
    "order and neighbours": ("B = 4\ndef entry(x):\n    return x + B",
                             "def entry(x):\n    return x + B\ndef unused(): ...\nB = 4"),
    "nested function": ("def entry(x):\n    def inner(y):\n        return y + x\n    return inner(x)",
                        "def entry(x):\n    def deep(y):\n        return y + x\n    return deep(x)"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_count(compare, name: str) -> None:  # type: ignore[no-untyped-def]
    assert compare(*SAME[name])


OTHERWISE = {
    "literal": ("def entry(x):\n    return x + 1", "def entry(x):\n    return x + 2"),
    "kind of literal": ("def entry():\n    return 1", "def entry():\n    return True"),
    "operator": ("def entry(x):\n    return x + 1", "def entry(x):\n    return x - 1"),
    "default": ("def entry(x=1):\n    return x", "def entry(x=2):\n    return x"),
    "keyword default": ("def entry(*, x=1):\n    return x", "def entry(*, x=2):\n    return x"),
    "parameter": ("def entry(a, b):\n    return a - b", "def entry(b, a):\n    return a - b"),
    "kind of parameter": ("def entry(a, b):\n    return a", "def entry(a, *, b):\n    return a"),
    "library call": ("def entry(x):\n    return math.sqrt(x)", "def entry(x):\n    return math.exp(x)"),
    "decorator": ("from functools import cache\n@cache\ndef entry(x):\n    return x",
                  "def entry(x):\n    return x"),
    "which local": ("def entry(x):\n    a, b = x\n    return a", "def entry(x):\n    a, b = x\n    return b"),
    "which exception": ('def entry():\n    raise ValueError("it is bad")',
                        'def entry():\n    raise other.Wrong("it is bad")'),
    "rule of an exception": ('def entry():\n    raise other.Wrong("fp8-rule", "it is bad")',
                             'def entry():\n    raise other.Wrong("int8-rule", "it is bad")'),
    "text": ('def entry():\n    return "a b"', 'def entry():\n    return "a c"'),
    "attribute": ("def entry(x):\n    return x.high", "def entry(x):\n    return x.low"),
    "method": ("class entry:\n    def run(self):\n        return 1",
               "class entry:\n    def run(self):\n        return 2"),
    "name of a method": ("class entry:\n    def run(self):\n        return 1",
                         "class entry:\n    def go(self):\n        return 1"),
    "field": ("class entry:\n    a: int = 1\n    b: int = 2", "class entry:\n    b: int = 2\n    a: int = 1"),
    "base": ("class entry(dict): ...", "class entry(list): ..."),
    "a shadowed name": ("def entry(x):\n    LIMIT = x\n    return LIMIT", "def entry(x):\n    return LIMIT"),
    "a changed table": ("entry = {}\nentry['a'] = 1", "entry = {}\nentry['a'] = 2"),
    "what a line for the log does": (
        "logger = math\ndef entry(x):\n    logger.debug(x.pop())\n    return x", "def entry(x):\n    return x"),
    "what becomes of the log": ("logger = math\ndef entry(x):\n    logger.addFilter(x)\n    return x",
                                "def entry(x):\n    return x"),
    "a walrus in the log": ("logger = math\ndef entry(x):\n    logger.debug(x := 1)\n    return x",
                            "def entry(x):\n    return x"),
    "a call beside": ("math.seed(1)\ndef entry():\n    return 1", "def entry():\n    return 1"),
    "what is tried first": ("def entry():\n    try:\n        import numpy\n    except ImportError:\n        return 1",
                            "def entry():\n    try:\n        import scipy\n    except ImportError:\n        return 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_counts(compare, name: str) -> None:  # type: ignore[no-untyped-def]
    assert not compare(*OTHERWISE[name])


def test_a_definition_counts_through_all_that_names_it(compare) -> None:  # type: ignore[no-untyped-def]
    text = "def middle(x):\n    return helper(x)\ndef entry(x):\n    return middle(x)"
    assert compare(text, text)
    assert not compare(text, text, other=OTHER.replace("= 3", "= 4"))
    assert compare(text, text, other=OTHER + "UNUSED = 5\n")


def test_files_and_names_of_what_is_named_do_not_count(compare) -> None:  # type: ignore[no-untyped-def]
    deep = "from quantmatrix.deep.place import"
    moved = {
        "other": f"{deep} assist as helper\n{deep} MOST as LIMIT\n",
        "deep.place": "MOST = 3\n\n\ndef assist(x):\n    return x * MOST\n",
        "deep.__init__": "",
    }
    assert compare(
        "def entry(x):\n    return helper(x)", "def entry(x):\n    return helper(x)", **moved
    )


CYCLE = "def entry(x):\n    return odd(x) if x else 1\ndef odd(x):\n    return entry(x - {step})\n"


def test_definitions_that_need_each_other(compare) -> None:  # type: ignore[no-untyped-def]
    one = CYCLE.format(step=1)
    renamed = one.replace("odd", "strange")
    turned = "".join(f"def {part}" for part in one.split("def ")[:0:-1])
    assert compare(one, renamed)
    assert compare(one, turned)
    assert not compare(one, CYCLE.format(step=2))


def test_the_own_name_does_not_count(tmp_path: Path) -> None:
    text = "def walk(x):\n    return walk(x - 1)\n"
    one = digest(tmp_path / "one", text, "walk")
    assert one == digest(tmp_path / "two", text.replace("walk", "go"), "go")
    assert one != digest(tmp_path / "three", text.replace("1", "2"), "walk")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def entry(x):\n    return nothing(x)", "main.py: entry, line 5: nothing cannot be resolved"),
        ("def entry(x):\n    return other.gone(x)", "gone cannot be resolved in"),
        ("from quantmatrix.gone import y\ndef entry(x):\n    return y", "no module quantmatrix.gone"),
        ("from quantmatrix.other import gone\ndef entry(x):\n    return gone", "gone cannot be resolved"),
        ("def entry(x:\n", "main.py: not Python"),
    ],
)  # fmt: skip
def test_a_name_that_means_nothing_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CodeError, match=message):
        digest(tmp_path, HEAD + text)


def test_every_definition_of_this_package_can_be_followed() -> None:
    import quantmatrix

    package = Package(Path(quantmatrix.__file__).parent)
    for path in package.folder.rglob("*.py"):
        parts = path.relative_to(package.folder).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for bound in package.need_module(name).bound:
            assert len(package.digest(Definition(name, bound))) == 64
