"""Column: verdicts of stub programs that speak the documented flags, and of faults planted in them."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError
from peers_stubs import SGLANG, XDIT, Fixed, install
from PIL import Image

from quantmatrix.cli.main import main
from quantmatrix.errors import UnusableError, UsageError
from quantmatrix.exit_codes import ENVIRONMENT_UNUSABLE, EXIT_USAGE
from quantmatrix.harness import sessions
from quantmatrix.peers import column as columns
from quantmatrix.peers import packet, packet_check
from quantmatrix.peers.column import Column, Outcome, read_version
from quantmatrix.peers.protocol import DONE, FAILED, Answer, Task
from quantmatrix.proof.columns import RuntimeRecord, decode, encode
from quantmatrix.tables import read
from quantmatrix.tables.rows import CheckpointRow

FOLDER = "modelopt-fp8-flux-2"


def run(runtime: str, checkpoint: str, folder: Path, hardware: str = "h200") -> RuntimeRecord:
    with Column(
        read.read(), runtime, hardware, folder / "runs", tiny=False, limits=Fixed()
    ) as column:
        [outcome] = column.run([checkpoint])
    assert outcome.record is not None, outcome.problem
    assert decode(encode(outcome.record), "x") == outcome.record
    return outcome.record


@pytest.mark.parametrize(
    ("fault", "verdict", "reason"),
    [
        ("", "works", ""),
        ("noise", "wrong numbers", "psnr_db "),
        ("bf16", "not quantized", "every step equals its BF16 run bit for bit"),
        ("wide", "not quantized", "in memory are 1000 bytes of bfloat16: nothing narrow"),
        ("refuse", "refuses", r"exit code 1: ValueError: no loader for this layout\x1b[31m"),
        ("crash", "crashes", "signal 11"),
        ("silent", "refuses", "no output: "),
    ],
)
def test_faults_of_a_stub_get_their_own_verdicts(
    fault: str, verdict: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sglang", SGLANG, tmp_path / "bin", monkeypatch)
    monkeypatch.setenv("FAULT", fault)
    found = run("sglang", FOLDER, tmp_path)
    assert (found.verdict, found.version) == (verdict, "0.5.6")
    assert found.reason.startswith(reason)
    assert "\x1b" not in found.reason + found.log
    if verdict == "works":
        assert (found.seconds, found.peak_bytes) == (1.5, 64 << 20)
        assert found.metrics["worst"]["psnr_db"] > 30


@pytest.mark.parametrize(
    ("checkpoint", "command"),
    [
        (
            FOLDER,
            "sglang generate --model-path black-forest-labs/FLUX.2-dev --transformer-path "
            "BBuf/flux2-dev-modelopt-fp8-sglang-transformer",
        ),
        (
            "modelopt-nvfp4-wan-2-2",
            "SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND=cudnn sglang generate --model-path "
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers --transformer-path "
            "BBuf/wan22-t2v-a14b-modelopt-nvfp4-sglang-transformer",
        ),
        (
            "msmodelslim-w8a8",
            "sglang generate --model-path Eco-Tech/Wan2.2-T2V-A14B-Diffusers-w8a8",
        ),
        (
            "fp8-flux-1-online",
            "sglang generate --model-path black-forest-labs/FLUX.1-dev --quantization fp8",
        ),
    ],
)
def test_commands_of_sglang_are_the_guides(
    checkpoint: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sglang", SGLANG, tmp_path / "bin", monkeypatch)
    found = run("sglang", checkpoint, tmp_path, "b200")
    assert found.command.startswith(command)
    assert found.verdict == "works"
    log = next((tmp_path / "runs").glob("0001-base-*/log.txt")).read_text()
    base = json.loads(log.splitlines()[0])
    assert not {"--transformer-path", "--enable-svdquant", "--quantization"} & set(base)


def test_flags_that_describe_a_file_are_not_the_bases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sglang", SGLANG, tmp_path / "bin", monkeypatch)
    tables = read.read()
    row = tables.checkpoints["svdq-qwen-image-custom"]
    with Column(tables, "sglang", "b200", tmp_path, tiny=False, limits=Fixed()) as column:
        task = column.make_task(row)
        assert column.adapter.command(task).startswith(
            "sglang generate --model-path Qwen/Qwen-Image --transformer-weights-path "
            "/path/to/custom_nunchaku_checkpoint.safetensors --enable-svdquant "
            "--quantization-precision int4 --quantization-rank 128"
        )
        base = column.adapter.command(replace(task, baseline=True, weights=""))
        assert base.startswith("sglang generate --model-path Qwen/Qwen-Image --prompt ")
        outcome = column.run_one(row)  # the guide's placeholder is no file
    assert (outcome.record, outcome.skipped) == (None, True)
    assert "exists only as a stand-in" in outcome.problem


def test_xdit_takes_pipelines_and_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("xdit", XDIT, tmp_path / "bin", monkeypatch)
    online = run("xdit", "fp8-flux-1-online", tmp_path)
    assert (online.verdict, online.version) == ("works", "0.4.5")
    assert "--use_fp8_gemms" in online.command
    found = run("xdit", FOLDER, tmp_path / "again")
    assert found.verdict == "refuses"
    assert found.reason.startswith("the adapter knows no documented way to load a component-folder")


class Decoder:
    """In place of the child that runs our own decoding: a picture as the stub draws it, or a failure."""

    def __init__(self, shade: int | None) -> None:
        self.shade = shade
        self.asked: list[Task] = []

    def ask(self, task: Task, folder: Path) -> Answer:
        self.asked.append(task)
        if self.shade is None:
            return Answer(FAILED, kind="UsageError", error="no such file")
        folder.mkdir(parents=True)
        picture = Image.new("RGB", (16, 16))
        for x, y in itertools.product(range(16), range(16)):
            picture.putpixel((x, y), (16 * x, 16 * y, self.shade))
        picture.save(folder / "media.png")
        return Answer(DONE, loaded=True, media="media.png", latents=True)

    def stop(self) -> None:
        pass


@pytest.mark.parametrize(
    ("shade", "fault", "verdict"),
    [(128, "", "works"), (128, "bf16", "works"), (128, "noise", "wrong numbers"), (None, "", None)],
)
def test_a_runtime_whose_base_fails_is_compared_with_our_decode(
    shade: int | None,
    fault: str,
    verdict: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same file is decoded by us; to equal it bit for bit is no fault. Without that: no record."""
    program = SGLANG.replace("fail(quantized)\nif", "quantized or sys.exit(5)\nif")
    install("sglang", program, tmp_path / "bin", monkeypatch)
    monkeypatch.setenv("FAULT", fault)
    if fault == "bf16":  # the same picture, held in eight bits
        program = program.replace('fault in ("bf16", "wide")', 'fault == "wide"')
        install("sglang", program, tmp_path / "bin", monkeypatch)
    runs, own = tmp_path / "runs", Decoder(shade)
    with Column(read.read(), "sglang", "h200", runs, tiny=False, limits=Fixed()) as one:
        find = one.find_session
        monkeypatch.setattr(
            one, "find_session", lambda name: own if name == "quantmatrix" else find(name)
        )
        [outcome] = one.run([FOLDER])
    [asked] = own.asked
    assert (asked.baseline, asked.weights) == (False, one.make_task(asked.checkpoint).weights)
    base = "its BF16 run of black-forest-labs/FLUX.2-dev refuses: exit code 5"
    if verdict is None:
        assert outcome.record is None
        assert outcome.problem.startswith(base)
        assert outcome.problem.endswith("; our decode refuses: UsageError: no such file")
        return
    assert outcome.record is not None
    assert outcome.record.verdict == verdict, outcome.record.reason
    assert outcome.record.tried[0].startswith(f"compared with our decode of the file: {base}")


