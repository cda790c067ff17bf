"""Generate: the row's command, through the command line, leaves a file that shows something.

The command plans for itself. In one process it must come to the plan of the cell's other checks, and then
runs with the pipeline that they have loaded.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from quantmatrix.harness.recorder import Proof
    from quantmatrix.measure.workbench import Workbench
    from quantmatrix.suites.conftest import Job
    from quantmatrix.tables.rows import Cell


@pytest.mark.check("generate")
def test_generate(
    cell: Cell,
    job: Job,
    workbench: Workbench,
    proof: Proof,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """UnusableError where the machine, not the claim, is to blame."""
    from quantmatrix.cli import main
    from quantmatrix.errors import UnusableError
    from quantmatrix.exit_codes import ENVIRONMENT_UNUSABLE
    from quantmatrix.runtime import media

    for name, value in cell.environment.items():
        monkeypatch.setenv(name, value)
    argv = [*workbench.argv(cell)[1:], "--device", job.request.device or "cpu"]
    start = time.perf_counter()
    with workbench.lend(job.request, job.plan) as lent:
        code = main.main([*argv, "--output-path", str(tmp_path), "--json"])
    proof.timings["command"] = time.perf_counter() - start
    out, err = capfd.readouterr()
    proof.folders[str(tmp_path)] = "$OUTPUT"
    if code == ENVIRONMENT_UNUSABLE:
        raise UnusableError(err)
    assert code == 0, err
    assert lent == [True] * (job.plan.processes == 1), "the command's plan is not the cell's"
    [run] = json.loads(out)["runs"]
    frames = read_media(Path(run["output"]))
    count, height, width = expected_size(job)
    proof.metrics.update(
        {
            "file": Path(run["output"]).name,
            "frames": len(frames),
            "height": frames.shape[1],
            "width": frames.shape[2],
            "quantized_layers": run["quantized_layers"],
        }
    )
    proof.limits.update({"frames": count, "height": height, "width": width, "constant": False})
    assert tuple(frames.shape[:3]) == (count, height, width), "frames, height, width"
    assert run["quantized_layers"] == {n: len(p.layers) for n, p in job.plan.components.items()}
    degenerate = media.find_degeneration(frames)
    assert degenerate is None, f"{run['output']}: {degenerate}"


def read_media(path: Path) -> Any:
    """Frames of a picture or clip, uint8 [frames, height, width, 3], read from the file."""
    import numpy as np
    import torch

    if path.suffix == ".mp4":
        import imageio

        with imageio.get_reader(path) as reader:
            frames = [np.asarray(frame) for frame in reader]
    else:
        from PIL import Image

        with Image.open(path) as image:
            image.load()
            frames = [np.asarray(image.convert("RGB"))]
    return torch.from_numpy(np.stack(frames))


def expected_size(job: Job) -> tuple[int, int, int]:
    """(frames, height, width) that the request or the model's defaults ask for."""
    from quantmatrix import models

    model = models.load(job.plan.model)
    request = job.request
    defaults = model.TINY_DEFAULTS if request.tiny else model.DEFAULTS
    return (
        request.num_frames or defaults.frames,
        request.height or defaults.height,
        request.width or defaults.width,
    )
