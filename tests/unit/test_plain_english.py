"""Names in the source are plain field English: the private dialect stays out."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import quantmatrix

ROOT = Path(quantmatrix.__file__).parent
SAY = {
    "made": "plan (of a Plan), or what was built",
    "told": "recorded, known, reported, or what it holds",
    "untold": "omitted",
    "strange": "unknown",
    "stranger": "unknown",
    "strangers": "unknown",
    "beyond": "exceeded",
    "anew": "again",
    "word": "flag, name, value or argument",
    "words": "flags, names, values, argv or arguments",
    "place": "path, source, index or offset",
    "places": "paths, sources, indices or offsets",
}
"""Parts of a name (between underscores, in any case) and what to say instead."""
VERBS = ("place",)
"""May begin the name of a function."""
KEPT = {
    "kernels/compiling.py": {"made"},
    "kernels/fp8_triton.py": {"places"},
    "kernels/int8_triton.py": {"place", "places"},
    "kernels/linear_fp8.py": {"places"},
    "kernels/packed_triton.py": {"place", "places"},
    "kernels/scale_layouts.py": {"place"},
    "kernels/svdq_packing.py": {"_as_words", "place", "words"},  # machine words of 16 bits
    "runtime/pipeline.py": {"made"},  # records of GPUs hang on names of parameters
    "request.py": {"from_words"},  # carry calls it in earlier revisions
    "tiny/hub.py": {"move_into_place"},
    "tiny/text_encoders.py": {"WORDS", "word", "words"},  # a tokenizer's
}
"""Names that stay, by file."""
FIELDS = ("made", "place_digest")
"""Fields of records and of their classes: keys of JSON files do not change."""


def list_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of everything that a module gives a name; fields of `FIELDS` are left out."""
    fields: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and ast.unparse(part.target) in FIELDS:
                    fields.add(id(part.target))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            verb, _, rest = node.name.partition("_")
            yield node.lineno, rest if verb in VERBS else node.name
        elif isinstance(node, ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            if id(node) not in fields:
                yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def find_dialect(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(line, name, what to say instead) of every name with a part of `SAY`."""
    for line, name in list_names(tree):
        for part in name.lower().split("_"):
            if part in SAY:
                yield line, name, SAY[part]


@pytest.mark.parametrize(
    "path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_names_are_plain_english(path: Path) -> None:
    file = path.relative_to(ROOT).as_posix()
    found = [
        f"{file}:{line}: {name}: say {instead}"
        for line, name, instead in find_dialect(ast.parse(path.read_text(encoding="utf-8")))
        if name not in KEPT.get(file, ())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("file", sorted(KEPT))
def test_kept_names_are_still_there(file: str) -> None:
    names = {name for _, name, _ in find_dialect(ast.parse((ROOT / file).read_text("utf-8")))}
    assert KEPT[file] <= names, f"{file}: take {sorted(KEPT[file] - names)} off the list"


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("def share(made: Plan): ...", ["made"]),
        ("for word in words: ...", ["word"]),
        ("place = 1", ["place"]),
        ("self.places = 1", ["places"]),
        ("def refuse_strangers(): ...", ["refuse_strangers"]),
        ("UNTOLD = 1", ["UNTOLD"]),
        ("class Made: ...", ["Made"]),
        ("found = [told for told in x]", ["told"]),
        ("def place_module(): ...", []),
        ("class Record:\n    made: str", []),
        ("password = keyword = placed = replace = 1", []),
    ],
)
def test_the_dialect_is_found(source: str, named: list[str]) -> None:
    assert [name for _, name, _ in find_dialect(ast.parse(source))] == named