MEETING = """
import time
here = Path(os.environ["MEETING"])
(here / str(os.getpid())).touch()
end = time.monotonic() + 20
while len(list(here.iterdir())) < 2 and time.monotonic() < end:
    time.sleep(0.01)
len(list(here.iterdir())) > 1 or sys.exit(7)
found = parser"""


def test_two_models_run_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in children of its own: a program that waits for another one of its kind goes on.

    What comes of each checkpoint is what one after the other gives, and no run has another's folder.
    """
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    monkeypatch.setenv("MEETING", str(meeting))
    install("sglang", SGLANG.replace("\nfound = parser", MEETING), tmp_path / "bin", monkeypatch)
    wanted = [FOLDER, "modelopt-nvfp4-wan-2-2", "fp8-flux-1-online"]
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    found: dict[int, dict[str, RuntimeRecord | None]] = {}
    for workers in (2, 1):
        with Column(
            read.read(),
            "sglang",
            "h200",
            tmp_path / f"runs-{workers}",
            tiny=False,
            limits=Fixed(),
            workers=workers,
        ) as column:
            outcomes = {one.cell.checkpoint: one for one in column.run(wanted)}
        found[workers] = {name: one.record for name, one in outcomes.items()}
        folders = [one.pair.ran.folder for one in outcomes.values() if one.pair]
        assert len({folder.name.partition("-")[0] for folder in folders}) == len(wanted)
    for name in wanted:
        one, other = found[1][name], found[2][name]
        assert one is not None
        assert other is not None
        assert (one.verdict, one.command, one.metrics) == (
            other.verdict,
            other.command,
            other.metrics,
        )
        assert one.verdict == "works", one.reason


@pytest.mark.parametrize("late", [0.0, 0.3])
def test_a_thread_that_fails_ends_the_column(
    late: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("sglang", SGLANG, tmp_path / "bin", monkeypatch)
    with Column(
        read.read(), "sglang", "h200", tmp_path, tiny=False, limits=Fixed(), workers=2
    ) as column:
        run_one = column.run_one
        started = threading.Event()

        def fail(row: CheckpointRow) -> Outcome:
            if row.model == "wan-2-2":
                started.wait()
                raise OSError("the disk is full")
            started.set()
            time.sleep(late)  # a child that starts when all others have been ended
            return run_one(row)

        monkeypatch.setattr(column, "run_one", fail)
        with pytest.raises(OSError, match="the disk is full"):
            list(column.run([FOLDER, "modelopt-nvfp4-wan-2-2"]))
        assert not [one for one in column._sessions.values() if one._child is not None]
        with pytest.raises(RuntimeError, match="the column has ended"):
            run_one(read.read().checkpoints[FOLDER])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", HfHubHTTPError.__bases__)
def test_a_repository_that_cannot_be_listed_costs_its_own_cell(
    kind: type[Exception], workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which file `:Q8_0` means is asked of the hub; it ended the column with a traceback."""

    def refuse(name: str) -> list[str]:
        raise kind(f"no route to {name}\nmore")

    monkeypatch.setattr("huggingface_hub.list_repo_files", refuse)
    install("sglang", SGLANG, tmp_path / "bin", monkeypatch)
    named = "gguf-flux-1-q8-0"
    with Column(
        read.read(),
        "sglang",
        "h200",
        tmp_path / "runs",
        tiny=False,
        limits=Fixed(),
        workers=workers,
    ) as column:
        found = {one.cell.checkpoint: one for one in column.run([named, FOLDER])}
        assert [one.problem for one in column.run([named])] == [found[named].problem]  # once more
    reference = read.read().checkpoints[named].reference
    repository = reference.partition(":")[0]
    assert (found[named].record, found[named].skipped) == (None, False)
    assert found[named].problem.startswith(
        f"{reference}: the files of {repository} are unknown ({kind.__name__}: no route to {repository}). "
    )
    assert found[FOLDER].record is not None


