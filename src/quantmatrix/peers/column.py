"""Column: every checkpoint of the tables in one runtime, each with a verdict and its record.

The runtime's own run of the base model in BF16 is made once for each model and set of flags. Where a
runtime cannot run the base model (in BF16 it may not fit), its runs are compared with our `decode` of
the same file, and the record says so; where neither runs there is no record, and a line says why.
"""

from __future__ import annotations

import itertools
import os
import shlex
import sysconfig
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import quantmatrix
from quantmatrix import peers
from quantmatrix.checkpoints.folders import PLACEHOLDER
from quantmatrix.checkpoints.hub import translate_hub_errors
from quantmatrix.errors import CheckpointError, UnusableError, UsageError
from quantmatrix.peers import quantmatrix as ours
from quantmatrix.peers.common import read_latents
from quantmatrix.peers.near_limits import NearLimits
from quantmatrix.peers.protocol import FAILED, LOG, Adapter, Answer, Found, Task
from quantmatrix.peers.session import OFFLINE, Bounds, Session
from quantmatrix.peers.verdict import Verdict, judge_ending, judge_numbers, read_picture
from quantmatrix.proof import columns
from quantmatrix.proof import record as records
from quantmatrix.proof.columns import VERDICTS, RuntimeRecord
from quantmatrix.proof.offers import is_invented
from quantmatrix.proof.scopes import PUBLISHED, STAND_IN
from quantmatrix.quoting import escape_lines
from quantmatrix.tables.rows import RuntimeCell

if TYPE_CHECKING:
    import torch

    from quantmatrix.tables.rows import CheckpointRow, Matrix

AnyPath = TypeVar("AnyPath", bound=PurePath)
LINES = 12
"""Lines at the end of a log that a record keeps."""
WIDTH = 200
"""Characters of such a line."""
STOP = 0.2
"""Seconds between two goes at ending children of threads that still work."""
BEST = {name: number for number, name in enumerate(VERDICTS)}


