"""Command: a row's command, through the command line, run once for all checks that look at what it left.

The command plans for itself. In one process it must come to the plan of the cell's other checks, and then
runs with the pipeline that they have loaded. It is asked to save its latents, too, and is one of the two
runs whose bits must be equal: nothing is generated for that alone.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from quantmatrix.measure.workbench import Workbench
    from quantmatrix.runtime.run import Run
    from quantmatrix.suites.conftest import Job

LATENTS = "latents.safetensors"
"""Where in its folder a command leaves the latents of every step."""


@dataclass(frozen=True)
class Shown:
    """What a run showed, whether it was made here or by the command."""

    latents: list[torch.Tensor]
    frames: torch.Tensor
    """uint8 [frames, height, width, 3]."""
    census: Mapping[str, Mapping[str, int]]
    calls: Mapping[str, int]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Commanded:
    """How a command ended, and what it left."""

    folder: Path
    code: int
    out: str = field(repr=False)
    err: str = field(repr=False)
    seconds: float
    planned: bool
    """Whether it came to the cell's plan; of a command that starts processes nobody here knows."""

    def tell(self) -> dict[str, Any]:
        """What it said of its only run."""
        [run] = json.loads(self.out)["runs"]
        return dict(run)

    def show(self) -> Shown | None:
        """Its run; None where it gave none, or one of another plan."""
        from quantmatrix.measure import saved_runs

        if self.code or not self.planned:
            return None
        saved, reported = saved_runs.read(self.folder / LATENTS), self.tell()
        assert saved.frames is not None, "the command saved latents without frames"
        seconds = {stage: s for stage, s in reported["seconds"].items() if stage != "load"}
        return Shown(
            saved.latents,
            saved.frames,
            reported["backends"],
            reported["transformer_calls"],
            seconds,
        )


def show(run: Run) -> Shown:
    """The same of a run that was made here."""
    from quantmatrix.runtime.media import stack_frames

    return Shown(run.latents, stack_frames(run.media), run.census, run.calls, run.seconds)


def run_command(
    job: Job, workbench: Workbench, folder: Path, capfd: pytest.CaptureFixture[str]
) -> Commanded:
    """Run the command of a cell; its files go to the folder."""
    from quantmatrix.cli import main

    argv = [*workbench.argv(job.cell)[1:], "--device", job.request.device or "cpu"]
    argv += ["--output-path", str(folder), "--save-latents", str(folder / LATENTS), "--json"]
    capfd.readouterr()
    with (
        pytest.MonkeyPatch.context() as environment,
        workbench.lend(job.request, job.plan) as lent,
    ):
        for name, value in job.cell.environment.items():
            environment.setenv(name, value)
        start = time.perf_counter()
        code = main.main(argv)
        seconds = time.perf_counter() - start
    planned = lent == [True] * (job.plan.processes == 1)
    return Commanded(folder, code, *capfd.readouterr(), seconds, planned)