def test_how_many_models_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert packet.choose_workers(None, "cpu", tiny=True) == 2
    assert packet.choose_workers(None, "cpu", tiny=False) == 1
    assert packet.choose_workers(None, "nvidia", tiny=True) == 1
    assert packet.choose_workers(3, "nvidia", tiny=False) == 3
    assert packet.choose_workers(1, "cpu", tiny=True) == 1
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert packet.choose_workers(None, "cpu", tiny=True) == 1
    with pytest.raises(UsageError, match="--workers 0: at least 1"):
        packet.choose_workers(0, "cpu", tiny=True)


def test_a_runtime_that_is_not_here_or_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = read.read()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert columns.probe("sglang", tables).why == "there is no command sglang on the path"
    with pytest.raises(UnusableError, match="sglang: not installed: there is no command"):
        Column(tables, "sglang", "h200", tmp_path, tiny=False)
    monkeypatch.setattr("quantmatrix.peers.common.metadata.version", lambda name: "0.40.0")
    assert columns.probe("diffusers", tables).why.startswith(
        "diffusers 0.40.0 is older than 0.42.1"
    )
    for name in ("quantmatrix", "no-such"):
        with pytest.raises(UsageError, match=r"not in runtimes.csv; known: diffusers, sglang"):
            columns.probe(name, tables)


