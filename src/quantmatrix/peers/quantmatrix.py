"""Quantmatrix: our own `decode` of a file, which another program's run is compared with where that cannot
run the base model in BF16. Like the others it runs in a child, with limits; its own cells are the matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantmatrix import __version__
from quantmatrix.peers import common
from quantmatrix.peers.protocol import DONE, Answer, Found, Task
from quantmatrix.request import Request

if TYPE_CHECKING:
    from pathlib import Path

ID = "quantmatrix"
BACKEND = "decode"


def probe() -> Found:
    """Our own version."""
    return Found(version=__version__)


def ways(task: Task) -> tuple[str, ...]:
    """The one backend that every family has and that leaves activations alone."""
    return (BACKEND,)


def list_argv(task: Task) -> list[str]:
    """What follows `quantmatrix generate`, but for the backend."""
    row = task.checkpoint
    if row.selector == "--model-path":
        return [*task.argv, row.selector, task.weights]
    return [*task.argv, row.selector, task.weights or row.reference]


def run(task: Task, folder: Path) -> Answer:
    """Generate, keep the latents of every step and the first picture; raises what our commands raise."""
    from quantmatrix import api

    argv = list_argv(task)
    request = Request.from_words(argv, tiny=task.tiny, device=task.device, backend=BACKEND)
    found = api.generate(request)
    common.mark_loaded(folder)
    found.media[0].save(folder / "media.png")
    return Answer(
        DONE,
        loaded=True,
        media="media.png",
        latents=common.save_latents(found.latents, folder),
        seconds=found.seconds,
        peak_bytes=found.peak_bytes,
    )


def command(task: Task) -> str:
    """Our command."""
    import shlex

    argv = [*list_argv(task), "--backend", BACKEND, *(["--tiny"] if task.tiny else [])]
    return shlex.join(["quantmatrix", "generate", *argv])


def explain(answer: Answer) -> str:
    """Our own words for a failure."""
    return common.pick_message(answer)
