"""A node's side: what it is, and the run of one group; imports neither Ray nor torch.

A group is run by pytest in a process of its own, which has the devices that Ray left visible. Where
that process dies, the cell that it died in has no verdict; its records of others are kept, and a new
process goes on behind it. So a check that fills the memory, or hangs where no signal reaches it, costs
its own row.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantmatrix import files
from quantmatrix.exit_codes import ENVIRONMENT_UNUSABLE, MEANINGS, NOT_EXECUTED
from quantmatrix.fleet import answers, bundle
from quantmatrix.fleet.answers import GroupAnswer, Note, Probe, Problem
from quantmatrix.harness.sessions import GRACE
from quantmatrix.quoting import quote

NEEDED = {"pytest": "pytest", "pytest_timeout": "pytest-timeout"}
"""Modules that a node needs beside the package, and what installs them."""
PREFIX = "quantmatrix-fleet-"
DAY = 86_400.0
"""Seconds after which a folder that a killed task left is removed."""
POLL = 0.2
"""Seconds between two looks at the process."""
TAIL = 100_000
"""Bytes of the end of what a process said, which are looked at; a hung one shows all of its stack."""
OOM_COUNTS = (Path("/proc/vmstat"), Path("/sys/fs/cgroup/memory.events"))
"""Where Linux counts the processes that it killed for want of memory."""

Tell = Callable[[bytes], None]


def probe(data: bytes, *, named: bool) -> bytes:
    """What this node is, as JSON of `Probe`; `data` is a bundle.

    `named` says that a custom resource names the hardware, so that nobody need look.
    """
    missing = [what for module, what in NEEDED.items() if importlib.util.find_spec(module) is None]
    answer = Probe(bundle.digest_source())
    if missing:
        answer.problem = f"without {' and '.join(missing)}: pip install 'quantmatrix[ray,test]'"
    elif not named:
        answer.hardware, answer.problem = identify(data)
    return answers.write(answer)


def identify(data: bytes) -> tuple[str, str]:
    """(row, problem) of this machine by the tables of a bundle: another process looks, with torch."""
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        bundle.unpack(data, Path(name))
        command = [sys.executable, "-m", "quantmatrix.tables.identify", "--tables"]
        done = subprocess.run(
            [*command, str(Path(name, bundle.TABLES))], capture_output=True, text=True, check=False
        )
    if done.returncode == 0:
        return done.stdout.strip(), ""
    return "", quote(done.stderr.strip().rpartition("\n")[2], 500)


def run_group(data: bytes, order: bytes, tell: Tell = lambda note: None) -> bytes:
    """Run the cells of an order (`groups.Group.order`), JSON of `GroupAnswer`; `tell` takes notes."""
    start, wanted = time.monotonic(), json.loads(order)
    home = Path(tempfile.gettempdir())
    files.remove_leftovers(home, f"{PREFIX}*", DAY)
    answer = GroupAnswer(socket.gethostname(), [], [], [], 0.0)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=home) as name:
        folder = Path(name)
        bundle.unpack(data, folder)
        run_cells(folder, wanted, answer, tell)
        evidence = sorted((folder / "evidence").glob("*/[!.]*.json"))
        answer.records = [path.read_text(encoding="utf-8") for path in evidence]
        found = sorted(folder.glob("junit-*.xml"))
        answer.junit = [path.read_text(encoding="utf-8") for path in found if path.stat().st_size]
    answer.seconds = round(time.monotonic() - start, 3)
    return answers.write(answer)


def run_cells(folder: Path, wanted: dict[str, Any], answer: GroupAnswer, tell: Tell) -> None:
    """Run processes until every cell was begun once, and note what went wrong."""
    left, before = list(wanted["cells"]), 0
    while left:

        def say(done: int, before: int = before) -> None:
            note = Note(wanted["group"], answer.node, before + done)
            tell(answers.write(note))

        ended = run_process(folder, wanted, left, say)
        begun = [cell for cell in left if cell in ended.begun]
        answer.problems += explain_end(ended, left)
        if ended.finished or not begun:
            return
        left, before = [cell for cell in left if cell not in ended.begun], before + len(begun)


@dataclass
class Ended:
    """How a process ended."""

    code: int
    finished: bool
    """Whether it came to its end by itself."""
    begun: set[str]
    open: str
    """The cell that it was in; empty between two."""
    output: str
    """The end of what it said."""
    out_of_memory: bool
    gib: float
    """The most memory that it was seen to have."""
    too_long: bool


def explain_end(ended: Ended, cells: Sequence[str]) -> list[Problem]:
    """Problems of a process that ran some cells; none where its records say it all."""
    if ended.finished and ended.code < NOT_EXECUTED and (ended.code in (0, 1) or ended.code > 5):
        return []
    last = ended.output.strip().rpartition("\n")[2]
    if ended.finished:
        code = ended.code if ended.code in MEANINGS else ENVIRONMENT_UNUSABLE
        if code == NOT_EXECUTED:
            return []  # some check has no verdict: the missing records say which
        return [Problem(code, list(cells), f"pytest ended with {ended.code}: {quote(last, 500)}")]
    if ended.open or not ended.begun:
        lost = [ended.open] if ended.open else list(cells)
        return [Problem(NOT_EXECUTED, lost, explain_death(ended))]
    return []


def explain_death(ended: Ended) -> str:
    """Why a process did not come to its end, as text."""
    held = f" (it had {ended.gib:.1f} GiB)"
    if ended.out_of_memory:
        return f"out of memory: the system killed the process{held}"
    if ended.too_long:
        return "stopped: the process was not done at the end of its time"
    if ended.code == -signal.SIGKILL:
        return f"killed by signal 9, as for want of memory{held}, or by somebody"
    if ended.code < 0:
        return f"killed by signal {-ended.code} ({signal.strsignal(-ended.code)}){held}"
    if "Timeout (" in ended.output:
        return "stopped: hung where no signal reaches it, past the time limit of a check"
    return f"the process ended with {ended.code}: {quote(ended.output.strip()[-300:], 400)}"


def command_of(folder: Path, wanted: dict[str, Any], number: int, leash: int) -> list[str]:
    """The pytest command of the n-th process of a group."""
    limit = int(wanted["limit"])
    checks = [flag for check in wanted["checks"] for flag in ("--check", check)]
    return [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
        *("-p", "quantmatrix.fleet.child", f"--fleet-leash={leash}"),
        f"--fleet-steps={folder / f'steps-{number}'}",
        *("--hardware", wanted["hardware"], "--rows", str(folder / "cells"), *checks),
        f"--evidence-dir={folder / 'evidence'}",
        f"--junit-xml={folder / f'junit-{number:04}.xml'}",
        f"--timeout={limit}",
        *("-o", f"faulthandler_timeout={limit + GRACE}", "-o", "faulthandler_exit_on_timeout=true"),
        *(["--full-size"] if wanted["full_size"] else []),
        *json.loads((folder / bundle.LIST).read_text(encoding="utf-8")),
    ]


def run_process(
    folder: Path, wanted: dict[str, Any], cells: Sequence[str], say: Callable[[int], None]
) -> Ended:
    """One run of pytest over some cells; `say` takes the number of cells that are done."""
    (folder / "cells").write_text("\n".join(cells), encoding="utf-8")
    number = len(list(folder.glob("steps-*")))
    steps = folder / f"steps-{number}"
    steps.touch()
    killed, most = count_oom_kills(), 0.0
    reading, writing = os.pipe()
    try:
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(
                command_of(folder, wanted, number, reading),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[reading],
                start_new_session=True,
            )
        try:
            too_long, most = watch(process, steps, float(wanted["most_seconds"]), say)
        finally:
            stop(process)
    finally:
        os.close(reading)
        os.close(writing)
    begun, opened, finished = read_steps(steps)
    said = (folder / "output").read_bytes()[-TAIL:].decode("utf-8", "replace")
    code = process.returncode
    memory = code == -signal.SIGKILL and not too_long and count_oom_kills() > killed
    return Ended(code, finished, begun, opened, said, memory, most / 2**30, too_long)


def watch(
    process: subprocess.Popen[bytes], steps: Path, most: float, say: Callable[[int], None]
) -> tuple[bool, float]:
    """Wait for a process; (whether it took more than `most` seconds, the most bytes it was seen to have)."""
    end, size, held = time.monotonic() + most, -1, 0.0
    say(0)
    while process.poll() is None:
        time.sleep(POLL)
        held = max(held, read_memory(process.pid))
        if steps.stat().st_size != size:
            size = steps.stat().st_size
            begun, _, finished = read_steps(steps)
            say(len(begun) if finished else max(len(begun) - 1, 0))  # the last may have more checks
        if time.monotonic() > end:
            return True, held
    return False, held


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it started, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_steps(path: Path) -> tuple[set[str], str, bool]:
    """(cells that were begun, the one that is not done, whether the end was reached)."""
    begun: set[str] = set()
    opened, finished = "", False
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:  # the last may be half written
        what, _, cell = line.partition(" ")
        if what == "start" and cell:
            begun.add(cell)
        opened = {"start": cell, "end": ""}.get(what, opened)
        finished = finished or what == "finish"
    return begun, opened, finished


def read_memory(pid: int) -> float:
    """Bytes of memory that a process has at most had; 0 where nobody can tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return float(found[0]) * 1024 if found else 0.0


def count_oom_kills() -> int:
    """How many processes the system has killed for want of memory; 0 where it does not count."""
    count = 0
    for path in OOM_COUNTS:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError:
            continue
        count += sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return count
