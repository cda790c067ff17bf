"""xDiT, by its unified runner: `xdit --model ... --output_directory ...`.

It takes a pipeline, and quantizes matrix multiplications while it runs (`--use_fp8_gemms`); no flag names
a quantized transformer beside its base model, so that such files have no way.

Known from the page of its unified runner.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from quantmatrix.peers import common
from quantmatrix.peers.protocol import DONE, Answer, Found, RuntimeFailure, Task

if TYPE_CHECKING:
    from pathlib import Path

ID = "xdit"
PICTURES = "pictures"


def probe() -> Found:
    """The version of xfuser, whose command is `xdit`."""
    return common.find_command("xdit", "xfuser")


def ways(task: Task) -> tuple[str, ...]:
    """A pipeline, or quantizing while running; nothing else."""
    row = task.checkpoint
    if task.baseline or row.form == "pipeline":
        return ("--model",)
    return ("--use_fp8_gemms",) if task.online == "fp8" else ()


def command(task: Task) -> str:
    """The command line."""
    return shlex.join(list_arguments(task))


def list_arguments(task: Task) -> list[str]:
    """The command of a task."""
    pipeline = task.checkpoint.form == "pipeline" and not task.baseline
    argv = ["xdit", "--model", task.weights if pipeline else task.base]
    argv += ["--prompt", task.request.prompt[0], "--seed", "0", "--output_directory", PICTURES]
    if task.tiny:
        from quantmatrix import models

        size = models.load(task.checkpoint.model).TINY_DEFAULTS
        argv += ["--height", str(size.height), "--width", str(size.width)]
        argv += ["--num_inference_steps", str(size.steps)]
    return [*argv, *(["--use_fp8_gemms"] if task.way == "--use_fp8_gemms" else [])]


def run(task: Task, folder: Path) -> Answer:
    """Run the command; RuntimeFailure where it fails, or leaves no picture."""
    (folder / PICTURES).mkdir()
    done = common.call(list_arguments(task), folder)
    common.mark_loaded(folder)
    media = common.find_media(folder / PICTURES)
    if not media:
        raise RuntimeFailure(f"{done.stdout}\nno picture in --output_directory", kind="no output")
    return Answer(DONE, loaded=True, media=f"{PICTURES}/{media}", peak_bytes=common.read_peak())


def explain(answer: Answer) -> str:
    """The last line of its output that names an exception, else the last."""
    return common.pick_message(answer)
