"""Generate: the row's command, through the command line, leaves a file that shows something."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantmatrix.harness.recorder import Proof
    from quantmatrix.suites.command import Commanded
    from quantmatrix.suites.conftest import Job


@pytest.mark.check("generate")
def test_generate(job: Job, proof: Proof, command: Callable[[], Commanded]) -> None:
    """UnusableError where the machine, not the claim, is to blame."""
    from quantmatrix.errors import UnusableError
    from quantmatrix.exit_codes import ENVIRONMENT_UNUSABLE
    from quantmatrix.runtime import media

    done = command()
    proof.timings["command"] = done.seconds
    proof.folders[str(done.folder)] = "$OUTPUT"
    if done.code == ENVIRONMENT_UNUSABLE:
        raise UnusableError(done.err)
    assert done.code == 0, done.err
    assert done.planned, "the command's plan is not the cell's"
    run = done.tell()
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
