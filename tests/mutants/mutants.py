"""Mutants: one place of the source changed at a time, and the tests that see it run.

    nox -s mutants -- --sample 300 --seed 7      # resumes where it was stopped
    nox -s mutants -- --sample 300 --seed 7 --only kernels --write

cosmic-ray makes the mutants and keeps their results; here is what it lacks: a sample by a seed, the
tests of a place instead of all of them (`places`), mutants that nobody can see left out, equivalent
ones listed with a reason (`equivalents.csv`), and a table by module. Everything happens in a copy of
the checkout below `.mutants`, which belongs to one state of source and tests: another state begins
again. mutmut was looked at: it copies every mutant of a function into the file, which tests of the
sources then read, and leaves module level alone, where tables of limits and orders stand.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import places
from places import Seen

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SOURCE = "src/quantmatrix"
COPIED = ("src", "tests", "matrix", "reports", "benchmarks")
DEVICE_ONLY = ("_triton", "nvfp4_flashinfer", "compiled", "compiling", "true_launches")
"""Ends of names of modules whose functions run on a GPU, or need its compiler, alone."""
SAME = tuple(
    f"ReplaceComparisonOperator_{pair}" for pair in ("Eq_Is", "Is_Eq", "NotEq_IsNot", "IsNot_NotEq")
)
"""Operators that exchange equality and identity: of None and of short texts no test may tell them."""
TABLE = HERE / "README.md"
MARK = "<!-- table -->"
GOAL = 92.0


@dataclass
class Score:
    """Mutants of one module."""

    killed: int = 0
    survived: list[str] = field(default_factory=list)
    equivalent: int = 0

    @property
    def percent(self) -> float:
        """Killed among those that can change behaviour; 100 where there are none."""
        total = self.killed + len(self.survived)
        return 100.0 * self.killed / total if total else 100.0


def main(argv: Sequence[str]) -> int:
    """Prepare, sample, run, and tell; 1 when less than `GOAL` per cent were killed."""
    given = parse(argv)
    if shutil.which("git") is None:
        raise SystemExit("mutants: git is needed to copy the checkout")
    state = digest_state()
    place = ROOT / ".mutants" / state
    tree = place / "tree"
    copy_tree(tree)
    seen = read_seen(place, tree, given)
    part = hashlib.sha256(" ".join((*given.only, "|", *given.tests)).encode()).hexdigest()[:8]
    session = place / f"sample-{given.sample}-{given.seed}-{part}.sqlite"
    os.chdir(tree)
    if not session.is_file():
        make_session(session, given)
    run_session(session, seen, given)
    scores = read_scores(session)
    tell(scores, given)
    percent = sum_scores(scores).percent
    return 0 if percent >= GOAL else 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(prog="mutants")
    parser.add_argument("--sample", type=int, default=300, help="mutants to run (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of paths of modules")
    parser.add_argument("--seconds", type=float, default=60.0, help="of tests per mutant, at most")
    parser.add_argument("--tests", nargs="+", default=["tests/unit"], help="tests to look at")
    parser.add_argument("--workers", type=int, default=2, help="of the run that records the tests")
    parser.add_argument("--write", action="store_true", help=f"put the table into {TABLE.name}")
    return parser.parse_args(argv)


def list_files() -> list[Path]:
    """Tracked files of the folders that tests read, and those at the top."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [Path(line) for line in done.stdout.splitlines()]
    return [
        p for p in paths if (len(p.parts) == 1 or p.parts[0] in COPIED) and (ROOT / p).is_file()
    ]


def digest_state() -> str:
    """Names the state of source and tests."""
    digest = hashlib.sha256()
    for path in list_files():
        if path.suffix == ".py" and path.parts[:2] != ("tests", "mutants"):
            digest.update(f"{path}\n".encode() + (ROOT / path).read_bytes())
    return digest.hexdigest()[:16]


def copy_tree(tree: Path) -> None:
    """The checkout, in which mutants are made; a mutant that an ended run left is undone."""
    for path in list_files():
        target = tree / path
        if not target.is_file() or target.read_bytes() != (ROOT / path).read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, target)