def read_version(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with, to be compared: (0, 42, 1) of `0.42.1.dev0`."""
    import re

    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def probe(runtime: str, tables: Matrix) -> Found:
    """What is found of a runtime here; one older than the adapter knows counts as none.

    UsageError for a runtime that the tables do not have, and for our own.
    """
    others = [row.id for row in tables.runtimes.values() if row.kind != "own"]
    if runtime not in others:
        raise UsageError(f"--runtime {runtime}: not in runtimes.csv; known: {', '.join(others)}")
    found = peers.load(runtime).probe()
    minimum = tables.runtimes[runtime].minimum
    if found.version and minimum and read_version(found.version) < read_version(minimum):
        return Found(why=f"{runtime} {found.version} is older than {minimum}, which is needed")
    return found


@dataclass(frozen=True)
class Ran:
    """A task, its answer, and the folder of its files."""

    task: Task
    answer: Answer
    folder: Path

    def read_numbers(self, *, latents: bool) -> list[torch.Tensor]:
        """What is compared of it: latents of any shape and dtype, one per step, else its picture."""
        return read_side(self.folder, self.answer.media, latents=latents)


@dataclass(frozen=True)
class Pair:
    """A run, and what it was compared with: the runtime's BF16 run, or our `decode` of the file."""

    ran: Ran
    beside: Ran
    decoded: bool


@dataclass(frozen=True)
class Outcome:
    """What came of one checkpoint: its record, or why there is none."""

    cell: RuntimeCell
    record: RuntimeRecord | None
    problem: str = ""
    skipped: bool = False
    """There is nothing to be run: the tables invent the file."""
    pair: Pair | None = None
    """The runs that the record is about, where there were any."""


class Column:
    """One runtime on one hardware, ready to be asked about checkpoints."""

    def __init__(
        self,
        tables: Matrix,
        runtime: str,
        hardware: str,
        work: Path,
        *,
        tiny: bool,
        bounds: Bounds | None = None,
        limits: NearLimits | None = None,
        workers: int = 1,
    ) -> None:
        """Files of the runs go to `work`; `workers` models run at once, each in children of its own.

        UnusableError where the runtime is not installed.
        """
        self.tables, self.runtime, self.hardware = tables, runtime, hardware
        self.work, self.tiny = work, tiny
        self.found = probe(runtime, tables)
        if not self.found.version:
            raise UnusableError(f"{runtime}: not installed: {self.found.why}")
        self.adapter = peers.load(runtime)
        self.limits = limits or NearLimits(tables, hardware)
        self.workers = workers
        self._bounds = bounds
        self._settings = dict(OFFLINE) if tiny else {}
        if workers > 1:
            self._settings["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
        self._sessions: dict[tuple[int, str], Session] = {}
        self._baselines: dict[str, Ran] = {}
        self._numbers = itertools.count(1)
        self._writing = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> Column:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def run(self, checkpoints: Collection[str] = ()) -> Iterator[Outcome]:
        """Every checkpoint (those named, where some are), model by model, as each is done."""
        models: dict[str, list[CheckpointRow]] = {name: [] for name in self.tables.models}
        for row in self.tables.checkpoints.values():
            if row.id in checkpoints or not checkpoints:
                models[row.model].append(row)
        if self.workers == 1:
            for row in itertools.chain(*models.values()):
                yield self.run_one(row)
            return
        done: SimpleQueue[Outcome | Future[None]] = SimpleQueue()

        def run_model(rows: list[CheckpointRow]) -> None:
            for row in rows:
                done.put(self.run_one(row))

        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(run_model, rows) for rows in models.values()]
            for future in futures:
                future.add_done_callback(done.put)
            try:
                left = len(futures)
                while left:
                    found = done.get()
                    if isinstance(found, Outcome):
                        yield found
                    else:
                        found.result()  # raises what ended the thread
                        left -= 1
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                if left:
                    self.stop()
                while not all(future.done() for future in futures):
                    time.sleep(STOP)
                    self.stop()  # one may just have started a child

    def stop(self) -> None:
        """End every child; nothing is asked any more."""
        self._ended.set()
        for session in [*self._sessions.values()]:
            session.stop()

    def find_session(self, runtime: str) -> Session:
        """The children of the thread that asks in which a runtime runs: its own, or the column's."""
        key = (threading.get_ident(), runtime)
        if key not in self._sessions:
            self._sessions[key] = Session(runtime, self._bounds, self._settings)
        return self._sessions[key]

    def run_one(self, row: CheckpointRow) -> Outcome:
        """The documented ways of loading one checkpoint, one after the other, until one works."""
        cell = RuntimeCell(row.id, self.hardware, self.runtime)
        if not self.tiny and row.form != "online" and is_invented(row.reference):
            why = f"{row.reference} exists only as a stand-in: run it with --tiny"
            return Outcome(cell, None, why, skipped=True)
        try:
            task = self.make_task(row)
        except (CheckpointError, UnusableError) as error:
            return Outcome(cell, None, str(error))
        base = self.find_baseline(task)
        lacking = self.explain_failure(base, self.adapter)
        decoded = bool(lacking)
        if decoded:
            base = self.ask(replace(task, way=ours.BACKEND), ours.ID)
            if why := self.explain_failure(base, ours):
                return Outcome(
                    cell, None, f"its BF16 run of {task.base} {lacking}; our decode {why}"
                )
            lacking = f"compared with our decode of the file: its BF16 run of {task.base} {lacking}"
        tried: list[tuple[Verdict, Ran]] = []
        for way in self.adapter.ways(task):
            ran = self.ask(replace(task, way=way))
            tried.append((self.judge(Pair(ran, base, decoded)), ran))
            if tried[-1][0].verdict == "works":
                break
        if not tried:
            named = (
                f"{row.selector} {row.reference}"
                if task.online
                else f"a {row.form} named by {row.selector}"
            )
            reason = f"the adapter knows no documented way to load {named}"
            tried.append((Verdict("refuses", reason), Ran(task, Answer(FAILED), base.folder)))
        best = find_best(tried)[1]
        record = self.record(cell, tried, (lacking,) if lacking else ())
        return Outcome(cell, record, pair=Pair(best, base, decoded))

    def explain_failure(self, ran: Ran, adapter: Adapter) -> str:
        """Verdict and reason of a run that gave no picture, or nothing."""
        ended = judge_ending(ran.answer, adapter.explain(ran.answer))
        return f"{ended.verdict}: {ended.reason}" if ended else ""

    def make_task(self, row: CheckpointRow) -> Task:
        """What the runtime is asked for, with the files where they lie here."""
        online = row.form == "online"
        base = self.tables.models[row.model].repo if self.tiny else row.base
        return Task(
            checkpoint=row,
            base=self.locate(base),
            weights="" if online else self.locate(row.reference),
            flags=tuple(map(self.locate_flag, self.find_flags(row.id))),
            device=self.device,
            tiny=self.tiny,
        )

    def locate(self, reference: str) -> str:
        """A reference as the runtime is given it: as it is, or the stand-in's path."""
        from quantmatrix.tiny import hub

        if not self.tiny:
            return name_file(reference)
        folder = hub.default_folder()
        with self._writing:  # which sets how many threads torch takes
            hub.ensure(reference, folder, self.tables)
        repository = hub.repository_of(reference)
        rest = reference.strip("/").removeprefix(repository.strip("/")).strip("/")
        if repository.startswith(hub.PLACEHOLDER):
            root = hub.path_of(repository, folder)
        else:
            root = hub.find_snapshot(repository, folder)
        above, colon, quantization = rest.rpartition(":")
        if colon:
            return str(pick_file((root / above).glob("*.gguf"), quantization, reference))
        return str(root / rest if rest else root)

    def locate_flag(self, flag: str) -> str:
        """A flag's value as the runtime is given it: pictures and adapters of the tables lie in the tiny hub."""
        reference, hash_sign, pin = flag.partition("#")
        if not self.tiny or not flag.startswith(PLACEHOLDER):
            return flag
        return f"{self.locate(reference)}{hash_sign}{pin}"

    def find_flags(self, checkpoint: str) -> tuple[str, ...]:
        """Flags of the first row that claims something of a checkpoint, of this hardware if there is one."""
        cells = [
            c for c in self.tables.cells if c.checkpoint == checkpoint and c.claim != "refused"
        ]
        here = [cell for cell in cells if cell.hardware == self.hardware]
        return next((cell.flags for cell in [*here, *cells]), ())

    @cached_property
    def device(self) -> str:
        """The torch device of the hardware."""
        vendor = self.tables.hardware[self.hardware].vendor
        return {"cpu": "cpu", "ascend": "npu"}.get(vendor, "cuda")

    def find_baseline(self, task: Task) -> Ran:
        """The runtime's own BF16 run of the base model with the flags of a task."""
        plain = replace(task, baseline=True, weights="")
        key = repr((task.base, task.flags))
        if key not in self._baselines:
            [way, *_] = self.adapter.ways(plain)
            self._baselines[key] = self.ask(replace(plain, way=way))
        return self._baselines[key]

    def ask(self, task: Task, runtime: str = "") -> Ran:
        """Run a task in a folder of its own; by `runtime` where it is another than the column's.

        RuntimeError once the column has ended, while another thread still works at it.
        """
        if self._ended.is_set():
            raise RuntimeError("the column has ended")
        name = f"base-{task.checkpoint.model}" if task.baseline else task.checkpoint.id
        folder = self.work / f"{next(self._numbers):04}-{f'{runtime}-{name}' if runtime else name}"
        return Ran(task, self.find_session(runtime or self.runtime).ask(task, folder), folder)

    def judge(self, pair: Pair) -> Verdict:
        """The verdict of a run beside the other."""
        ran, beside = pair.ran, pair.beside
        ended = judge_ending(ran.answer, self.adapter.explain(ran.answer))
        if ended is not None:
            return ended
        if beside.answer.latents != ran.answer.latents and not pair.decoded:
            return Verdict("wrong numbers", "only one of the two runs gave latents")
        allowed = self.limits.find(ran.task.checkpoint)
        base, found = (one.read_numbers(latents=ran.answer.latents) for one in (beside, ran))
        return judge_numbers(base, found, ran.answer.weights, allowed, decoded=pair.decoded)

    def record(
        self, cell: RuntimeCell, tried: list[tuple[Verdict, Ran]], notes: Sequence[str] = ()
    ) -> RuntimeRecord:
        """The record of a cell, by the best of the ways that were tried, with what else is to be said."""
        from quantmatrix.hardware import probe as machine

        best = find_best(tried)
        verdict, ran = best
        answer, task = ran.answer, ran.task
        others = [
            f"{one.task.way}: {found.verdict}: {found.reason}"
            for found, one in tried
            if one is not ran
        ]
        portable = self.make_portable(
            {
                "reason": escape_lines(verdict.reason),
                "command": self.adapter.command(task),
                "tried": [escape_lines(text) for text in [*notes, *others]],
                "log": read_log(ran.folder / LOG),
            }
        )
        return RuntimeRecord(
            cell=columns.describe_cell(cell, self.tables),
            verdict=verdict.verdict,
            reason=portable["reason"],
            command=portable["command"],
            again=self.write_again(cell),
            version=self.found.version,
            scope=STAND_IN if self.tiny else PUBLISHED,
            versions=records.list_versions(),
            machine=machine.fingerprint(),
            checkpoint=self.describe_files(task),
            metrics=verdict.metrics,
            limits=verdict.limits,
            weights=answer.weights,
            tried=tuple(portable["tried"]),
            log=portable["log"],
            seconds=round(sum(answer.seconds.values()), 3),
            peak_bytes=answer.peak_bytes,
            **columns.stamp(),
        )

    def write_again(self, cell: RuntimeCell) -> str:
        """The command of ours that makes a cell's record again."""
        argv = ["quantmatrix", "run-column", "--runtime", cell.runtime, "--hardware", cell.hardware]
        return shlex.join(
            [*argv, "--checkpoint", cell.checkpoint, *(["--tiny"] if self.tiny else [])]
        )

    def describe_files(self, task: Task) -> dict[str, Any]:
        """Digest and names of the weight files, where they lie on this disk."""
        path = Path(task.weights)
        if not task.weights or not path.exists():
            return {}
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if is_weights(p))
        return records.describe_files(files)

    def make_portable(self, value: Any) -> Any:
        """Plain data without folders of this machine."""
        from quantmatrix.tiny import hub

        folders = {
            str(hub.default_folder()): "$HUB",
            str(self.work): "$WORK",
            str(Path(quantmatrix.__file__).parents[2]): "$PROJECT",
            sysconfig.get_paths()["purelib"]: "$PACKAGES",
            str(Path.home()): "$HOME",
        }
        folders = {folder: name for folder, name in folders.items() if len(folder) > 1}
        return records.make_portable(value, folders)


