"""Columns, packets and verdicts by value: edges of limits, whole texts, and what a record is made of."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from quantmatrix import peers
from quantmatrix.errors import UnusableError, UsageError
from quantmatrix.peers import column as columns
from quantmatrix.peers import common, packet, packet_check, session, verdict, worker
from quantmatrix.peers.column import Column, Outcome, Pair, Ran, find_best, read_log
from quantmatrix.peers.near_limits import NearLimits
from quantmatrix.peers.packet import Asked
from quantmatrix.peers.protocol import DONE, FAILED, KILLED, Answer, Found, Task
from quantmatrix.peers.session import Bounds, Session, count_memory, describe_end
from quantmatrix.peers.verdict import Verdict, judge_ending, judge_numbers
from quantmatrix.proof.limits import Limits
from quantmatrix.tables import read
from quantmatrix.tables.rows import RuntimeCell

TABLES = read.read()
ROW = TABLES.checkpoints["modelopt-fp8-flux-2"]
ALLOWED = Limits(psnr_db=30.0, cosine=0.99, relative_l2=0.1, layer_error=0.1)


# --- sessions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "seconds", "memory", "log", "expected"),
    [
        (Bounds(), 600.0, 16 << 30, 64 << 20, ""),
        (Bounds(), 600.1, 0, 0, "the time limit of 600 s"),
        (Bounds(), 0.0, (16 << 30) + 1, 0, "the memory limit of 16 GiB"),
        (Bounds(), 0.0, 0, (64 << 20) + 1, "the limit of 64 MiB of output"),
        (Bounds(seconds=2.5), 2.5, 0, 0, ""),
        (Bounds(seconds=2.5), 2.6, 0, 0, "the time limit of 2.5 s"),
        (Bounds(memory_bytes=3 << 28), 0.0, 3 << 28, 0, ""),
        (Bounds(memory_bytes=3 << 28), 0.0, (3 << 28) + 1, 0, "the memory limit of 0.75 GiB"),
        (Bounds(log_bytes=(5 << 20) + 77), 0.0, 0, 6 << 20, "the limit of 5 MiB of output"),
    ],
)
def test_the_limit_that_a_child_exceeds(
    bounds: Bounds,
    seconds: float,
    memory: int,
    log: int,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "count_memory", lambda pid: memory)
    one = Session("toy", bounds)
    if log:
        with (tmp_path / "log.txt").open("wb") as stream:
            stream.truncate(log)
    assert one._find_exceeded(1, tmp_path, seconds) == expected
    assert Session("toy").bounds == Bounds()
    assert (one.started, one.environment) == (0, {})


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "exit code 0"),
        (3, "exit code 3"),
        (-1, "signal SIGHUP"),
        (-11, "signal SIGSEGV"),
        (-200, "signal 200"),
    ],
)
def test_the_end_of_a_child(code: int, text: str) -> None:
    assert describe_end(code) == text


def test_memory_is_that_of_all_processes_of_a_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(pid: int, name: str, own: int, pages: int) -> None:
        fields = ["S", "1", "2", str(own), *("0" for _ in range(17)), str(pages), "9999", "8888"]
        folder = tmp_path / str(pid)
        folder.mkdir()
        (folder / "stat").write_text(f"{pid} ({name}) {' '.join(fields)}\n")

    put(10, "python", 77, 3)
    put(11, "odd ) 77 name", 77, 40)
    put(12, "python", 78, 500)
    put(13, "python", 7, 6000)
    (tmp_path / "14" / "stat").mkdir(parents=True)  # as one that has ended
    monkeypatch.setattr(session, "Path", lambda name: tmp_path)
    assert count_memory(77) == 43 * os.sysconf("SC_PAGE_SIZE")
    assert count_memory(1) == 0


# --- logs, files and tasks ------------------------------------------------------------------------


def test_the_end_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    assert read_log(path) == ""
    lines = [f"line {n}  " for n in range(20)]
    path.write_text("\n\n".join([*lines, "0%\r50%\rdone", "x" * 201 + "y", "\x1b[1m", ""]))
    found = read_log(path).split("\n")
    assert found == [
        *(f"line {n}" for n in range(11, 20)),
        "done",
        "x" * 200,
        r"\x1b[1m",
    ]
    path.write_bytes(b"first\n" + b"z" * (1 << 16))
    assert read_log(path) == "z" * 200
    path.write_bytes(b"first\n" + b"z" * ((1 << 16) - 6))
    assert read_log(path) == f"first\n{'z' * 200}"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["m-Q4_0.gguf", "m-q8_0.gguf"], "m-q8_0.gguf"),
        (["m-Q4_0.gguf"], "none"),
        (["a-Q8_0.gguf", "b-Q8_0.gguf", "c.gguf"], "a-Q8_0.gguf, b-Q8_0.gguf"),
    ],
)
def test_the_file_of_a_quantization(names: list[str], found: str) -> None:
    files = [Path(name) for name in names]
    if found.endswith("q8_0.gguf"):
        assert columns.pick_file(files, "Q8_0", "o/m:Q8_0").name == found
        return
    with pytest.raises(UnusableError) as caught:
        columns.pick_file(files, "Q8_0", "o/m:Q8_0")
    assert str(caught.value) == f"o/m:Q8_0: expected one file of Q8_0, found {found}"


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("a.safetensors", True),
        ("b.gguf", True),
        ("c.json", True),
        ("d.txt", False),
        ("e.bin", False),
    ],
)
def test_files_of_weights(name: str, counts: bool, tmp_path: Path) -> None:
    assert not columns.is_weights(tmp_path / name)
    (tmp_path / name).touch()
    assert columns.is_weights(tmp_path / name) is counts


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("12", (12,)), ("1.2.3.4rc1", (1, 2, 3, 4)), ("v1.2", ()), ("1.", (1,)), ("", ())],
)
def test_numbers_of_a_version(text: str, numbers: tuple[int, ...]) -> None:
    assert columns.read_version(text) == numbers


@pytest.mark.parametrize(
    ("version", "minimum", "why"),
    [
        ("1.9", "1.10", "diffusers 1.9 is older than 1.10, which is needed"),
        ("1.10", "1.10", ""),
        ("1.11", "1.10", ""),
        ("0.1", "", ""),
        ("", "1.10", "not there"),
    ],
)
def test_a_version_and_the_oldest_that_is_known(
    version: str, minimum: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Found(version=version) if version else Found(why="not there")
    monkeypatch.setattr(peers, "load", lambda name: SimpleNamespace(probe=lambda: found))
    rows = {
        name: replace(row, minimum=minimum)
        for name, row in TABLES.runtimes.items()
        if name in ("quantmatrix", "diffusers", "xdit")
    }
    tables = replace(TABLES, runtimes=rows)
    assert columns.probe("diffusers", tables) == (Found(why=why) if why else found)
    with pytest.raises(UsageError) as caught:
        columns.probe("quantmatrix", tables)
    assert str(caught.value) == (
        "--runtime quantmatrix: not in runtimes.csv; known: diffusers, xdit"
    )


class Adapter:
    """A runtime that knows two ways."""

    ID = "toy"

    def __init__(self, *ways: str) -> None:
        self.known = ways

    def ways(self, task: Task) -> tuple[str, ...]:
        return ("plain",) if task.baseline else self.known

    def command(self, task: Task) -> str:
        return f"toy {task.way} {task.weights}"

    def explain(self, answer: Answer) -> str:
        return f"{answer.kind}: {answer.error}"


def open_column(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *ways: str,
    hardware: str = "cpu",
    tiny: bool = False,
    **more: Any,
) -> Column:
    monkeypatch.setattr(columns, "probe", lambda *_: Found(version="1.5"))
    monkeypatch.setattr(peers, "load", lambda name: Adapter(*ways))
    limits: Any = SimpleNamespace(find=lambda row: ALLOWED)
    return Column(TABLES, "diffusers", hardware, folder, tiny=tiny, limits=limits, **more)


@pytest.mark.parametrize(
    ("cores", "workers", "tiny", "settings"),
    [
        (8, 1, False, {}),
        (8, 3, False, {"OMP_NUM_THREADS": "2"}),
        (2, 3, False, {"OMP_NUM_THREADS": "1"}),
        (None, 2, False, {"OMP_NUM_THREADS": "1"}),
        (9, 2, True, {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "4"}),
        (9, 1, True, {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}),
    ],
)  # fmt: skip
def test_the_environment_of_children(
    cores: int | None,
    workers: int,
    tiny: bool,
    settings: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    bounds = Bounds(seconds=7)
    column = open_column(monkeypatch, tmp_path, workers=workers, tiny=tiny, bounds=bounds)
    found = column.find_session("toy")
    assert (found.environment, found.bounds) == (settings, bounds)
    assert column.find_session("toy") is found
    assert column.find_session("other") is not found


@pytest.mark.parametrize(
    ("hardware", "device"),
    [("cpu", "cpu"), ("ascend-910b", "npu"), ("h200", "cuda"), ("mi300x", "cuda")],
)
def test_the_device_of_a_column(
    hardware: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_column(monkeypatch, tmp_path, hardware=hardware).device == device


@pytest.mark.parametrize(("tiny", "end"), [(False, ""), (True, " --tiny")])
def test_the_command_that_makes_a_record_again(
    tiny: bool, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    column = open_column(monkeypatch, tmp_path, tiny=tiny)
    assert column.write_again(RuntimeCell("a b", "h200", "xdit")) == (
        f"quantmatrix run-column --runtime xdit --hardware h200 --checkpoint 'a b'{end}"
    )


def test_flags_of_a_checkpoint_are_those_of_its_hardware(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    column = open_column(monkeypatch, tmp_path)

    def cell(checkpoint: str, hardware: str, claim: str, flag: str) -> Any:
        return SimpleNamespace(checkpoint=checkpoint, hardware=hardware, claim=claim, flags=(flag,))

    cells = (
        cell("c", "h200", "refused", "1"),
        cell("d", "cpu", "expected", "2"),
        cell("c", "h200", "expected", "3"),
        cell("c", "cpu", "refused", "4"),
        cell("c", "cpu", "planned", "5"),
        cell("e", "b200", "expected", "6"),
    )
    column.tables = replace(TABLES, cells=cells)
    assert [column.find_flags(name) for name in "cdef"] == [("5",), ("2",), ("6",), ()]


def test_flags_are_left_as_they_are_but_for_stand_ins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    column = open_column(monkeypatch, tmp_path, tiny=True)
    monkeypatch.setattr(column, "locate", lambda reference: f"<{reference}>")
    assert column.locate_flag("/path/to/a.png#sha256") == "</path/to/a.png>#sha256"
    assert column.locate_flag("/path/to/a.png") == "</path/to/a.png>"
    assert column.locate_flag("--prompt") == "--prompt"
    column.tiny = False
    assert column.locate_flag("/path/to/a.png#x") == "/path/to/a.png#x"


def answers(column: Column, given: dict[str, Answer], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the folders that are asked, each answered by its way."""
    asked: list[str] = []

    class Child:
        def ask(self, task: Task, folder: Path) -> Answer:
            asked.append(folder.name)
            return given[task.way]

    monkeypatch.setattr(column, "find_session", lambda runtime: Child())
    return asked


