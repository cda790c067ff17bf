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
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from subprocess import PIPE
from typing import Any

import places
import pytest
import recordings
from forked_tests import COMPILER, TIMEOUT
from places import Seen

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SOURCE = "src/quantmatrix"
COPIED = ("src", "tests", "matrix", "reports", "benchmarks", "docs", ".github", ".ci")
DEVICE_ONLY = ("_triton", "nvfp4_flashinfer", "compiled", "compiling", "true_launches")
"""Ends of names of modules whose functions run on a GPU, or need its compiler, alone."""
SAME = tuple(
    f"ReplaceComparisonOperator_{pair}" for pair in ("Eq_Is", "Is_Eq", "NotEq_IsNot", "IsNot_NotEq")
)
"""Operators that exchange equality and identity: of None and of short texts no test may tell them."""
TESTS = ("tests/unit", "src/quantmatrix/suites")
"""What runs before a change lands."""
TABLE = HERE / "README.md"
MARK = "<!-- table -->"
GOAL = 92.0
RECORDED = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
"""Ends of a recording that can be used: a test that fails as it is kills no mutant (`try_mutant`)."""


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
    kept = ROOT / ".mutants"
    place = kept / state
    trees = [place / f"tree-{number}" for number in range(given.workers)]
    for tree in trees:
        copy_tree(tree)
    tree = trees[0]
    seen = read_seen(kept, tree, given)
    part = hashlib.sha256(" ".join((*given.only, "|", *given.tests)).encode()).hexdigest()[:8]
    session = place / f"sample-{given.sample}-{given.seed}-{part}.sqlite"
    os.chdir(tree)
    if not session.is_file():
        make_session(session, given)
    run_session(session, trees, seen, given)
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
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="tests to look at")
    parser.add_argument("--workers", type=int, default=2, help="processes that run tests")
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
    return digest_files(path for path in list_files() if path.parts[:2] != ("tests", "mutants"))


def digest_source() -> str:
    """Names the state of the source alone."""
    return digest_files(path for path in list_files() if path.parts[0] == "src")


def digest_files(paths: Iterable[Path]) -> str:
    """Of names and content of those that are Python."""
    digest = hashlib.sha256()
    for path in paths:
        if path.suffix == ".py":
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
    """Which tests execute which lines: recorded once for a state of the source, kept in `place`.

    `tree` is one of the copies below `place`. Where files of tests have changed since, or are new,
    these alone are recorded again.
    """
    digest = hashlib.sha256(" ".join((digest_source(), *given.tests)).encode()).hexdigest()[:16]
    folder = place / f"seen-{digest}"
    files = recordings.digest_tests(tree, given.tests)
    seen, known = recordings.read(folder, place)
    changed = sorted(file for file in files if files[file] != known.get(file))
    if not changed:
        return seen
    part = folder / f"part-{len(list(folder.glob('part-*'))):03}"
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    wanted = changed if known else given.tests
    command = [sys.executable, "-m", "pytest", "-q", "-p", "watch_tests", *wanted]
    command += ["-n", str(given.workers)] if given.workers > 1 else ["-p", "no:xdist"]
    variables = environment(tree) | {"QUANTMATRIX_SEEN": str(partial)}
    done = subprocess.run(command, cwd=tree, env=variables)
    if done.returncode not in RECORDED or not (partial / "seconds.json").is_file():
        raise SystemExit(f"mutants: recording ended with {done.returncode}: see above")
    if done.returncode:
        print("mutants: what fails without a mutant kills none; the rest is used")
    (partial / "files.json").write_text(json.dumps({file: files[file] for file in changed}))
    partial.rename(part)
    return recordings.read(folder, place)[0]


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