def read_side(folder: Path, media: str, *, latents: bool) -> list[torch.Tensor]:
    """The latents of every step of a run, any shape and dtype, or its picture as the only step."""
    if latents:
        return read_latents(folder)
    return [read_picture(str(folder / media))] if media else []


def find_best(tried: Sequence[tuple[Verdict, Ran]]) -> tuple[Verdict, Ran]:
    """The best of the ways that were tried, the first of equal ones."""
    return min(tried, key=lambda one: BEST[one[0].verdict])


def read_log(path: Path) -> str:
    """The end of a log: its last lines, each cut, escaped."""
    if not path.is_file():
        return ""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - (1 << 16)))
        text = stream.read().decode("utf-8", "backslashreplace")
    lines = [line.rsplit("\r")[-1].rstrip()[:WIDTH] for line in text.split("\n")]
    return escape_lines("\n".join([line for line in lines if line][-LINES:]))


def name_file(reference: str) -> str:
    """A reference as other programs take it: the file that `owner/name[/folder]:QUANTIZATION` means.

    UnreachableError or CheckpointError where the repository cannot be listed, UnusableError for none or
    several such files.
    """
    above, colon, quantization = reference.rpartition(":")
    if not colon or "/" in quantization:  # an address has its colon before its slashes
        return reference
    from huggingface_hub import list_repo_files

    owner, name, *folder = above.split("/")
    repository = f"{owner}/{name}"
    with translate_hub_errors(f"{reference}: the files of {repository} are unknown", repository):
        files = list(map(PurePosixPath, list_repo_files(repository)))
    inside = [f for f in files if f.parent == PurePosixPath(*folder) and f.suffix == ".gguf"]
    return f"{owner}/{name}/{pick_file(inside, quantization, reference)}"


def pick_file(files: Iterable[AnyPath], quantization: str, reference: str) -> AnyPath:
    """The file whose name ends with a quantization; UnusableError where none does, or several."""
    found = [file for file in files if file.stem.upper().endswith(quantization.upper())]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UnusableError(f"{reference}: expected one file of {quantization}, found {names}")
    return found[0]


def is_weights(path: Path) -> bool:
    """Whether a file holds weights or describes them."""
    return path.suffix in (".safetensors", ".gguf", ".json") and path.is_file()