def environment(tree: Path) -> dict[str, str]:
    """Variables of processes that import the copy."""
    path = os.pathsep.join([str(tree / "src"), str(HERE)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def read_seen(place: Path, tree: Path, given: argparse.Namespace) -> Seen:
    """Which tests execute which lines: recorded once for a state and a choice of tests."""
    import coverage

    name = hashlib.sha256(" ".join(given.tests).encode()).hexdigest()[:8]
    folder = place / f"seen-{name}"
    if not (folder / "seconds.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "watch_tests", *given.tests]
        command += ["-n", str(given.workers)] if given.workers > 1 else ["-p", "no:xdist"]
        variables = environment(tree) | {"QUANTMATRIX_SEEN": str(folder)}
        done = subprocess.run(command, cwd=tree, env=variables)
        if done.returncode:
            (folder / "seconds.json").unlink(missing_ok=True)
            raise SystemExit("mutants: the tests fail without a mutant; nothing can be learnt")
    lines: dict[str, dict[int, list[str]]] = {}
    for file in folder.glob("coverage.*"):
        data = coverage.CoverageData(basename=str(file))
        data.read()
        for source in data.measured_files():
            known = lines.setdefault(str(Path(source).relative_to(tree)), {})
            for line, contexts in data.contexts_by_lineno(source).items():
                known.setdefault(line, []).extend(test for test in contexts if test)
    return Seen(lines, json.loads((folder / "seconds.json").read_text()))


def make_session(session: Path, given: argparse.Namespace) -> None:
    """All mutants of the chosen modules, of which a sample stays to be run."""
    from cosmic_ray.commands.init import init
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    paths = sorted(path for path in Path(SOURCE).rglob("*.py") if is_chosen(path, given.only))
    partial = session.with_suffix(".part")
    partial.unlink(missing_ok=True)
    with use_db(str(partial), WorkDB.Mode.create) as database:
        init(paths, database, {})
        items = sorted(database.work_items, key=order_of)
        trees = {path: ast.parse(path.read_text()) for path in paths}
        visible = [item for item in items if not is_hidden(item.mutations[0], trees)]
        chosen = random.Random(given.seed).sample(visible, min(given.sample, len(visible)))
        kept = {item.job_id for item in chosen}
        others = [item.job_id for item in items if item.job_id not in kept]
        for start in range(0, len(others), 500):
            skipped = WorkResult(WorkerOutcome.SKIPPED, "not in the sample")
            database.set_multiple_results(others[start : start + 500], skipped)
        print(
            f"{len(paths)} modules, {len(visible)} mutants that can be seen, {len(chosen)} chosen"
        )
    partial.replace(session)


def is_chosen(path: Path, only: Sequence[str]) -> bool:
    """Whether a module is mutated."""
    return any(part in str(path) for part in only) and not path.stem.endswith(DEVICE_ONLY)


def order_of(item: Any) -> tuple[Any, ...]:
    """A mutant's place in an order that does not change from run to run."""
    one = item.mutations[0]
    return str(one.module_path), one.operator_name, one.occurrence, repr(one.operator_args)


def is_hidden(mutation: Any, trees: dict[Path, ast.Module]) -> bool:
    """Whether a mutant changes nothing that is executed, or nothing that counts."""
    return mutation.operator_name.endswith(SAME) or places.is_unseen(
        trees[Path(mutation.module_path)], tuple(mutation.start_pos)
    )


def run_session(session: Path, seen: Seen, given: argparse.Namespace) -> None:
    """Run the mutants that have no result yet; each result is kept at once."""
    from cosmic_ray.mutating import mutate_and_test
    from cosmic_ray.work_db import WorkDB, use_db

    tree = Path.cwd()
    os.environ.update(environment(tree))
    importers = find_importers(tree)
    with use_db(str(session), WorkDB.Mode.open) as database:
        pending = sorted(database.pending_work_items, key=order_of)
        for number, item in enumerate(pending, 1):
            one = item.mutations[0]
            path = Path(one.module_path)
            near = importers.get(places.module_of(path, Path("src")), [])
            parsed = ast.parse(path.read_text())
            tests, left = places.choose_tests(
                seen, str(path), parsed, one.start_pos[0], near, given.seconds
            )
            command = shlex.join(
                [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p",
                 "no:cacheprovider", *tests]
            ) if tests else "true"  # fmt: skip
            result = mutate_and_test(item.mutations, command, 60 + 5 * given.seconds)
            database.set_result(item.job_id, result)
            word = "killed" if result.is_killed else "SURVIVED"
            place = f"{path}:{one.start_pos[0]} {one.operator_name.partition('/')[2]}"
            note = f", {left} left out" if left else ""
            print(f"{number}/{len(pending)} {word} {place} ({len(tests)} tests{note})", flush=True)


def find_importers(tree: Path) -> dict[str, list[str]]:
    """Test files by the modules that they import."""
    found: dict[str, list[str]] = {}
    for path in sorted((tree / "tests").rglob("test_*.py")):
        for module in places.imports_of(ast.parse(path.read_text())):
            found.setdefault(module, []).append(str(path.relative_to(tree)))
    return found


def read_equivalents() -> set[tuple[str, str, str, str]]:
    """(definition, operator, removed line, added line) of mutants that change nothing."""
    with (HERE / "equivalents.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    if bare := [row for row in rows if not (row["reason"] or "").strip()]:
        raise SystemExit(f"equivalents.csv: {bare[0]['definition']}: a reason is missing")
    return {(row["definition"], row["operator"], row["was"], row["now"]) for row in rows}


def read_scores(session: Path) -> dict[str, Score]:
    """Results by module."""
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import WorkerOutcome

    equivalents = read_equivalents()
    scores: dict[str, Score] = {}
    with use_db(str(session), WorkDB.Mode.open) as database:
        items = {item.job_id: item.mutations[0] for item in database.work_items}
        for job, result in database.results:
            if result.worker_outcome in (WorkerOutcome.SKIPPED, WorkerOutcome.NO_TEST):
                continue
            one = items[job]
            score = scores.setdefault(str(Path(one.module_path).relative_to(SOURCE)), Score())
            if result.is_killed:
                score.killed += 1
                continue
            was, now = changed_lines(result.diff or "")
            operator = one.operator_name.partition("/")[2]
            if (one.definition_name or "", operator, was, now) in equivalents:
                score.equivalent += 1
            else:
                place = f"{one.module_path}:{one.start_pos[0]} {one.definition_name or ''}"
                score.survived.append(f"{place} {operator}: {was} -> {now}")
    return scores


def changed_lines(diff: str) -> tuple[str, str]:
    """(removed, added) lines of a diff, without indentation, joined by a space."""
    lines = [line for line in diff.splitlines() if not line.startswith(("---", "+++"))]
    removed, added = (
        " ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+"
    )
    return removed, added


def sum_scores(scores: dict[str, Score]) -> Score:
    """All modules together."""
    total = Score()
    for score in scores.values():
        total.killed += score.killed
        total.survived += score.survived
        total.equivalent += score.equivalent
    return total


def group_scores(scores: dict[str, Score]) -> dict[str, Score]:
    """By folder below the package; modules beside it are `(top)`."""
    groups: dict[str, dict[str, Score]] = {}
    for module, score in scores.items():
        folder = str(Path(module).parent)
        groups.setdefault("(top)" if folder == "." else folder, {})[module] = score
    return {folder: sum_scores(found) for folder, found in sorted(groups.items())}


def write_table(scores: dict[str, Score], given: argparse.Namespace) -> str:
    """The Markdown table."""
    rows = [*group_scores(scores).items(), ("all", sum_scores(scores))]
    modules = "all modules" if given.only == [""] else "modules " + " ".join(given.only)
    tests = " ".join(path.removeprefix("tests/unit/test_") for path in given.tests)
    lines = [
        f"Sample of {given.sample}, seed {given.seed}; {modules}; seen by {tests}.",
        "",
        "| folder | killed | survived | equivalent | killed of those that matter |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {name} | {s.killed} | {len(s.survived)} | {s.equivalent} | {s.percent:.1f} % |"
            for name, s in rows
        ),
    ]
    return "\n".join(lines)


def tell(scores: dict[str, Score], given: argparse.Namespace) -> None:
    """Print survivors and the table; with `--write` the table goes into the page, too."""
    for line in survivors(scores.values()):
        print(f"survived: {line}")
    table = write_table(scores, given)
    print(table)
    if given.write:
        head, mark, _ = TABLE.read_text().partition(MARK)
        TABLE.write_text(f"{head}{mark}\n\n{table}\n")


def survivors(scores: Iterable[Score]) -> list[str]:
    """Every mutant that no test saw."""
    return [line for score in scores for line in score.survived]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
