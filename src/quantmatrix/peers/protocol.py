"""Protocol: what an adapter offers, what it is asked to do, and what it answers.

An adapter is a module with these names:

| name                 | meaning |
| -------------------- | ------- |
| `ID`                 | the id of its row in runtimes.csv |
| `probe()`            | the version that is here, or why there is none; cheap, it imports nothing heavy |
| `ways(task)`         | the documented ways of loading this file, the most usual first |
| `command(task)`      | what a person types to do the same |
| `run(task, folder)`  | generate by one of them; files go to the folder; raise what the runtime raises |
| `explain(answer)`    | the runtime's own words for a failure, one line |

`run` is called in a child process (`quantmatrix.peers.worker`), which turns an exception into an answer;
before it has loaded the weights a failure is the runtime's refusal, if it was meant as one
(`quantmatrix.peers.failures`), else and afterwards a crash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from quantmatrix.tables.rows import CheckpointRow

if TYPE_CHECKING:
    from pathlib import Path

    from quantmatrix.request import Request

LATENTS = "latents.safetensors"
"""File of the latents, `step.000` ..., one tensor per denoising step, where a runtime gives them."""
LOG = "log.txt"
"""File of everything that a run printed."""
LOADED = "loaded"
"""File that appears once the weights are loaded."""


@dataclass(frozen=True)
class Found:
    """What a probe found: a version, or why there is none."""

    version: str = ""
    why: str = ""


@dataclass(frozen=True)
class Task:
    """One generation that a runtime is asked for."""

    checkpoint: CheckpointRow
    base: str
    """Folder or hub id of the base model in full precision."""
    weights: str
    """Folder, file or hub id of the checkpoint; empty for `--quantization` and for the base alone."""
    flags: tuple[str, ...] = ()
    """Of the row that claims something of the checkpoint, as `quantmatrix generate` takes them."""
    baseline: bool = False
    """The base model alone, in BF16."""
    way: str = ""
    """One of the adapter's `ways`."""
    device: str = "cpu"
    tiny: bool = False
    """The base model is a stand-in: pictures are small."""
    seconds: float = 600.0
    """What it may take."""

    @property
    def online(self) -> str:
        """What weights are quantized to while loading (`fp8` ...); empty for a file, and for the base alone."""
        row = self.checkpoint
        return row.reference if row.form == "online" and not self.baseline else ""

    @property
    def request(self) -> Request:
        """Prompt, size, steps and seed, as our own command reads them."""
        from quantmatrix.request import Request

        return Request.from_words(self.argv, tiny=self.tiny)

    @property
    def argv(self) -> list[str]:
        """The base model, the row's flags and the prompt, as they follow `quantmatrix generate`."""
        from quantmatrix.tables.rows import ASSIGNMENT, PROMPT

        flags = [flag for flag in self.flags if not ASSIGNMENT.fullmatch(flag)]
        prompt = [] if "--prompt" in flags else ["--prompt", PROMPT]
        return ["--model-path", self.base, *flags, *prompt]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Task:
        """The task of plain data."""
        columns: dict[str, Any] = data["checkpoint"]
        row: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in columns.items()
        }
        rest = {**data, "checkpoint": CheckpointRow(**row), "flags": tuple(data["flags"])}
        return cls(**rest)


DONE, FAILED, KILLED = "done", "failed", "killed"
"""Endings: media were made; an exception, or an exit code that is not 0; stopped by a limit or a signal."""


@dataclass(frozen=True)
class Answer:
    """What came of a task."""

    ending: str
    kind: str = ""
    """Class of the exception, or what killed it."""
    error: str = ""
    """Its own words."""
    loaded: bool = False
    """Whether the failure came after the weights were loaded."""
    meant: bool = True
    """Whether the runtime's own code raised the error on purpose."""
    media: str = ""
    """Name of the first picture in the folder, where there is one."""
    latents: bool = False
    """Whether the folder has `LATENTS`."""
    weights: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the transformer in memory, by dtype; empty where a runtime does not tell."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int = 0


class RuntimeFailure(Exception):
    """A program that ended badly; the text is what it printed."""

    def __init__(self, text: str, *, kind: str = "exit", loaded: bool = False) -> None:
        super().__init__(text)
        self.kind = kind
        self.loaded = loaded


class Missing(Exception):
    """A part of a runtime that this file needs, and that is not installed."""


class Adapter(Protocol):
    """The names of the modules in `quantmatrix.peers`."""

    ID: str

    def probe(self) -> Found:
        """The version that is here, or why there is none."""

    def ways(self, task: Task) -> tuple[str, ...]:
        """The documented ways of loading the file of a task, the most usual first; for the base never none."""

    def command(self, task: Task) -> str:
        """What a person types to do the same: a command, or a statement of Python."""

    def run(self, task: Task, folder: Path) -> Answer:
        """Generate; LATENTS and media go to the folder. Raises whatever the runtime raises."""

    def explain(self, answer: Answer) -> str:
        """The runtime's own words for a failure, one line."""
