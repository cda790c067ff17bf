"""Session: a child process that answers tasks, watched from outside.

Its limits are seconds a task, memory of all its processes together, and size of what it writes to its log.
What exceeds one is killed with everything that it started, and costs the cell at hand alone: the next task
starts a new child. Tasks share a child, so that a large library is imported once.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.peers.protocol import KILLED, LOADED, LOG, Answer, Task

if TYPE_CHECKING:
    from collections.abc import Mapping

POLL = 0.1
"""Seconds between two looks at a child."""
PAGE = os.sysconf("SC_PAGE_SIZE")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@dataclass(frozen=True)
class Bounds:
    """What one task may take."""

    seconds: float = 600.0
    memory_bytes: int = 16 << 30
    log_bytes: int = 64 << 20


class Session:
    """One runtime's child, started when it is needed; a context manager that ends it."""

    def __init__(
        self,
        runtime: str,
        bounds: Bounds | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Nothing is started yet; `environment` is added to that of this process."""
        self.runtime = runtime
        self.bounds = bounds or Bounds()
        self.environment = dict(environment or {})
        self.started = 0
        """Children so far."""
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def ask(self, task: Task, folder: Path) -> Answer:
        """The answer to a task, whose files go to a new folder; never raises for what the child does."""
        folder.mkdir(parents=True)
        child = self._start(folder)
        assert child.stdin is not None
        asked = {
            "task": replace(task, seconds=self.bounds.seconds).to_json(),
            "folder": str(folder),
        }
        start = time.monotonic()
        with suppress(BrokenPipeError):
            child.stdin.write(json.dumps(asked).encode() + b"\n")
            child.stdin.flush()
        found = self._wait(child, folder, start)
        if isinstance(found, Answer):
            return found
        seconds = round(time.monotonic() - start, 3)
        self.stop()
        loaded = (folder / LOADED).exists()
        return Answer(KILLED, kind=found, loaded=loaded, seconds={"until killed": seconds})

    def stop(self) -> None:
        """End the child and everything that it started."""
        child, self._child = self._child, None
        if child is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()

    def _start(self, folder: Path) -> subprocess.Popen[bytes]:
        """The child at hand, or a new one; what it prints before its first task is in that one's log."""
        if self._child is not None and self._child.poll() is None:
            return self._child
        self.stop()
        self.started += 1
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        with (folder / LOG).open("ab") as log:
            self._child = subprocess.Popen(
                ["env", *settings, sys.executable, "-m", "quantmatrix.peers.worker", self.runtime],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
        return self._child

    def _wait(self, child: subprocess.Popen[bytes], folder: Path, start: float) -> Answer | str:
        """The answer, or what ended the child."""
        assert child.stdout is not None
        text = b""
        while not text.endswith(b"\n"):
            ready, _, _ = select.select([child.stdout], [], [], POLL)
            if ready:
                part = os.read(child.stdout.fileno(), 1 << 16)
                if not part:
                    return describe_end(child.wait())
                text += part
                continue
            if exceeded := self._find_exceeded(child.pid, folder, time.monotonic() - start):
                return exceeded
        return Answer(**json.loads(text))

    def _find_exceeded(self, pid: int, folder: Path, seconds: float) -> str:
        """The limit that a child exceeds, as text, or nothing."""
        if seconds > self.bounds.seconds:
            return f"the time limit of {self.bounds.seconds:g} s"
        if count_memory(pid) > self.bounds.memory_bytes:
            return f"the memory limit of {self.bounds.memory_bytes / 2**30:.4g} GiB"
        log = folder / LOG
        if log.exists() and log.stat().st_size > self.bounds.log_bytes:
            return f"the limit of {self.bounds.log_bytes >> 20} MiB of output"
        return ""


def describe_end(code: int) -> str:
    """How a child ended that gave no answer."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"


def count_memory(session: int) -> int:
    """Resident bytes of all processes of a session together; 0 where there is no /proc to ask."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if fields[3] == str(session):  # fields after the name: state, ppid, pgrp, session ...
            total += int(fields[21]) * PAGE
    return total