def refusal(text: str, **more: Any) -> Answer:
    return Answer(FAILED, kind="E", error=text, **more)


def test_ways_are_tried_until_one_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    column = open_column(monkeypatch, tmp_path, "first", "second", "third")
    done = Answer(DONE, media="x.png", seconds={"load": 1.25, "generate": 2.0004}, peak_bytes=77)
    given = {"plain": done, "first": refusal("no"), "second": done, "third": refusal("never")}
    asked = answers(column, given, monkeypatch)

    def read_side(folder: Path, media: str, *, latents: bool) -> list[torch.Tensor]:
        base = torch.arange(12.0)
        return [base if folder.name.startswith("0001") else base + 0.01]

    monkeypatch.setattr(columns, "read_side", read_side)
    outcome = column.run_one(ROW)
    assert asked == [
        "0001-base-flux-2",
        "0002-modelopt-fp8-flux-2",
        "0003-modelopt-fp8-flux-2",
    ]
    record = outcome.record
    assert record is not None
    assert (record.verdict, record.reason, record.version) == ("works", "", "1.5")
    assert (record.command, record.scope) == (f"toy second {ROW.reference}", "published")
    assert record.tried == ("first: refuses: E: no",)
    assert (record.seconds, record.peak_bytes) == (3.25, 77)
    assert record.metrics["steps"] == 1
    assert outcome.pair is not None
    assert (outcome.pair.ran.folder.name, outcome.pair.decoded) == (
        "0003-modelopt-fp8-flux-2",
        False,
    )
    column.run_one(ROW)
    assert asked[3:] == ["0004-modelopt-fp8-flux-2", "0005-modelopt-fp8-flux-2"]  # one base


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_one_worker_is_the_thread_that_asks(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    column = open_column(monkeypatch, tmp_path, workers=workers)
    threads: list[int] = []

    def run_one(row: Any) -> Outcome:
        threads.append(threading.get_ident())
        return Outcome(RuntimeCell(row.id, "cpu", "diffusers"), None)

    monkeypatch.setattr(column, "run_one", run_one)
    some = [ROW.id, "fp8-guide", "modelopt-nvfp4-wan-2-2"]
    found = [outcome.cell.checkpoint for outcome in column.run(some)]
    assert sorted(found) == sorted(some)
    assert (threading.get_ident() in threads) is (workers == 1)
    assert len(list(column.run())) == len(TABLES.checkpoints)


@pytest.mark.parametrize(
    ("home", "found"), [("/", "/own/x"), ("/o", "$HOMEwn/x"), ("/own", "$HOME/x")]
)
def test_folders_of_this_machine_are_no_part_of_a_record(
    home: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    column = open_column(monkeypatch, tmp_path / "runs")
    monkeypatch.setattr(columns.Path, "home", lambda: Path(home))
    monkeypatch.setattr("quantmatrix.tiny.hub.default_folder", lambda: Path("/hub"))
    assert column.make_portable({"a": ["/own/x"]}) == {"a": [found]}
    assert column.make_portable(f"{tmp_path}/runs/1") == "$WORK/1"
    assert column.make_portable("/hub/a") == "$HUB/a"


def test_a_record_of_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    column = open_column(monkeypatch, tmp_path, tiny=True)
    ran = Ran(Task(ROW, "b", ""), refusal("no"), tmp_path)
    cell = RuntimeCell(ROW.id, "cpu", "diffusers")
    record = column.record(cell, [(Verdict("refuses", "no\x1b"), ran)])
    assert (record.scope, record.reason, record.checkpoint) == ("stand-in", r"no\x1b", {})
    assert record.again.endswith(" --tiny")


def test_files_of_a_task_are_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    column = open_column(monkeypatch, tmp_path)
    monkeypatch.setattr(columns.records, "describe_files", lambda files: {"files": files})
    folder = tmp_path / "w"
    folder.mkdir()
    for name in ("b.safetensors", "a.json", "c.txt"):
        (folder / name).touch()

    def describe(weights: Path | str) -> Any:
        return column.describe_files(Task(ROW, "b", str(weights)))

    assert describe(folder) == {"files": [folder / "a.json", folder / "b.safetensors"]}
    assert describe(folder / "c.txt") == {"files": [folder / "c.txt"]}
    assert describe("") == describe(folder / "none") == {}


def test_a_runtime_that_cannot_run_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    column = open_column(monkeypatch, tmp_path, "first")
    given = {
        "plain": refusal("too large", loaded=True),
        "decode": refusal("ours", meant=False),
        "first": refusal("no"),
    }
    asked = answers(column, given, monkeypatch)
    column.tables = TABLES
    outcome = column.run_one(ROW)
    assert outcome.record is None
    assert outcome.problem == (
        f"its BF16 run of {ROW.base} crashes: E: too large; our decode crashes: E: ours"
    )
    assert asked[1] == "0002-quantmatrix-modelopt-fp8-flux-2"
    given["decode"] = Answer(DONE)
    record = column.run_one(ROW).record
    assert record is not None
    assert record.tried == (
        f"compared with our decode of the file: its BF16 run of {ROW.base} crashes: E: too large",
    )
    assert (record.verdict, record.reason) == ("refuses", "E: no")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            replace(ROW, form="single-file", selector="--x"),
            "the adapter knows no documented way to load a single-file named by --x",
        ),
        (
            replace(ROW, form="online", selector="--quantization", reference="fp8"),
            "the adapter knows no documented way to load --quantization fp8",
        ),
    ],
)
def test_a_file_without_a_way(
    row: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    column = open_column(monkeypatch, tmp_path)
    answers(column, {"plain": Answer(DONE)}, monkeypatch)
    record = column.run_one(row).record
    assert record is not None
    assert (record.verdict, record.reason, record.tried) == ("refuses", reason, ())


def test_the_best_of_several_ways() -> None:
    def tried(*verdicts: str) -> list[Any]:
        return [(Verdict(name), number) for number, name in enumerate(verdicts)]

    for verdicts, best in (
        (("crashes", "refuses", "wrong numbers", "works"), 3),
        (("refuses", "refuses"), 0),
        (("works", "works"), 0),
    ):
        assert find_best(tried(*verdicts))[1] == best
    order = sorted(columns.BEST, key=lambda name: columns.BEST[name])
    for earlier, later in itertools.pairwise(order):
        assert find_best(tried(later, earlier))[1] == 1


def test_only_one_side_gave_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    column = open_column(monkeypatch, tmp_path)
    task = Task(ROW, "b", "w")
    with_latents = Ran(task, Answer(DONE, latents=True), tmp_path)
    without = Ran(task, Answer(DONE), tmp_path)
    for pair in (Pair(with_latents, without, False), Pair(without, with_latents, False)):
        assert column.judge(pair) == Verdict(
            "wrong numbers", "only one of the two runs gave latents"
        )
    monkeypatch.setattr(Ran, "read_numbers", lambda self, latents: [torch.tensor([1.0, 2.0])])
    assert column.judge(Pair(without, with_latents, True)).verdict == "works"
    assert column.judge(Pair(without, without, False)).verdict == "not quantized"
    outcome = Outcome(RuntimeCell("a", "b", "c"), None)
    assert (outcome.problem, outcome.skipped, outcome.pair) == ("", False, None)
    for value, name in ((outcome, "problem"), (with_latents, "folder"), (Bounds(), "seconds")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, 1)


def test_a_side_without_latents_is_its_picture(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), (0, 255, 102)).save(tmp_path / "x.png")
    [found] = columns.read_side(tmp_path, "x.png", latents=False)
    assert (found.shape, found.dtype) == ((2, 3, 3), torch.float32)
    assert found[0, 0].tolist() == pytest.approx([-1.0, 1.0, -0.2])
    assert columns.read_side(tmp_path, "", latents=False) == []
    common.save_latents([torch.ones(2)], tmp_path)
    assert len(columns.read_side(tmp_path, "x.png", latents=True)) == 1