@pytest.mark.parametrize(
    ("text", "numbers"), [("0.42.1.dev0", (0, 42, 1)), ("1.10", (1, 10)), ("unknown", ())]
)
def test_versions_are_compared_by_their_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert read_version(text) == numbers


def test_a_quantization_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ["README.md", "m-Q8_0.gguf", "m-Q4_K_S.gguf", "High/h-Q8_0.gguf", "m-F16.gguf"]
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name: listed)
    assert columns.name_file("o/m:Q8_0") == "o/m/m-Q8_0.gguf"
    assert columns.name_file("o/m/High:Q8_0") == "o/m/High/h-Q8_0.gguf"
    for reference in ("o/m", "https://huggingface.co/o/m"):
        assert columns.name_file(reference) == reference
    with pytest.raises(UnusableError, match="expected one file of Q5_0, found none"):
        columns.name_file("o/m:Q5_0")


def seal(folder: Path) -> None:
    """Digests of the files as they are now: who forges a packet writes these, too."""
    sessions.pack(folder, folder.with_suffix(".tar.gz"))


def paint(folder: Path) -> None:
    """Another picture than the run gave."""
    [picture] = folder.glob("runs/0002-*/**/a_picture.png")
    Image.new("RGB", (16, 16), (200, 0, 0)).save(picture)


def make_pipe(folder: Path) -> None:
    """In the place of the first run's log: reading it would never end."""
    [run] = folder.glob("runs/0001-*")
    os.mkfifo(run / "log.txt")


def rewrite(folder: Path, old: str, new: str) -> None:
    [path] = folder.glob("runtimes/*/*/*.json")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (paint, "a_picture.png: has another digest than SHA256SUMS says"),
    "gone": (lambda f: next(f.glob("runs/0001-*/log.txt")).unlink(), "log.txt: missing"),
    "device": (
        lambda f: [next(f.glob("runs/0001-*/log.txt")).unlink(), make_pipe(f)],
        "log.txt: a link or a device, expected a file",
    ),
    "endless": (lambda f: os.truncate(f / "SHA256SUMS", 3 << 30), "it has 3221225472 bytes"),
    "more": (lambda f: (f / "x.txt").write_text("x"), "x.txt: not in SHA256SUMS"),
    "forged": (lambda f: [paint(f), seal(f)], "the record says works, its runs say wrong numbers"),
    "other": (
        lambda f: [rewrite(f, '"steps": 1', '"steps": 2'), seal(f)], "metrics.steps",
    ),
    "stale": (
        lambda f: [rewrite(f, '"adapter_digest": "sha256:', '"adapter_digest": "sha256:0'), seal(f)],
        "the adapter of sglang changed since",
    ),
    "out": (
        lambda f: [
            (f / "runs.json").write_text((f / "runs.json").read_text().replace("0002-", "../0002-")),
            seal(f),
        ],
        "its runs cannot be read: ValueError: .* leads out of the packet",
    ),
    "nameless": (lambda f: [(f / "runs.json").write_text("{}"), seal(f)], "runs.json is not about"),
}  # fmt: skip
"""What may have happened to a packet on its way, and what is said of it."""
COMMAND = ["run-column", "--runtime", "sglang", "--hardware", "auto", "--checkpoint", FOLDER]