def run_session(
    session: Path, trees: Sequence[Path], seen: Seen, given: argparse.Namespace
) -> None:
    """Run the mutants that have no result yet, as many at once as there are trees.

    Each result is kept at once, so that a run that was stopped goes on where it was.
    """
    from cosmic_ray.work_db import WorkDB, use_db

    importers = find_importers(trees[0])
    with use_db(str(session), WorkDB.Mode.open) as database, ExitStack() as stack:
        pending = sorted(database.pending_work_items, key=order_of)
        asked = [(item, *ask_for(item, seen, importers, given)) for item in pending]
        servers = [stack.enter_context(start_server(tree)) for tree in trees]
        for number, (item, answer, line) in enumerate(share_out(asked, servers), 1):
            database.set_result(item.job_id, read_result(answer))
            word = "killed" if answer["test"] != "survived" else "SURVIVED"
            by = f" by {answer['killer']}" if answer["killer"] else ""
            print(f"{number}/{len(pending)} {word} {line}{by}", flush=True)


def ask_for(
    item: Any, seen: Seen, importers: dict[str, list[str]], given: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    """(what a server is asked for a mutant, the mutant in words)."""
    import attrs

    one = item.mutations[0]
    path = Path(one.module_path)
    near = importers.get(places.module_of(path, Path("src")), [])
    tests, left = places.choose_tests(
        seen, str(path), ast.parse(path.read_text()), one.start_pos[0], near, given.seconds
    )
    mutations = [{**attrs.asdict(m), "module_path": str(m.module_path)} for m in item.mutations]
    asked = {"mutations": mutations, "tests": tests, "seconds": 60 + 5 * given.seconds}
    place = f"{path}:{one.start_pos[0]} {one.operator_name.partition('/')[2]}"
    note = f", {left} left out" if left else ""
    return asked, f"{place} ({len(tests)} tests{note})"


@contextmanager
def start_server(tree: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in a tree that runs the tests of mutants; see `forked_tests`."""
    command = [sys.executable, str(HERE / "forked_tests.py")]
    with subprocess.Popen(
        command, cwd=tree, env=environment(tree), stdin=PIPE, stdout=PIPE, text=True
    ) as server:
        try:
            yield server
        finally:
            server.kill()


def put(server: subprocess.Popen[str], asked: dict[str, Any]) -> dict[str, Any]:
    """A server's answer."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(asked) + "\n")
    server.stdin.flush()
    line = server.stdout.readline()
    if not line:
        raise SystemExit("mutants: a process that runs tests has ended; run this again to go on")
    found: dict[str, Any] = json.loads(line)
    return found


def try_mutant(server: subprocess.Popen[str], asked: dict[str, Any]) -> dict[str, Any]:
    """What becomes of a mutant; a kill by a test that fails without the mutant, too, is none.

    Such a test is left out, and the others run again.
    """
    while True:
        answer = put(server, asked)
        killer = answer["killer"]
        if answer["test"] == "survived" or killer in (TIMEOUT, COMPILER):
            return answer
        alone = [killer] if "::" in killer else ["--collect-only", *asked["tests"]]
        if put(server, {**asked, "mutations": [], "tests": alone})["test"] == "survived":
            return answer
        print(f"fails without a mutant, too: {alone[0]}", flush=True)
        if "::" not in killer:
            raise SystemExit(f"mutants: its tests cannot be collected: {asked['tests'][:3]} ...")
        asked = {**asked, "tests": [test for test in asked["tests"] if test != killer]}


def share_out(
    asked: Sequence[tuple[Any, dict[str, Any], str]], servers: Sequence[subprocess.Popen[str]]
) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """(mutant, answer, words) as answers come, each server busy with one at a time."""
    free: Queue[subprocess.Popen[str]] = Queue()
    for server in servers:
        free.put(server)

    def run(one: tuple[Any, dict[str, Any], str]) -> tuple[Any, dict[str, Any], str]:
        item, question, line = one
        server = free.get()
        try:
            return item, try_mutant(server, question), line
        finally:
            free.put(server)

    with ThreadPoolExecutor(len(servers)) as pool:
        for done in as_completed([pool.submit(run, one) for one in asked]):
            yield done.result()


def read_result(answer: dict[str, Any]) -> Any:
    """An answer as cosmic-ray keeps it."""
    from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

    return WorkResult(
        WorkerOutcome(answer["outcome"]),
        answer["output"],
        TestOutcome(answer["test"]) if answer["test"] else None,
        answer["diff"],
    )


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
