"""The harness, as a pytest plugin: cells of the matrix are tests, their outcomes are evidence.

A project opts in by naming the folder of its tables: with `--tables DIR`, `QUANTMATRIX_TABLES`,
`[tool.quantmatrix]` in its pyproject.toml, or one line of its pytest configuration,
`quantmatrix_tables = "matrix"`. `pytest --pyargs quantmatrix.suites` runs the suites of the package, where
nobody names a folder with our own tables. Elsewhere the plugin adds no option, no fixture and no hook. A suite is a
function that asks for `cell` and says which check it performs:

    @pytest.mark.check("latents")
    def test_latents(cell, workbench, proof): ...

It becomes one test per cell whose row names that check, and the cell's id is the test's id. Cells
run on the `cpu` hardware unless `--hardware` says otherwise, except for `refuse`, which only plans
and therefore runs for every hardware. `true-size` runs where `--check true-size` asks for it. What
the suite puts into `proof` becomes the cell's evidence, one file per cell and scope, written when the
last check of the cell is done. A run that keeps its evidence to itself must give the verdicts that
are committed beside the tables, better ones included.

Under xdist all tests of one checkpoint run on one worker, and each worker has one thread and one of
the devices that are visible. `--rows FILE` and `--shard i/n` run a part of the cells. How a run
ends is described in `quantmatrix.exit_codes`: nothing collected, a row without a verdict or a wrong
machine is never success. Nothing here imports torch; `quantmatrix.measure.workbench` does, once a
test needs it.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from quantmatrix.errors import MachineError, UnjudgedError, UsageError
from quantmatrix.exit_codes import ENVIRONMENT_UNUSABLE, GATE_LOOSENED, NOTHING_COLLECTED
from quantmatrix.files import check_writable
from quantmatrix.harness import selection
from quantmatrix.harness.forecast import Forecast, count_workers
from quantmatrix.harness.outcomes import (
    Outcomes,
    classify,
    expect_failure,
    find_loosened,
    mark_problem,
    mark_unjudged,
)
from quantmatrix.harness.recorder import Proof, Recorder
from quantmatrix.harness.selection import FILTERS, EmptySelection
from quantmatrix.harness.workers import CELLS, Workers, read_worker
from quantmatrix.proof.code_digest import own_code
from quantmatrix.proof.record import EvidenceError, path_of
from quantmatrix.proof.store import remove_leftovers
from quantmatrix.tables import identify, source
from quantmatrix.tables.rows import ON_REQUEST

if TYPE_CHECKING:
    from quantmatrix.measure.workbench import Workbench
    from quantmatrix.tables.rows import Cell, Matrix

TABLES = "quantmatrix_tables"
SUITES = "quantmatrix.suites"
"""What names the suites that come with the package."""
PLAN_ONLY = ("refuse", "compile")
"""Checks that need no device: they run for every hardware of the tables."""
MANY = 1000
"""Tests from which on the garbage collector's time is noticed."""
COLLECTED = (50_000, 20, 50)
"""Thresholds of the garbage collector while cells are run: libraries make a million objects that stay, and
the workbench collects whenever it lets go of a pipeline."""
LOCAL = "cpu"
"""Hardware on which the other checks run when nothing is said."""


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the options, in projects that have opted in."""
    parser.addini(TABLES, "folder of the tables whose cells are to be tested", default="")
    config = pluginmanager.get_plugin("pytestconfig")
    if config is None or find_tables(config) is None:
        return
    group = parser.getgroup("quantmatrix", "quantmatrix: cells of the support matrix")
    for name in FILTERS:
        text = f"run cells of this {name} only; repeat it, or separate several by commas"
        more = "; auto: the row of this machine" if name == "hardware" else ""
        group.addoption(
            f"--{name}", action="append", default=[], metavar=name.upper(), help=text + more
        )
    group.addoption(
        source.FLAG,
        metavar="DIR",
        help="run the cells of the tables in this folder (default: $QUANTMATRIX_TABLES, then "
        "[tool.quantmatrix] of pyproject.toml, then quantmatrix_tables of pytest's configuration)",
    )
    group.addoption("--rows", metavar="FILE", help="run only the rows or cells listed in a file")
    group.addoption(
        "--changed",
        action="store_true",
        help="run only the cells whose committed record is missing, failing or stale, and one of each "
        "family, model, backend and claim of the others",
    )
    group.addoption("--shard", metavar="I/N", help="run part I of N, cut by the last timings")
    group.addoption(
        "--evidence-dir",
        metavar="DIR",
        help="write one record per cell there (default: a temporary folder)",
    )
    group.addoption(
        "--expect-evidence",
        metavar="DIR",
        help="fail where a verdict differs from the record there (default: the committed ones, "
        "unless --evidence-dir is given; none: expect nothing)",
    )
    group.addoption(
        "--rewrite",
        action="store_true",
        help="rewrite records even if nothing is new in them (default: they keep their date)",
    )
    group.addoption(
        "--full-size",
        action="store_true",
        help="use the real checkpoints instead of the tiny stand-ins",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the harness, in projects that have opted in."""
    if hasattr(config.option, "evidence_dir") and (found := find_tables(config)):
        config.addinivalue_line(
            "markers", "check(*names): checks of the rows that a suite performs"
        )
        config.pluginmanager.register(Harness(config, found), "quantmatrix-harness")


