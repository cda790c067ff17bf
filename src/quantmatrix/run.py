"""Run: generate with a planned pipeline, and keep what proves it.

The latents of every denoising step are kept, the seconds of every stage and step, the peak memory,
and the census of quantized layers that stood in the model. Same seed, same machine, same bits: the
noise comes from a fresh CPU generator for every image.
"""

from __future__ import annotations

import os
import re
import resource
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from quantmatrix import models
from quantmatrix.compare import find_degeneration, stack_frames
from quantmatrix.errors import BrokenRunError, MissingPackageError, RefusedError, UsageError
from quantmatrix.load import count_quantized
from quantmatrix.pipeline import build_pipeline
from quantmatrix.places import check_place
from quantmatrix.planning import Plan, Refusal, plan
from quantmatrix.request import Request

STAGE = "stage|"
"""What the names of stages begin with in a profiler's trace."""


@dataclass
class Run:
    """What one prompt and one seed gave."""

    plan: Plan
    prompt: str
    seed: int
    latents: list[torch.Tensor]
    """Latents after each step, on the CPU, in the dtype of the pipeline."""
    media: list[Any]
    """PIL images; for a video its frames."""
    is_video: bool
    fps: int
    seconds: dict[str, float]
    """Per stage: `load` (first run of a pipeline only), `encode`, `denoise`, `decode`, and
    `generate`, which is the last three together."""
    step_seconds: list[float]
    peak_bytes: int
    """Peak memory: of the accelerator when there is one, else resident memory of the process."""
    census: dict[str, dict[str, int]]
    """Quantized layers found in each transformer component, per backend."""
    output: Path | None = None
    calls: dict[str, int] = field(default_factory=dict)
    """Forward calls of each transformer component."""
    witness: dict[str, Any] = field(default_factory=dict)
    """What the witness found of each quantized component; empty where it was not asked."""
    degenerate: str | None = None
    """Why the run shows nothing: it went beyond numbers, or its media are of one colour."""

    def require_numbers(self) -> None:
        """Raise BrokenRunError when latents are NaN or infinite: the picture would be black."""
        for step, latents in enumerate(self.latents, 1):
            if bad := int((~torch.isfinite(latents)).sum()):
                raise BrokenRunError(
                    f"step {step} of {len(self.latents)} gave {bad} of {latents.numel()} latents "
                    f"that are NaN or infinite (prompt {self.prompt!r}, seed {self.seed}): expected "
                    "numbers. Nothing was saved. Try --backend decode or --dtype float32, or the "
                    "base model alone: if that works, the checkpoint is damaged"
                )

    def to_json(self) -> dict[str, Any]:
        """The performance dump, plain data."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "output": str(self.output) if self.output else None,
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "peak_memory_bytes": self.peak_bytes,
            "quantized_layers": {n: sum(c.values()) for n, c in self.census.items()},
            "backends": self.census,
            "transformer_calls": self.calls,
            "witness": self.witness,
            "degenerate": self.degenerate,
            "transformer_bytes": {n: c.bytes for n, c in self.plan.components.items()},
            "plan": self.plan.to_json(),
        }


def generate(
    request: Request,
    *,
    made: Plan | None = None,
    pipeline: Any = None,
    progress: bool = False,
) -> Run:
    """Generate for the first prompt and seed of a request; see `generate_all` for every one."""
    return next(iter(generate_all(request, made=made, pipeline=pipeline, progress=progress)))


def generate_all(
    request: Request,
    *,
    made: Plan | None = None,
    pipeline: Any = None,
    progress: bool = False,
    save: Callable[[Run], None] | None = None,
) -> list[Run]:
    """Generate for every prompt and seed of a request, calling `save` after each."""
    if made is None:
        made = require_plan(request)
    if made.processes > 1 and not distributed.is_initialized():
        raise UsageError(
            f"the plan has {made.processes} processes, this is one of none: "
            "see `quantmatrix.parallel.generate_together`"
        )
    models.load(made.model).call_arguments(request)  # a wrong flag is an error before the loading
    seconds = {}
    if pipeline is None:
        start = time.perf_counter()
        pipeline = build_pipeline(made, progress=progress)
        seconds["load"] = time.perf_counter() - start
    runs = []
    for prompt in request.prompt:
        for seed in request.seed:
            run = generate_one(request, made, pipeline, prompt, seed)
            run.seconds.update(seconds)
            seconds = {}
            if save is not None:
                save(run)
            runs.append(run)
    return runs


def require_plan(request: Request) -> Plan:
    """The plan of a request; RefusedError where it is a refusal."""
    made = plan(request)
    if isinstance(made, Refusal):
        raise RefusedError(made.rule, made.message)
    return made


def generate_one(request: Request, made: Plan, pipeline: Any, prompt: str, seed: int) -> Run:
    """One prompt, one seed."""
    model = models.load(made.model)
    latents: list[torch.Tensor] = []
    marks: list[float] = []
    calls: Counter[str] = Counter()
    handles = [
        getattr(pipeline, name).register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name in made.components
    ]

    def keep(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"].detach().to("cpu", copy=True))
        marks.append(time.perf_counter())
        return tensors

    arguments = model.call_arguments(request)
    defaults = model.TINY_DEFAULTS if request.tiny else model.DEFAULTS
    reset_peak(made.machine.device)
    stages: dict[str, float] = {}
    start = time.perf_counter()
    try:
        with torch.no_grad(), timed_stages(pipeline, stages):
            result = pipeline(
                prompt=prompt,
                generator=torch.Generator("cpu").manual_seed(seed),
                callback_on_step_end=keep,
                callback_on_step_end_tensor_inputs=["latents"],
                output_type="pil",
                **arguments,
            )
    finally:
        for handle in handles:
            handle.remove()
    total = time.perf_counter() - start
    is_video = hasattr(result, "frames")
    media = list(result.frames[0] if is_video else result.images)
    return Run(
        plan=made,
        prompt=prompt,
        seed=seed,
        latents=latents,
        media=media,
        is_video=is_video,
        fps=defaults.fps,
        seconds={
            **stages,
            "denoise": total - sum(stages.values()),
            "generate": total,
        },
        step_seconds=[after - before for before, after in pairwise(marks)],
        peak_bytes=read_peak(made.machine.device),
        census={
            name: dict(Counter(count_quantized(getattr(pipeline, name)).values()))
            for name in made.components
        },
        calls=dict(calls),
        witness=read_reports(pipeline, made),
        degenerate=find_degeneration(stack_frames(media)),
    )


def read_reports(pipeline: Any, made: Plan) -> dict[str, Any]:
    """What the witness found when the components of a pipeline were loaded, as plain data."""
    found = {name: getattr(getattr(pipeline, name), "witness", None) for name in made.components}
    return {name: report.to_json() for name, report in found.items() if report is not None}


@contextmanager
def timed_stages(pipeline: Any, seconds: dict[str, float]) -> Iterator[None]:
    """Add up the seconds of text encoding and of decoding while a pipeline runs."""

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                with torch.profiler.record_function(f"{STAGE}{stage}"):
                    return function(*args, **kwargs)
            finally:
                seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start

        return call

    encode, decode = pipeline.encode_prompt, pipeline.vae.decode
    pipeline.encode_prompt = timed("encode", encode)
    pipeline.vae.decode = timed("decode", decode)
    try:
        yield
    finally:
        del pipeline.encode_prompt
        del pipeline.vae.decode


def reset_peak(device: str) -> None:
    """Start a new peak-memory measurement where the device has a counter."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def read_peak(device: str) -> int:
    """Peak memory in bytes (accelerator counter, else the process's largest resident size)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def save_media(
    run: Run, output_path: str, *, several: bool = False, taken: Collection[Path] = ()
) -> Path:
    """Write the run's image (PNG) or video (MP4); nothing is left behind on failure.

    `output_path` is a folder, or a file whose ending fits (.png, .jpg, .webp / .mp4); with several
    runs prompt and seed are added to a file's name. A name that is `taken`, by another run of the
    same command, gets a number.
    """
    target = named = name_output(run, Path(output_path), several)
    number = 1
    while target in taken:
        number += 1
        target = named.with_stem(f"{named.stem}-{number}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
        try:
            write_media(run, temporary)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write {target}: {error.strerror or error}; nothing was left behind. "
            "Free some space or choose another --output-path"
        ) from error
    run.output = target
    return target


def check_output(made: Plan, output_path: str) -> None:
    """Raise UsageError before anything is computed when the result could not be written there.

    MissingPackageError where a video is to be written, and there is no encoder.
    """
    defaults = models.load(made.model).DEFAULTS
    path = Path(output_path)
    check_place(path if is_media_file(path, defaults.frames > 1) else path / "output")
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
