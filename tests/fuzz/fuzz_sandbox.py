"""Sandbox: one command in a process of its own, under limits, watched, and its ending judged.

The process is forked from one that has imported everything, so that a case costs a few hundredths
of a second. It may take 5 seconds of the processor and grow by 500 MB. An audit hook sees every
file that is opened, made, renamed or removed: nothing outside the case's folder and the packages is
opened, nothing but `out` is written, no program is started and no address is called. What opens
files without Python (the mapped weights of safetensors) reports to the hook first.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_mutations import MARK, SECRET

SECONDS = 5
"""Of the processor, for one command."""
PATIENCE = 60
"""Seconds by the clock, after which a process that does nothing is ended."""
GROWTH = 500 * 2**20
"""Bytes that a command may take more than it had."""
LONGEST = 2000
"""Bytes of a message, and characters of a value in it."""
VALUE = 200
WORDS = (0, 1, 2, 3, 10, 11, 12, 13)
"""Exit codes of an ending as text; the last four are those of `evidence check` and `summary`."""
KEPT = "merged"
"""What a command that ends with 1 may leave: evidence merged without what was damaged."""
SYSTEM = ("/proc", "/sys", "/dev/null", "/dev/urandom", "/etc/localtime", "/usr/share/zoneinfo")
READS = ("open", "os.listdir", "os.scandir")
WRITES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate")
RELATIVE = ("os.remove", "os.rmdir")
"""Events whose last argument is the folder that a path is relative to, where one is open."""
NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "os.fork")


@dataclass(frozen=True)
class Ending:
    """How a command ended."""

    code: int | None
    """None: it was killed."""
    out: str
    errors: str
    seconds: float
    growth: int
    """Bytes."""
    seen: tuple[str, ...]
    """What the hook saw and nobody may do."""
    left: tuple[str, ...] = ()
    """What was left behind by a command that failed."""


def list_allowed() -> list[str]:
    """Folders of Python, of the packages and of the tables, which may be read."""
    from quantmatrix.tables import read

    found = [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *sys.path[1:]]
    here = Path(__file__).resolve()
    found += [str(read.tables_folder()), str(here.parents[2] / "src"), str(here.parent)]
    found += [str(here.parents[2] / "reports"), *SYSTEM]
    return sorted({os.path.realpath(path) for path in found if path})


class Watch:
    """The audit hook of a child: notes what it may not do."""

    def __init__(self, folder: Path, allowed: list[str]) -> None:
        """`folder` may be read, its `out` written; `allowed` may be read."""
        self.seen: list[str] = []
        self._read = [os.path.realpath(folder), *allowed]
        self._write = [os.path.realpath(folder / "out"), "/dev/null"]

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Look at one event."""
        if event in READS:
            path, mode, flags = (*arguments, None, 0)[:3]
            writes = event == "open" and (
                bool(set(str(mode or "")) & set("wax+"))
                or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            )
            self._look(event, path, self._write if writes else self._read, writes)
        elif event in WRITES:
            base = arguments[-1] if isinstance(arguments[-1], int) and event in RELATIVE else -1
            for path in arguments[:2] if event == "os.rename" else arguments[:1]:
                self._look(
                    event, path if base < 0 else f"/proc/self/fd/{base}/{path}", self._write, True
                )
        elif event in NEVER:
            self.seen.append(f"{event} {arguments!r:.200}")

    def _look(self, event: str, path: Any, allowed: list[str], writes: bool) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # an open file
        text = os.fsdecode(path)
        try:
            real = os.path.realpath(text)
        except (OSError, ValueError):
            return
        inside = any(real == place or real.startswith(f"{place}/") for place in allowed)
        if not inside:
            self.seen.append(f"{event} {'for writing ' if writes else ''}{text!r:.200}")


