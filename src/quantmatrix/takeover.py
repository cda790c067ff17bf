"""Take-over: gives records that were made under the rule before the digests of `code_digest`.

`python -m quantmatrix.takeover [REPORTS]`, in a checkout with its history.

Such a record names a commit and a `code_digest`: of the files of the family, the model, the kernels
and formats that these import, and of `layers` and `load`. Where the files of that commit give this
digest, `device_digest` and `shared_digest` are computed from the same files and written beside it. A
record that was made with changes, or whose commit does not fit, is looked for in the history: the
commit nearest in time that fits all records that name the same commit, else the nearest that fits it
alone. What fits nowhere stays as it is, and is stale. Nothing else in a record changes, and one that
has the digests is left alone.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from quantmatrix import bench_results, matrix
from quantmatrix import evidence as records
from quantmatrix.bench_pages import describe_plan, find_scope
from quantmatrix.code_digest import Code
from quantmatrix.places import write_whole
from quantmatrix.scopes import read_scope

ENDS = ("layers", "load")
FOLLOWED = ("families", "kernels", "models", "formats", "scheme", "svdq_packing")
SOURCES = "src/quantmatrix"


class FormerRule:
    """The digest that records had before: of the texts of the modules of a path."""

    def __init__(self, package: Path) -> None:
        """`package` is the folder of a package as it was."""
        self.package = package
        self.digest = lru_cache(maxsize=256)(self._digest)
        self.list_imports = lru_cache(maxsize=256)(self._list_imports)
        self.read_statements = lru_cache(maxsize=256)(self._read_statements)

    def _digest(self, family: str, model: str) -> str:
        digest = hashlib.sha256()
        for module in self.list_modules(family, model):
            digest.update(f"{module}\n{self.read_statements(module)}".encode())
        return f"sha256:{digest.hexdigest()}"

    def list_modules(self, family: str, model: str) -> list[str]:
        """Modules of a path, sorted."""
        pending = [f"families.{family.replace('-', '_')}", f"models.{model.replace('-', '_')}"]
        found = set(ENDS)
        while pending:
            module = pending.pop()
            if module not in found and self.find_file(module).is_file():
                found.add(module)
                pending += self.list_imports(module)
        return sorted(found)

    def find_file(self, module: str) -> Path:
        """The file of a module, which need not be there."""
        path = self.package / module.replace(".", "/")
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def _list_imports(self, module: str) -> tuple[str, ...]:
        found: list[str] = []
        for node in walk_code(ast.parse(self.find_file(module).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quantmatrix"):
                base = (node.module or "").removeprefix("quantmatrix").lstrip(".")
                names = [".".join(filter(None, (base, alias.name))) for alias in node.names]
                found += [name for name in (base, *names) if name.split(".")[0] in FOLLOWED]
        return tuple(name for name in dict.fromkeys(found) if self.find_file(name).is_file())

    def _read_statements(self, module: str) -> str:
        text = self.find_file(module).read_text(encoding="utf-8")
        told: set[int] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                told.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        lines = enumerate(text.splitlines(), 1)
        kept = [line.rstrip() for number, line in lines if number not in told]
        return "\n".join(line for line in kept if line and not line.lstrip().startswith("#"))


def walk_code(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a module, imports for type checkers left out."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from walk_code(node)


class History:
    """The commits of a checkout that touch the code, and the code of each."""

    def __init__(self, root: Path, folder: Path) -> None:
        """Sources are put below `folder`, those of equal trees once."""
        self.root, self.folder = root, folder
        lines = self.ask("log", "--format=%H %ct", "HEAD").decode().splitlines()
        self.commits = {commit: int(time) for commit, time in map(str.split, lines)}
        self._common: dict[str, str | None] = {}
        self._opened: dict[str, tuple[FormerRule, Code] | None] = {}

    def ask(self, *words: str) -> bytes:
        """What git says."""
        command = ["git", "-C", str(self.root), *words]
        return subprocess.run(command, capture_output=True, check=True, timeout=120).stdout

    def open(self, commit: str) -> tuple[FormerRule, Code] | None:
        """Both rules on the code of a commit; None where it has none."""
        try:
            tree = self.ask("rev-parse", f"{commit}:{SOURCES}").decode().strip()
        except subprocess.CalledProcessError:
            return None
        if tree not in self._opened:
            package = self.folder / tree
            with tarfile.open(fileobj=io.BytesIO(self.ask("archive", tree))) as archive:
                for member in archive.getmembers():
                    if (stream := archive.extractfile(member)) is not None:
                        path = package / member.name
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(stream.read())
            self._opened[tree] = FormerRule(package), Code(package)
        return self._opened[tree]

    def list_near(self, record: dict[str, Any]) -> list[str]:
        """The commit that a record names, then all others, the nearest to its time first."""
        named = record["commit"].removesuffix("+changes")
        made = datetime.fromisoformat(record["made"].replace("Z", "+00:00")).timestamp()
        others = sorted(self.commits, key=lambda commit: abs(self.commits[commit] - made))
        return [*([named] if named in self.commits else []), *others]

    def fits(self, commit: str, cell: dict[str, Any]) -> bool:
        """Whether the files of a commit give a record's former digest."""
        opened = self.open(commit)
        try:
            found = opened[0].digest(cell["family"], cell["model"]) if opened else ""
        except (OSError, SyntaxError):
            return False
        return bool(found == cell["code_digest"])

    def find(self, record: dict[str, Any], group: Sequence[dict[str, Any]]) -> str | None:
        """The commit whose code made a record; `group` are all records that name its commit."""
        key = record["commit"]
        if key not in self._common:
            cells = list({repr(path_of(one["cell"])): one["cell"] for one in group}.values())
            near = self.list_near(group[0])
            fitting = (c for c in near if all(self.fits(c, cell) for cell in cells))
            self._common[key] = next(fitting, None)
        if common := self._common[key]:
            return common
        return next((c for c in self.list_near(record) if self.fits(c, record["cell"])), None)


