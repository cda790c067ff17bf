"""Worker: the child process in which an adapter runs: a task a line on standard input, an answer a line back.

`python -m quantmatrix.peers.worker RUNTIME`. Answers go to the standard output that it was started with;
whatever the runtime prints, native code included, goes to the log in the task's folder.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import asdict
from pathlib import Path

from quantmatrix import peers
from quantmatrix.peers.common import read_peak, release
from quantmatrix.peers.failures import is_meant, reads_meant
from quantmatrix.peers.protocol import (
    FAILED,
    LOADED,
    LOG,
    Adapter,
    Answer,
    Missing,
    RuntimeFailure,
    Task,
)

LONGEST = 20_000
"""Characters of a failure that an answer carries; the log has all of it."""


def answer(adapter: Adapter, task: Task, folder: Path) -> Answer:
    """The answer of an adapter; what it raises is one, too."""
    import traceback

    try:
        return adapter.run(task, folder)
    except (KeyboardInterrupt, SystemExit):
        raise
    except RuntimeFailure as error:
        kind, loaded = error.kind, error.loaded
        text = str(error)
        meant = reads_meant(text)
    except BaseException as error:  # a panic of native code is no Exception
        traceback.print_exc()
        kind, loaded = type(error).__name__, (folder / LOADED).exists()
        missing = isinstance(error, (ImportError, Missing))
        kind = f"missing {kind}" if missing else kind
        text = str(error).strip()
        meant = is_meant(error)
    return Answer(
        FAILED,
        kind=kind,
        error=text[-LONGEST:],
        loaded=loaded,
        meant=meant,
        peak_bytes=read_peak(),
    )


def redirect(folder: Path) -> None:
    """Everything that is printed from now on goes to the folder's log."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def main(argv: list[str]) -> int:
    """Answer tasks until standard input ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    adapter = peers.load(argv[0])
    for line in sys.stdin:
        asked = json.loads(line)
        folder = Path(asked["folder"])
        redirect(folder)
        found = answer(adapter, Task.from_json(asked["task"]), folder)
        sys.stdout.flush()
        sys.stderr.flush()
        print(json.dumps(asdict(found)), file=answers, flush=True)
        release()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
