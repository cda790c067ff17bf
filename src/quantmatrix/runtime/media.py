"""Media: pictures and clips as files."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from quantmatrix import models
from quantmatrix.errors import MissingPackageError, UsageError
from quantmatrix.files import check_writable, whole

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from typing import Any

    from quantmatrix.runtime.plan.types import Plan
    from quantmatrix.runtime.run import Run


def find_degeneration(frames: torch.Tensor) -> str | None:
    """Why an image or clip shows nothing, or None: NaN, one colour, or saturated.

    `frames` is uint8, or a float tensor in 0..1; any shape.
    """
    if frames.numel() == 0:
        return "there is nothing in it"
    if not torch.isfinite(frames).all():
        return f"{int((~torch.isfinite(frames)).sum())} elements are NaN or infinite"
    top = 255.0 if frames.dtype == torch.uint8 else 1.0
    low, high = (float(end) for end in frames.aminmax())
    if high - low <= 2.0 * top / 255.0:
        return f"it is constant: every element is within 2/255 of {low:.4g}"
    saturated = float(((frames <= 0) | (frames >= top)).count_nonzero()) / frames.numel()
    if saturated > 0.9:
        return f"it is saturated: {saturated:.0%} of its elements are at an end of the range"
    return None


def stack_frames(media: Sequence[Any]) -> torch.Tensor:
    """uint8 [frames, height, width, 3] of PIL images, or of arrays in 0..1 or 0..255."""
    import numpy as np

    frames = [np.asarray(frame) for frame in media]
    stacked = np.stack(frames)
    if stacked.dtype != np.uint8:
        stacked = (stacked * 255.0).round().clip(0, 255).astype(np.uint8)
    return torch.from_numpy(stacked)


def save_media(
    run: Run, output_path: str, *, several: bool = False, taken: Collection[Path] = ()
) -> Path:
    """Write the run's image (PNG) or video (MP4); nothing is left behind on failure.

    `output_path` is a folder, or a file whose ending fits (.png, .jpg, .webp / .mp4); with several
    runs prompt and seed are added to a file's name. A name that is `taken`, by another run of the
    same command, gets a number. Raises UsageError where the file cannot be written.
    """
    target = named = name_output(run, Path(output_path), several)
    number = 1
    while target in taken:
        number += 1
        target = named.with_stem(f"{named.stem}-{number}")
    try:
        with whole(target) as temporary:
            write_media(run, temporary)
    except OSError as error:
        raise UsageError(
            f"cannot write {target}: {error.strerror or error}; nothing was left behind. "
            "Free some space or choose another --output-path"
        ) from error
    run.output = target
    return target


def check_output(plan: Plan, output_path: str) -> None:
    """Raise UsageError before anything is computed when the result could not be written there.

    MissingPackageError where a video is to be written, and there is no encoder.
    """
    defaults = models.load(plan.model).DEFAULTS
    path = Path(output_path)
    check_writable(path if is_media_file(path, defaults.frames > 1) else path / "output")
    if defaults.frames > 1:
        check_video_writer()


def check_video_writer() -> None:
    """Raise MissingPackageError unless there is what writes a video, before one is computed."""
    missing = [name for name in ("imageio", "imageio_ffmpeg") if find_spec(name) is None]
    if missing:
        packages = " ".join(name.replace("_", "-") for name in missing)
        raise MissingPackageError(
            f"{packages}: not installed, and a video cannot be written without: expected an encoder of "
            f"mp4 files. `python -m pip install {packages}`, or keep the latents alone with "
            "--save-latents FILE --no-save-output"
        )


def is_media_file(path: Path, is_video: bool) -> bool:
    """Whether a path names the file to write, not a folder; UsageError for one of the other kind."""
    endings = (".mp4",) if is_video else (".png", ".jpg", ".jpeg", ".webp")
    if path.suffix.lower() in endings:
        return True
    if path.suffix.lower() in (".mp4", ".png", ".jpg", ".jpeg", ".webp", ".gif"):
        raise UsageError(
            f"--output-path {path}: this run makes a {'video' if is_video else 'picture'}; "
            f"expected a folder or a file ending in {' or '.join(endings)}"
        )
    return False


def name_output(run: Run, path: Path, several: bool) -> Path:
    """The file of a run: the given one, or `<prompt>-<seed>` in the given folder."""
    endings = (".mp4",) if run.is_video else (".png",)
    if is_media_file(path, run.is_video):
        return path.with_stem(f"{path.stem}-{slugify(run.prompt)}-{run.seed}") if several else path
    return path / f"{slugify(run.prompt)}-{run.seed}{endings[0]}"


def slugify(text: str) -> str:
    """A short file name from a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "output"


def write_media(run: Run, path: Path) -> None:
    """Write an image with Pillow, or a video with imageio's bundled ffmpeg."""
    if not run.is_video:
        run.media[0].save(path)
        return
    check_video_writer()
    import imageio
    import numpy as np

    frames = [np.asarray(frame) for frame in run.media]
    with imageio.get_writer(path, fps=run.fps, macro_block_size=1) as writer:
        for frame in frames:
            writer.append_data(frame)
