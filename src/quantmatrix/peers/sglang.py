"""SGLang-Diffusion, by its command line: the guide's commands as they are, `sglang generate ...`.

Our flags are the same, so that a row's command needs another first word, a seed, and where its output goes:
`--output-path` (pictures), `--perf-dump-path` (JSON: `total_duration_ms`, `steps` with `name` and
`duration_ms`, `memory_checkpoints`). The command line writes no latents to a file (those of
`--return-trajectory-latents` stay in its process), so that pictures are compared.

Known from the quantization guide, and docs.sglang.io (CLI reference).
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.peers import common
from quantmatrix.peers.protocol import DONE, Answer, Found, RuntimeFailure, Task
from quantmatrix.tables.rows import ASSIGNMENT, PROMPT

if TYPE_CHECKING:
    from collections.abc import Iterator

ID = "sglang"
PACKAGE = "sglang"
DUMP, PICTURES = "perf.json", "pictures"
OFFLINE_FLAGS = ("--save-output",)
"""Flags of rows that are given here anyway."""


def probe() -> Found:
    """The version of the package whose command is on the path."""
    return common.find_command("sglang", PACKAGE)


def ways(task: Task) -> tuple[str, ...]:
    """The command that the row stands for; there is no other."""
    return ("sglang generate",)


def command(task: Task) -> str:
    """The command line, environment included."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in read_environment(task).items()]
    return " ".join([*settings, shlex.join(list_arguments(task))])


def read_environment(task: Task) -> dict[str, str]:
    """Environment variables that a row writes before its flags."""
    pairs = (flag.partition("=") for flag in task.flags if ASSIGNMENT.fullmatch(flag))
    return {name: value for name, _, value in pairs}


def list_arguments(task: Task) -> list[str]:
    """The command of a task; the base model alone has none of the flags that are about the file."""
    row = task.checkpoint
    argv = ["sglang", "generate"]
    if row.selector == "--model-path" and not task.baseline:
        argv += ["--model-path", task.weights]
    else:
        argv += ["--model-path", task.base]
    if not task.baseline and row.selector != "--model-path":
        argv += [row.selector, task.weights or row.reference]
    argv += [*list_flags(task), "--seed", "0", "--output-path", PICTURES]
    return [*argv, "--save-output", "--perf-dump-path", DUMP]


ABOUT_FILES = ("--enable-svdquant", "--quantization-precision", "--quantization-rank")
"""Flags of rows that say what is in a quantized file."""


def list_flags(task: Task) -> Iterator[str]:
    """Prompt, size and the row's other flags; a stand-in has the size that fits it."""
    flags = [f for f in task.flags if not ASSIGNMENT.fullmatch(f) and f not in OFFLINE_FLAGS]
    if "--prompt" not in flags:
        flags += ["--prompt", PROMPT]
    skipping = False
    for flag in flags:
        if flag.startswith("--"):
            skipping = task.baseline and flag in ABOUT_FILES
        if not skipping:
            yield flag
    if task.tiny:
        from quantmatrix import models

        size = models.load(task.checkpoint.model).TINY_DEFAULTS
        yield from ("--height", str(size.height), "--width", str(size.width))
        if "--num-inference-steps" not in flags:
            yield from ("--num-inference-steps", str(size.steps))
        if size.frames > 1:
            yield from ("--num-frames", str(size.frames))


def run(task: Task, folder: Path) -> Answer:
    """Run the command; RuntimeFailure where it fails, or leaves no picture."""
    done = common.call(list_arguments(task), folder, read_environment(task))
    common.mark_loaded(folder)
    media = common.find_media(folder / PICTURES)
    if not media:
        raise RuntimeFailure(f"{done.stdout}\nno picture below --output-path", kind="no output")
    dump = read_dump(folder / DUMP)
    return Answer(
        DONE,
        loaded=True,
        media=f"{PICTURES}/{media}",
        weights=dump.get("weights", {}),
        seconds={"total": round(dump.get("total_duration_ms", 0.0) / 1000, 3)},
        peak_bytes=find_peak(dump) or common.read_peak(),
    )


def read_dump(path: Path) -> dict[str, Any]:
    """The performance dump, or nothing where there is none or it is no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def find_peak(value: Any) -> int:
    """The largest number of MB under a key that names a peak, in bytes; 0 where there is none."""
    if not isinstance(value, dict):
        return 0
    here = [
        int(item * 2**20)
        for name, item in value.items()
        if "peak" in name and name.endswith("mb") and isinstance(item, (int, float))
    ]
    return max([*here, *map(find_peak, value.values())], default=0)


def explain(answer: Answer) -> str:
    """The last line of its output that names an exception, else the last."""
    return common.pick_message(answer)