def path_of(cell: dict[str, Any]) -> tuple[str, ...]:
    """What a former digest depends on, and the digest."""
    return cell["family"], cell["model"], cell["code_digest"]


@dataclass
class Kept:
    """A record or a benchmark's result, and the file that it lies in."""

    data: dict[str, Any]
    plan: dict[str, Any]
    scope: str
    write: Callable[[], object]
    what: str


def read_all(reports: Path) -> Iterator[Kept]:
    """Every record and every result below a reports folder, as plain data."""
    for path in sorted(reports.glob("evidence/*/[!.]*.json")):
        data = json.loads(path.read_bytes())
        scope = read_scope(records.read(path))
        yield Kept(data, data["plan"], scope, partial(put, path, data), "record")
    for path in sorted(reports.glob("benchmarks/*/[!.]*.json")):
        page = json.loads(path.read_bytes())
        results = page["results"]
        for result in results:
            write = partial(bench_results.write, results, page["planned"], path)
            plan, scope = describe_plan(result), find_scope(result)
            yield Kept(result, plan, scope, write, "benchmark")


def put(path: Path, data: dict[str, Any]) -> None:
    """Write a record as `evidence` does."""
    text = json.dumps(data, indent=1, sort_keys=True, allow_nan=False)
    write_whole(path, f"{text}\n".encode())


def take_over(kept: Kept, group: Sequence[dict[str, Any]], history: History) -> str:
    """Write the digests of one record; returns what happened, in words."""
    cell = kept.data["cell"]
    commit = history.find(kept.data, group)
    opened = history.open(commit) if commit else None
    if commit is None or opened is None:
        return f"{kept.what}: fits no commit"
    row = matrix.read().hardware[cell["hardware"]]
    cell |= opened[1].describe(cell, kept.plan, (row.vendor, row.arch), kept.scope)
    kept.write()
    exact = commit == kept.data["commit"]
    return f"{kept.what}: taken over from {'its commit' if exact else commit[:12]}"


def main(words: list[str]) -> int:
    """Take over every record and benchmark below a reports folder; prints counts."""
    reports = Path(words[0] if words else "reports")
    known = [kept for kept in read_all(reports) if "shared_digest" not in kept.data["cell"]]
    former = [kept for kept in known if "code_digest" in kept.data["cell"]]
    counts = Counter({"no former digest": len(known) - len(former)})
    groups: dict[str, list[dict[str, Any]]] = {}
    for kept in former:
        groups.setdefault(kept.data["commit"], []).append(kept.data)
    with tempfile.TemporaryDirectory() as name:
        history = History(reports.resolve().parent, Path(name))
        counts.update(take_over(kept, groups[kept.data["commit"]], history) for kept in former)
    print("\n".join(f"{count} {what}" for what, count in sorted(counts.items()) if count))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