# --- verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer(DONE), None),
        (Answer(KILLED, kind="the time limit of 2 s"), ("crashes", "exceeds the time limit of 2 s")),
        (Answer(KILLED, kind="signal 9"), ("crashes", "died: signal 9")),
        (Answer(KILLED, kind="then"), ("crashes", "died: then")),
        (Answer(FAILED, kind="missing E"), ("not installed", "words")),
        (Answer(FAILED, kind="E"), ("refuses", "missing words")),
        (Answer(FAILED, kind="E", loaded=True), ("crashes", "missing words")),
        (Answer(FAILED, kind="E", meant=False), ("crashes", "missing words")),
        (Answer(FAILED, kind="E", meant=False, loaded=True), ("crashes", "missing words")),
    ],
)  # fmt: skip
def test_the_verdict_of_an_ending(answer: Answer, expected: tuple[str, str] | None) -> None:
    found = judge_ending(answer, "missing words")
    assert found == (None if expected is None else Verdict(*expected))


NEAR, FAR = torch.tensor([1.0, 2.0, 3.001]), torch.tensor([1.0, 2.0, 4.0])
BASE = torch.tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("found", "weights", "decoded", "verdict", "reason"),
    [
        (NEAR, {}, False, "works", ""),
        (NEAR, {"float8_e4m3fn": 1, "bfloat16": 9}, False, "works", ""),
        (
            NEAR,
            {"bfloat16": 12, "float32": 5},
            False,
            "not quantized",
            "in memory are 12 bytes of bfloat16, 5 bytes of float32: nothing narrow",
        ),
        (
            NEAR,
            {"int64": 3, "float16": 4},
            True,
            "not quantized",
            "in memory are 3 bytes of int64, 4 bytes of float16: nothing narrow",
        ),
        (NEAR, {"uint8": 0}, False, "not quantized", "in memory are 0 bytes of uint8: nothing narrow"),
        (
            BASE,
            {"int8": 1},
            False,
            "not quantized",
            "every step equals its BF16 run bit for bit: the quantized weights were not used",
        ),
        (BASE, {"int8": 1}, True, "works", ""),
        (
            FAR,
            {"int8": 1},
            True,
            "wrong numbers",
            "psnr_db 10.7918 at the worst step, the limit is at least 30.0; "
            "relative_l2 0.267261 at the worst step, the limit is at most 0.1",
        ),
    ],
)  # fmt: skip
def test_the_verdict_of_numbers(
    found: torch.Tensor, weights: dict[str, int], decoded: bool, verdict: str, reason: str
) -> None:
    judged = judge_numbers([BASE], [found], weights, ALLOWED, decoded=decoded)
    assert judged.verdict == verdict
    assert judged.reason == reason
    assert judged.metrics["steps"] == 1
    assert judged.limits["psnr_db"] == {"at_least": 30.0}