def test_one_command_leaves_a_packet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install("sglang", SGLANG, tmp_path / "bin", monkeypatch)
    here = {"auto": "h200"}  # the row of this machine
    monkeypatch.setattr("quantmatrix.tables.identify.resolve", lambda name, rows: here[name])
    monkeypatch.setattr("quantmatrix.tables.identify.require", lambda row: None)
    monkeypatch.setattr("quantmatrix.peers.packet.read_memory", lambda: 1 << 34)
    folder, records = tmp_path / "packet", tmp_path / "records"
    argv = [*COMMAND, "--output-path", str(folder), "--record-dir", str(records), "--json"]
    assert main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["cells"][f"{FOLDER}@h200~sglang"]["verdict"] == "works"
    assert Path(said["packet"]).is_file()
    [record] = records.rglob("*.json")
    kept = folder / "runtimes" / "sglang" / "h200" / f"{FOLDER}.json"
    assert kept.read_bytes() == record.read_bytes()
    sums = (folder / "SHA256SUMS").read_text()
    assert f"runtimes/sglang/h200/{FOLDER}.json" in sums
    assert "log.txt" in sums
    assert "a_picture.png" in sums
    assert str(tmp_path) not in record.read_text()
    assert main([*argv[:-1]]) == EXIT_USAGE  # it exists
    assert main(["packet", "check", str(folder), "--json"]) == 0
    for name, (change, said) in CHANGES.items():
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        change(copy)
        [problem] = packet_check.check(copy, read.read())
        assert re.search(said, problem), (name, problem)
    assert main(["packet", "check", str(copy), "--json"]) == 1


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--runtime", "xdit", "--hardware", "cpu"], EXIT_USAGE, "xdit does not run there"),
        (["--runtime", "diffusers", "--hardware", "no"], EXIT_USAGE, "not in hardware.csv"),
        (
            ["--runtime", "diffusers", "--hardware", "cpu", "--checkpoint", "no"],
            EXIT_USAGE,
            "--checkpoint no: not in checkpoints.csv",
        ),
        (
            ["--runtime", "comfyui", "--hardware", "cpu"],
            ENVIRONMENT_UNUSABLE,
            "comfyui: not installed: http://127.0.0.1:1 (COMFYUI_URL) does not answer",
        ),
    ],
)
def test_what_cannot_be_run_says_why(
    argv: list[str],
    code: int,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COMFYUI_URL", "http://127.0.0.1:1")
    assert main(["run-column", *argv, "--output-path", str(tmp_path / "packet")]) == code
    assert text in capsys.readouterr().err
    assert not (tmp_path / "packet").exists()


@pytest.mark.parametrize(("skipped", "code"), [(True, 0), (False, 1)])
def test_what_was_left_out_is_no_failure_and_what_has_no_verdict_is(
    skipped: bool,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cell = SimpleNamespace(id="some@cpu~sglang")
    outcome = Outcome(cell, None, "no file", skipped)  # type: ignore[arg-type]
    monkeypatch.setattr(packet, "make", lambda *given: ([outcome], tmp_path / "a.tar.gz"))
    monkeypatch.setattr(packet, "find_hardware", lambda *given: "cpu")
    assert main(["run-column", "--runtime", "sglang", "--hardware", "cpu", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["ok"] is (code == 0)
    assert main(["run-column", "--runtime", "sglang", "--hardware", "cpu"]) == code
    assert capsys.readouterr().out.endswith("a.tar.gz: 0 records\n")