def read_peak() -> int:
    """Largest resident memory of this process since it was reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def run(act: Callable[[], int], folder: Path, allowed: list[str]) -> Ending:
    """Run `act` in a child whose working folder is `folder`, and wait for its end."""
    (folder / "out").mkdir(exist_ok=True)
    began = time.monotonic()
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        child = os.fork()
        if child == 0:
            _be_child(act, folder, allowed, [file.fileno() for file in files])
        status = _wait(child, began)
        for file in files:
            file.seek(0)
        texts = [file.read().decode("utf-8", "replace") for file in files]
    said = json.loads(texts[2] or "{}")
    code = os.waitstatus_to_exitcode(status)
    made = {path.name for path in (folder / "out").iterdir()} - {KEPT}
    return Ending(
        code if code >= 0 and said else None,
        *texts[:2],
        said.get("seconds", time.monotonic() - began),
        said.get("growth", 0),
        tuple(said.get("seen", ())),
        () if code == 0 else tuple(sorted(made)),
    )


def _wait(child: int, began: float) -> int:
    """The status of a child that ended, or was ended."""
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        if time.monotonic() - began > PATIENCE:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def _be_child(act: Callable[[], int], folder: Path, allowed: list[str], files: list[int]) -> None:
    """Everything that the forked process does; it never returns."""
    code = 99
    seen: list[str] = []
    growth, began = 0, time.process_time()
    try:
        os.chdir(folder)
        os.dup2(files[0], 1)
        os.dup2(files[1], 2)
        sys.stdout, sys.stderr = (
            os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
            for number in (1, 2)
        )
        Path("/proc/self/clear_refs").write_text("5")
        before = read_peak()
        used = int(time.process_time()) + 1  # forked processes start at nought; to be sure
        resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, used + SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        watch = Watch(folder, allowed)
        sys.addaudithook(watch)
        try:
            code = act()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        seen = list(watch.seen)
        growth = read_peak() - before
    finally:
        said = {"seen": seen, "growth": growth, "seconds": time.process_time() - began}
        os.write(files[2], json.dumps(said).encode())
        os._exit(code)


def freeze() -> None:
    """Let children share what the parent has, instead of copying it when they collect garbage."""
    gc.collect()
    gc.freeze()


def judge(ending: Ending, *, as_json: bool = False, as_lines: bool = False) -> list[str]:
    """What is bad about an ending; empty for a good one.

    `as_json`: JSON was asked for. `as_lines`: the message is a list of what is wrong, one a line.
    """
    problems = [f"does what it may not: {what}" for what in ending.seen]
    if ending.code is None:
        return [*problems, f"hangs, or was killed ({ending.seconds:.1f} s)"]
    if ending.seconds > SECONDS:
        problems.append(f"takes {ending.seconds:.1f} s")
    if ending.growth > GROWTH:
        problems.append(f"grows by {ending.growth / 2**20:.0f} MiB")
    if "Traceback (most recent call last)" in ending.errors:
        return [*problems, "ends in a traceback"]
    if ending.code not in WORDS:
        problems.append(f"exit code {ending.code}")
    if ending.left:
        problems.append(f"left behind: {', '.join(ending.left)}")
    if ending.code and not (ending.errors + ending.out).strip():
        problems.append("fails silently")
    return problems + judge_text(ending, as_json=as_json, as_lines=as_lines)


def judge_text(ending: Ending, *, as_json: bool, as_lines: bool) -> list[str]:
    """What is bad about the words of an ending."""
    problems = []
    shown = ending.errors if as_json else ending.out + ending.errors
    if as_json:
        try:
            json.loads(ending.out, parse_constant=_refuse)
        except ValueError as error:
            problems.append(f"no JSON on standard output: {error}")
    for line in shown.split("\n"):
        if not line.isprintable():
            problems.append(f"control characters: {line[:200]!r}")
        if re.match(r"\s*\\?::", line) or "##[" in line:  # `\::`: a value was not quoted
            problems.append(f"a command to a CI: {line[:200]!r}")
    message = ending.errors.partition("quantmatrix: ")[2]
    lines = message.split("\n") if as_lines else [message]
    if ending.code and (longest := max(len(line.encode()) for line in lines)) > LONGEST + 2:
        problems.append(f"a message of {longest} bytes")
    if run := re.search(rf"{MARK}{{{VALUE + 1},}}", shown):
        problems.append(f"a value of {len(run[0])} characters")
    if SECRET in ending.out + ending.errors:
        problems.append("shows what is in another folder")
    return problems


def _refuse(name: str) -> float:
    raise ValueError(f"{name} in it")


def clear(folder: Path) -> None:
    """Remove a case."""
    shutil.rmtree(folder, ignore_errors=True)