def test_runs_that_cannot_be_compared() -> None:
    judged = judge_numbers([BASE], [BASE, BASE], {}, ALLOWED)
    assert judged == Verdict(
        "wrong numbers",
        "reference has 1 steps, candidate 2: compare runs with one --num-inference-steps",
    )
    assert verdict.Verdict("works") == Verdict("works", "", {}, {})


# --- limits -------------------------------------------------------------------------------------


def make_limits(cells: list[tuple[str, str, str, str]], samples: list[tuple[str, str]]) -> Any:
    """(id, checkpoint, family, kind) of cells of one model, (kind, model) of samples."""
    near = NearLimits(
        SimpleNamespace(  # type: ignore[arg-type]
            cells=[
                SimpleNamespace(id=name, checkpoint=checkpoint, family=family, model="m")
                for name, checkpoint, family, _ in cells
            ]
        ),
        "cpu",
    )
    psnr = {"a": 30.0, "b": 20.0, "c": 40.0}
    near.__dict__["ledger"] = SimpleNamespace(
        samples=[SimpleNamespace(kind=kind, model=model) for kind, model in samples],
        find=lambda kind, model, hardware: replace(ALLOWED, psnr_db=psnr[kind], kind=kind),
    )
    kinds = {name: kind for name, _, _, kind in cells}
    near.read_kind = lambda cell: kinds[cell.id]  # type: ignore[method-assign]
    return near