def find_tables(config: pytest.Config) -> source.Source | None:
    """The tables that a project opts in with, or None; pytest.UsageError for a folder that is not there."""
    try:
        if flag := read_flag(config):
            return source.check(source.Source(config.invocation_params.dir / flag, source.FLAG))
        found = source.find()
        if found != source.own():
            return found
        if configured := config.getini(TABLES):
            folder = config.rootpath / configured
            return source.Source(folder, f"{TABLES} of {config.inipath}")
        asked = any(str(argument).startswith(SUITES) for argument in config.invocation_params.args)
        return found if asked or read_worker(config) is not None else None
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error


def read_flag(config: pytest.Config) -> str | None:
    """The folder that `--tables` names, before options are parsed too; None for another plugin's flag."""
    given: str | None = getattr(config.option, "tables", None)
    arguments = [str(argument) for argument in config.invocation_params.args]
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == source.FLAG:
            given = value if equals else "".join(arguments[index + 1 : index + 2])
    return given if given and (config.option is None or not is_foreign(config, given)) else None


def is_foreign(config: pytest.Config, folder: str) -> bool:
    """Whether a `--tables` is none of ours: its value is a file, or a folder of something else."""
    path = config.invocation_params.dir / folder
    return path.exists() and not (path / "cases.csv").exists()


def check_evidence_folder(folder: Path) -> None:
    """pytest.UsageError where no record could be written: noticed before the first run, not after."""
    if folder.exists() and not folder.is_dir():
        raise pytest.UsageError(f"--evidence-dir {folder}: this is a file; name a folder")
    try:
        check_writable(folder / "cpu", "--evidence-dir")
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error


class CellItem(pytest.Function):
    """A suite's function for one cell; made without pytest's parameters, which cost ten times."""

    cell: Cell
    check: str
    proof: Proof


def takes_cells(item: pytest.Item) -> bool:
    """Whether a test has a cell among its ordinary parameters, as benchmarks do."""
    from quantmatrix.tables.rows import Cell

    spec = getattr(item, "callspec", None)
    return spec is not None and any(isinstance(value, Cell) for value in spec.params.values())


@contextmanager
def fail_on_bad_record(item: CellItem, report: pytest.TestReport) -> Iterator[None]:
    """Fail the test whose record, kept or new, is none: an error here would end the whole session."""
    try:
        yield
    except EvidenceError as error:
        report.outcome = "failed"
        report.longrepr = f"{item.cell.id}: no evidence is kept of it: {error}"