@pytest.mark.parametrize(
    ("cells", "samples", "kind"),
    [
        ([("1", "x", "f", "a"), ("2", "x", "f", "b"), ("3", "y", "f", "c")], [("c", "m")], "b"),
        ([("1", "x", "f", ""), ("3", "y", "f", "c"), ("4", "y", "g", "b")], [("b", "m")], "c"),
        ([("1", "y", "g", "b")], [("a", "m"), ("c", "m"), ("b", "n")], "a"),
    ],
)
def test_the_nearest_limits_serve_and_the_widest_of_them(
    cells: list[tuple[str, str, str, str]], samples: list[tuple[str, str]], kind: str
) -> None:
    row: Any = SimpleNamespace(id="x", family="f", model="m")
    assert make_limits(cells, samples).find(row).kind == kind


def test_a_model_without_limits() -> None:
    row: Any = SimpleNamespace(id="x", family="f", model="m")
    with pytest.raises(UnusableError) as caught:
        make_limits([], [("a", "n")]).find(row)
    assert str(caught.value) == "x: no limits: run the suites of m first"


# --- packets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "share"), [(1001, 900), (999, 899), (7, 6), (0, 0)])
def test_the_share_of_memory_of_a_run(
    memory: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantmatrix.hardware.probe.read_memory", lambda: memory)
    found = packet.read_memory()
    assert (found, type(found)) == (share, int)


@pytest.mark.parametrize(
    ("asked", "vendor", "tiny", "cores", "workers"),
    [
        (None, "cpu", True, 3, 2),
        (None, "cpu", True, None, 1),
        (None, "nvidia", True, 8, 1),
        (1, "nvidia", False, 8, 1),
        (5, "cpu", True, 2, 5),
    ],
)
def test_workers_of_a_column(
    asked: int | None,
    vendor: str,
    tiny: bool,
    cores: int | None,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert packet.choose_workers(asked, vendor, tiny=tiny) == workers
    for wrong in (0, -3):
        with pytest.raises(UsageError) as caught:
            packet.choose_workers(wrong, vendor, tiny=tiny)
        assert str(caught.value) == f"--workers {wrong}: at least 1"


def test_what_a_column_is_made_of() -> None:
    asked = Asked("diffusers", "cpu")
    assert (asked.checkpoints, asked.tiny, asked.workers) == ((), False, 1)
    assert asked.bounds == Bounds(600.0, 17179869184, 67108864)
    with pytest.raises(FrozenInstanceError):
        asked.tiny = True  # type: ignore[misc]


def test_hardware_that_a_runtime_does_not_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packet.identify, "resolve", lambda name, rows: name)
    asked: list[str] = []
    monkeypatch.setattr(packet.identify, "require", lambda row: asked.append(row.id))
    rows = {name: TABLES.hardware[name] for name in ("cpu", "h200", "b200")}
    runtime = replace(TABLES.runtimes["xdit"], hardware=("big", "cpu"))
    tables: Any = SimpleNamespace(
        hardware=rows, runtimes={"xdit": runtime}, groups={"big": ("h200", "mi300x")},
        checkpoints={"a": 1, "b": 2},
    )  # fmt: skip
    assert packet.find_hardware(tables, "xdit", "h200") == "h200"
    assert packet.find_hardware(tables, "unknown", "b200") == "b200"
    assert asked == ["h200", "b200"]
    for name, text in (
        ("x", "--hardware x: not in hardware.csv; known: cpu, h200, b200"),
        (
            "b200",
            "--hardware b200: xdit does not run there; its row of runtimes.csv has h200, mi300x, cpu",
        ),
    ):
        with pytest.raises(UsageError) as caught:
            packet.find_hardware(tables, "xdit", name)
        assert str(caught.value) == text
    assert packet.check_names(tables, ["b", "a"]) == ("b", "a")
    with pytest.raises(UsageError) as caught:
        packet.check_names(tables, ["a", "c"])
    assert str(caught.value) == (
        "--checkpoint c: not in checkpoints.csv; see `quantmatrix matrix list`"
    )


def test_the_runs_behind_a_record(tmp_path: Path) -> None:
    task = Task(ROW, "b", "w")
    pair = Pair(
        Ran(task, Answer(DONE, media="m", latents=True), tmp_path / "one"),
        Ran(task, Answer(DONE), tmp_path / "two"),
        True,
    )
    assert packet.describe_pair(pair) == {
        "run": {"folder": "one", "media": "m", "latents": True},
        "beside": {"folder": "two", "media": "", "latents": False},
        "decoded": True,
    }


def test_files_of_a_packet(tmp_path: Path) -> None:
    from quantmatrix.proof.record import digest_file

    for name in ("a.txt", "d/b.txt", "d/c.txt", "z.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "e.txt").symlink_to(tmp_path / "a.txt")
    digest = digest_file(tmp_path / "a.txt")
    lines = [
        f"{digest}  a.txt",
        f"{digest}  d/b.txt",
        f"{digest}  gone.txt",
        f"{digest}  away.txt",
        f"{digest}  e.txt",
    ]
    sums = tmp_path / "SHA256SUMS"
    sums.write_text("\n".join(lines) + "\n")
    assert packet_check.list_file_problems(tmp_path) == [
        "away.txt: missing",
        "gone.txt: missing",
        "d/c.txt: not in SHA256SUMS",
        "z.txt: not in SHA256SUMS",
        "d/b.txt: has another digest than SHA256SUMS says: it was changed",
        "e.txt: a link or a device, expected a file",
    ]
    form = ["SHA256SUMS: expected lines of a digest, two spaces and a name, each name once"]
    for wrong in (f"{digest} a.txt", lines[0], f"{digest[1:]}  b", ""):
        sums.write_text("\n".join([*lines, wrong, ""]))
        assert packet_check.list_file_problems(tmp_path) == form


@pytest.mark.parametrize("name", ["runtimes", "runs.json", ""])
def test_a_packet_of_a_column(name: str, tmp_path: Path) -> None:
    if name:
        (tmp_path / name).mkdir()
    assert packet_check.is_column(tmp_path) is bool(name)


def test_runs_of_a_packet_are_judged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record: Any = SimpleNamespace(cell={"checkpoint": ROW.id}, weights={"int8": 3})
    limits: Any = SimpleNamespace(find=lambda row: ALLOWED)

    def about(folder: str, media: str, latents: bool) -> dict[str, Any]:
        return {"folder": folder, "media": media, "latents": latents}

    asked: list[Any] = []

    def read_side(folder: Path, media: str, *, latents: bool) -> list[torch.Tensor]:
        asked.append((folder.relative_to(tmp_path).as_posix(), media, latents))
        return [BASE if folder.name == "base" else NEAR]

    monkeypatch.setattr(packet_check, "read_side", read_side)

    def judge(run: Any, beside: Any, decoded: bool = False) -> Verdict:
        told = {"run": run, "beside": beside, "decoded": decoded}
        return packet_check.judge_again(tmp_path, record, told, limits, TABLES)

    found = judge(about("own", "a.png", False), about("base", "b.png", False))
    assert (found.verdict, found.metrics["steps"]) == ("works", 1)
    assert asked == [("runs/base", "b.png", False), ("runs/own", "a.png", False)]
    only = "only one of the two runs gave latents"
    assert judge(about("own", "", True), about("base", "", False)).reason == only
    assert judge(about("own", "", True), about("base", "", False), True).verdict == "works"
    for wrong in (about("../x", "", False), about("a", "/x", False), about("a", "b/../c", False)):
        with pytest.raises(ValueError, match="leads out of the packet"):
            judge(wrong, about("base", "", False))
        with pytest.raises(ValueError, match="leads out of the packet"):
            judge(about("own", "", False), wrong)


def test_a_worker_answers_a_line_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import json

    lines = [
        json.dumps({"task": Task(ROW, "b", way).to_json(), "folder": str(tmp_path / way)})
        for way in ("one", "two")
    ]
    reading, writing = os.pipe()
    seen: list[str] = []
    monkeypatch.setattr(worker.os, "dup", lambda number: writing if number == 1 else -1)
    monkeypatch.setattr(worker, "redirect", lambda folder: seen.append(folder.name))
    monkeypatch.setattr(worker, "release", lambda: seen.append("release"))
    monkeypatch.setattr(worker.resource, "setrlimit", lambda kind, limits: seen.append(str(limits)))
    monkeypatch.setattr(
        worker.peers, "load", lambda name: SimpleNamespace(
            run=lambda task, folder: Answer(DONE, media=f"{name} {task.weights}")
        )
    )  # fmt: skip
    monkeypatch.setattr(worker.sys, "stdin", io.StringIO("\n".join(lines)))
    assert worker.main(["toy"]) == 0
    with os.fdopen(reading) as stream:
        found = [Answer(**json.loads(line)) for line in stream]
    assert [one.media for one in found] == ["toy one", "toy two"]
    assert seen == ["(0, 0)", "one", "release", "two", "release"]


def test_what_a_task_left_goes_and_what_stays_is_not_looked_at_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(gc, "collect", lambda: seen.append("collect"))
    monkeypatch.setattr(gc, "freeze", lambda: seen.append("freeze"))
    monkeypatch.setattr(gc, "get_freeze_count", lambda: seen.count("freeze"))
    common.release()
    assert seen == ["collect", "freeze"]
    common.release()
    assert seen == ["collect", "freeze", "collect"]


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("o/n", "snapshot"),
        ("/o/n/", "snapshot"),
        ("o/n/deep/x.safetensors", "snapshot/deep/x.safetensors"),
        ("o/n/deep:Q8_0", "snapshot/deep/a-Q8_0.gguf"),
        ("/path/to/x", "local"),
        ("/path/to/x/y", "local/y"),
    ],
)
def test_where_a_stand_in_lies(
    reference: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantmatrix.tiny import hub

    column = open_column(monkeypatch, tmp_path, tiny=True)
    made: list[Any] = []
    monkeypatch.setattr(hub, "default_folder", lambda: tmp_path / "hub")
    monkeypatch.setattr(hub, "ensure", lambda *given: made.append(given))
    monkeypatch.setattr(hub, "find_snapshot", lambda name, folder: tmp_path / "snapshot")
    monkeypatch.setattr(hub, "path_of", lambda name, folder: tmp_path / "local")
    (tmp_path / "snapshot" / "deep").mkdir(parents=True)
    for name in ("deep/a-Q8_0.gguf", "deep/a-Q4_0.gguf", "a-Q8_0.gguf"):
        (tmp_path / "snapshot" / name).touch()
    assert column.locate(reference) == str(tmp_path / found)
    assert made == [(reference, tmp_path / "hub", TABLES)]
    column.tiny = False
    assert column.locate("o/n/x.gguf") == "o/n/x.gguf"
    assert len(made) == 1


@pytest.mark.parametrize(
    ("tiny", "form", "base", "weights"),
    [
        (False, "component-folder", "<own/base>", "<own/w>"),
        (True, "component-folder", f"<{TABLES.models['flux-2'].repo}>", "<own/w>"),
        (False, "online", "<own/base>", ""),
        (False, "a", "<own/base>", "<own/w>"),
        (False, "z", "<own/base>", "<own/w>"),
    ],
)
def test_the_task_of_a_row(
    tiny: bool, form: str, base: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    column = open_column(monkeypatch, tmp_path, tiny=tiny, hardware="h200")
    monkeypatch.setattr(column, "locate", lambda reference: f"<{reference}>")
    monkeypatch.setattr(column, "find_flags", lambda name: ("--a", "/path/to/b#c"))
    row = replace(ROW, form=form, base="own/base", reference="own/w")
    assert column.make_task(row) == Task(
        row,
        base,
        weights,
        ("--a", "</path/to/b>#c" if tiny else "/path/to/b#c"),
        device="cuda",
        tiny=tiny,
    )
    if not tiny and form != "online":
        skipped = column.run_one(replace(row, reference="/path/to/w"))
        assert (skipped.record, skipped.skipped) == (None, True)
        assert skipped.problem == "/path/to/w exists only as a stand-in: run it with --tiny"