class Harness:
    """Hooks and fixtures of one pytest session."""

    def __init__(self, config: pytest.Config, tables: source.Source) -> None:
        """Read the options; the tables are read when they are needed."""
        self.config = config
        self.source = tables
        self.tables_folder = tables.folder
        self.reports = tables.reports or tables.folder.parent / "reports"
        if tables.folder != source.own_folder():  # what the tests call reads them, too
            used = ExitStack()
            used.enter_context(source.use(str(tables.folder)))
            config.add_cleanup(used.close)
        self.wanted = {name: selection.split_values(config.getoption(name)) for name in FILTERS}
        asked = config.getoption("evidence_dir")
        folder = Path(asked).absolute() if asked else None
        if folder is not None:
            check_evidence_folder(folder)
        expected = self._find_expected(config.getoption("expect_evidence"), folder)
        tiny = not config.getoption("full_size")
        rewrite = config.getoption("rewrite")
        self.recorder = Recorder(lambda: self.tables, folder, expected, tiny=tiny, rewrite=rewrite)
        self.worker = read_worker(config)
        if folder is not None and self.worker is None:
            remove_leftovers(folder)
        self.pending: dict[str, int] = {}
        if self.worker is None:  # workers report to their controller, which counts
            self.outcomes = Outcomes(self.is_cell)
            config.pluginmanager.register(self.outcomes, "quantmatrix-outcomes")
            config.pluginmanager.register(Workers(lambda: self.cells), "quantmatrix-workers")
            forecast = Forecast(
                self.name_cells,
                self.reports / "evidence",
                self.say,
                count_workers(config),
                lambda cell: not self.wanted["hardware"] and cell.hardware != LOCAL,
            )
            config.pluginmanager.register(forecast, "quantmatrix-forecast")
        if self.narrowed:
            _ = self.cells  # a selection that is empty or misspelt ends the session at once

    @property
    def narrowed(self) -> bool:
        """Whether an option selects cells."""
        given = (self.config.getoption("rows"), self.config.getoption("shard"))
        return any(self.wanted.values()) or any(given)

    def _find_expected(self, asked: str | None, folder: Path | None) -> Path | None:
        if asked:
            return None if asked == "none" else Path(asked).absolute()
        beside = self.reports / "evidence"
        return beside if folder is None and beside.is_dir() else None

    @cached_property
    def tables(self) -> Matrix:
        """The tables of the project; raises pytest's UsageError where they cannot be read."""
        from quantmatrix.tables import read
        from quantmatrix.tables.rows import MatrixError

        try:
            return read.read(self.tables_folder)
        except MatrixError as error:
            raise pytest.UsageError(str(error)) from error

    @cached_property
    def cells(self) -> list[Cell]:
        """The cells that the options select, in the order of the tables.

        Workers are given theirs: what they would read may have changed since. Raises pytest's
        UsageError for options that contradict each other or the tables; an empty selection and a
        wrong machine end the run with their exit codes.
        """
        given: dict[str, Any] = getattr(self.config, "workerinput", {})
        if CELLS in given:
            chosen = set(given[CELLS])
            return [cell for cell in self.tables.cells if cell.id in chosen]
        rows, shard = self.config.getoption("rows"), self.config.getoption("shard")
        timings = self.reports / "evidence"
        if shard and self.recorder.folder and self.recorder.folder.resolve() == timings.resolve():
            raise pytest.UsageError(
                f"--shard {shard} is cut by the timings in {timings}, and --evidence-dir would change "
                "them between two parts, so that rows are in none: name another folder, and "
                "`quantmatrix evidence merge` it"
            )
        try:
            self.resolve_hardware()
            listed = Path(rows) if rows else None
            cells = selection.select_cells(self.tables, self.wanted, listed, shard, timings)
            if listed is not None and not self.wanted["hardware"]:
                selection.check_reach(self.tables.cells, listed, self.runs_here)
            if self.config.getoption("changed"):
                cells = selection.select_changed(cells, self.tables, self.reports, self.runs_check)
            return cells
        except EmptySelection as error:
            pytest.exit(str(error), returncode=NOTHING_COLLECTED)
        except MachineError as error:
            pytest.exit(str(error), returncode=ENVIRONMENT_UNUSABLE)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from error

    def runs_here(self, cell: Cell) -> bool:
        """Whether any check of a cell is run where no hardware is asked for."""
        return cell.hardware == LOCAL or not set(cell.checks).isdisjoint(PLAN_ONLY)

    def runs_check(self, cell: Cell, check: str) -> bool:
        """Whether a check of a selected cell is run."""
        return bool(self.wanted["hardware"]) or cell.hardware == LOCAL or check in PLAN_ONLY

    @cached_property
    def ids(self) -> frozenset[str]:
        """Ids of the selected cells."""
        return frozenset(cell.id for cell in self.cells)

    def name_cells(self) -> dict[str, Cell]:
        """The selected cells by id; none, if nothing needed the tables."""
        return {cell.id: cell for cell in self.cells} if "cells" in vars(self) else {}

    def say(self, line: str) -> None:
        """Write a line of its own between pytest's."""
        if reporter := self.config.pluginmanager.get_plugin("terminalreporter"):
            reporter.ensure_newline()
            reporter.write_line(line)

    def is_cell(self, name: str) -> bool:
        """Whether these are the id of a selected cell; never, if nothing needed the tables."""
        return "cells" in vars(self) and name in self.ids

    def resolve_hardware(self) -> None:
        """Replace `auto` by the row of this machine."""
        given = self.wanted["hardware"]
        self.wanted["hardware"] = tuple(
            identify.resolve(name, self.tables.hardware) for name in given
        )

    def cells_for(self, checks: Iterable[str]) -> Iterator[tuple[Cell, str]]:
        """(cell, check) for every selected cell that a suite of these checks must run."""
        for check in checks:
            asked = self.wanted["check"]
            if check not in asked and (asked or check in ON_REQUEST):
                continue
            anywhere = check in PLAN_ONLY or self.wanted["hardware"]
            for cell in self.cells:
                if check in cell.checks and (anywhere or cell.hardware == LOCAL):
                    yield cell, check

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self, session: pytest.Session) -> Generator[None, object, object]:
        """Keep the garbage collector away from ten thousands of items that live to the end."""
        enabled = gc.isenabled()
        gc.disable()
        try:
            result = yield
            if len(session.items) > MANY:
                gc.freeze()
            return result
        finally:
            if enabled:
                gc.enable()

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(
        self, collector: pytest.Module | pytest.Class, name: str, obj: object
    ) -> list[CellItem] | None:
        """Turn a function that asks for `cell` into one item per cell.

        Raises pytest's UsageError for one that is not marked with its check, or is parametrized.
        """
        if not inspect.isfunction(obj) or not collector.funcnamefilter(name):
            return None
        manager: Any = collector.session._fixturemanager
        parent = collector.getparent(pytest.Class)
        info = manager.getfixtureinfo(collector, obj, parent.obj if parent else None)
        providers = info.name2fixturedefs.get("cell", ())
        if not providers or getattr(providers[-1].func, "__self__", None) is not self:
            return None  # no cell, or one of the project's own
        marks = {mark.name: mark for mark in getattr(obj, "pytestmark", ())}
        if "check" not in marks or "parametrize" in marks:
            raise pytest.UsageError(
                f"{collector.nodeid}::{name} asks for `cell`: mark it with "
                '@pytest.mark.check("<a check of cases.csv>"), and give it no other parameters'
            )
        items = []
        for cell, check in self.cells_for(marks["check"].args):
            item: CellItem = CellItem.from_parent(
                collector,
                name=f"{name}[{cell.id}]",
                callobj=obj,
                fixtureinfo=info,
                originalname=name,
            )
            item.cell, item.check, item.proof = cell, check, Proof()
            items.append(item)
        return items

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Bring the tests of one checkpoint together, so that it is loaded once."""
        found = [item for item in items if isinstance(item, CellItem)]
        if not found:
            others_use = any(takes_cells(item) for item in items)
            if self.narrowed and self.worker is None and not others_use:
                chosen = selection.show_options(self.wanted) or "this selection"
                message = f"{chosen}: no test was collected for these cells"
                pytest.exit(message, returncode=NOTHING_COLLECTED)
            return
        from quantmatrix.tables.rows import CHECKS

        rank: dict[tuple[str, str], int] = {}
        order: dict[str, tuple[int, int]] = {}
        for index, cell in enumerate(self.cells):
            group = rank.setdefault((cell.model, cell.checkpoint), index)
            order[cell.id] = (group, index)
        others = [item for item in items if not isinstance(item, CellItem)]
        turn = {check: index for index, check in enumerate(CHECKS)}
        items[:] = [*others, *sorted(found, key=lambda i: (order[i.cell.id], turn[i.check]))]
        for item in found:
            self.pending[item.cell.id] = self.pending.get(item.cell.id, 0) + 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """Name the cell in reports."""
        if isinstance(item, CellItem):
            record = str(path_of(item.cell.id))
            item.user_properties += [("row", item.cell.row), ("cell", item.cell.id)]
            item.user_properties += [("check", item.check), ("evidence", record)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Take the outcome of a check as its verdict; write a record after a cell's last check."""
        report = yield
        if isinstance(item, CellItem):
            with fail_on_bad_record(item, report):
                self.note_outcome(item, call, report)
            self.pending[item.cell.id] -= call.when == "teardown"
            if not self.pending[item.cell.id]:
                self.write_record(item, report)
        return report

    def write_record(self, item: CellItem, report: pytest.TestReport) -> None:
        """Write the record of a cell; a disk that takes no more is no failure of the claim."""
        try:
            with fail_on_bad_record(item, report):
                self.recorder.finish(item.cell)
        except OSError as error:
            mark_problem(item, report, ENVIRONMENT_UNUSABLE)
            report.outcome = "failed"
            report.longrepr = f"{item.cell.id}: its evidence cannot be written: {error}"

    def note_outcome(
        self, item: CellItem, call: pytest.CallInfo[None], report: pytest.TestReport
    ) -> None:
        """Keep the verdict of a check; a pass that nobody expects any more is a failure."""
        if report.skipped or (report.passed and call.when != "call"):
            return
        if call.excinfo and (code := classify(call.excinfo.value)):
            mark_problem(item, report, code)
            return  # the machine is to blame, the claim is as open as before
        message = call.excinfo.exconly(tryshort=True)[:2000] if call.excinfo else ""
        verdict = "pass" if report.passed else "fail"
        if call.excinfo and isinstance(call.excinfo.value, UnjudgedError):
            verdict, message = "unjudged", str(call.excinfo.value)
            mark_unjudged(item, report, message)
        self.recorder.add(item.cell, item.check, verdict, message, item.proof)
        if item.cell.claim == "failing" and item.cell.rule == item.check and call.when == "call":
            expect_failure(item, report)
        elif verdict != "fail":
            self.compare_with_committed(item, report, verdict)

    def compare_with_committed(
        self, item: CellItem, report: pytest.TestReport, verdict: str
    ) -> None:
        """Fail a pass that the committed record does not expect, and what it held to a tighter limit, or
        to one at all."""
        before = self.recorder.expected_result(item.cell, item.check)
        if before is None:
            return
        again = "run the cell again with --evidence-dir and commit its record"
        where = f"the evidence in {self.recorder.expected}"
        if before.verdict == "fail" and verdict == "pass":
            message = f"{item.check} fails in {where}, but passes now: {again}"
        elif wider := find_loosened(before.limits, item.proof.limits):
            message = (
                f"{item.check} was held to tighter limits in {where}: {'; '.join(wider)}; {again}"
            )
            mark_problem(item, report, GATE_LOOSENED)
        else:
            return
        report.outcome = "failed"
        report.longrepr = f"{item.cell.id}: {message}"

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Read the code that records are tied to now, not in the time of the first test."""
        if any(isinstance(item, CellItem) for item in session.items):
            own_code().prepare()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Stop on a machine that is not the hardware that was asked for."""
        ids = self.wanted["hardware"]
        if self.worker is not None or session.config.option.collectonly:
            return
        for name in ids:
            row = self.tables.hardware[name]
            wanted = {check for cell in self.cells for check in cell.checks} - set(PLAN_ONLY)
            asked = set(self.wanted["check"] or wanted) & wanted
            if row.vendor != "cpu" and asked and (why := identify.ask(name, self.tables_folder)):
                pytest.exit(why, returncode=ENVIRONMENT_UNUSABLE)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say which tables were read, and where the records are."""
        if "tables" in vars(self):
            terminalreporter.write_line(f"tables: {self.source}")
        asked = self.config.getoption("evidence_dir")
        if asked or self.recorder.written:  # with workers, the records are written by them
            count = f"{len(self.recorder.written)} " if self.recorder.written else ""
            kept = f", {self.recorder.kept} say nothing new" if self.recorder.kept else ""
            where = self.recorder.folder
            terminalreporter.write_line(f"evidence: {count}records in {where}{kept}")

    @pytest.fixture(name="cell")
    def provide_cell(self, request: pytest.FixtureRequest) -> Cell:
        """The cell that this test is about."""
        cell: Cell = request.node.cell
        return cell

    @pytest.fixture(name="proof")
    def provide_proof(
        self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Proof:
        """What this check shows; it becomes part of the cell's evidence."""
        if self.recorder.folder is None:
            self.recorder.folder = tmp_path_factory.mktemp("evidence")
        proof: Proof = request.node.proof
        return proof

    @pytest.fixture(scope="session", name="reports")
    def provide_reports(self) -> Path:
        """The reports folder of the project, whose limits decide before ours."""
        return self.reports

    @pytest.fixture(scope="session", name="workbench")
    def provide_workbench(self) -> Iterator[Workbench]:
        """Requests, pipelines and BF16 runs of cells; loads each checkpoint once."""
        usual = gc.get_threshold()
        gc.set_threshold(*COLLECTED)
        try:
            from quantmatrix.measure.workbench import Workbench

            tiny = not self.config.getoption("full_size")
            bench = Workbench(self.tables, tiny=tiny, worker=self.worker)
            yield bench
            bench.release()
        finally:
            gc.set_threshold(*usual)
