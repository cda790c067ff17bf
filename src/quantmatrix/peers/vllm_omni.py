"""vLLM-Omni, by its offline engine: `Omni(model=...).generate(...)`, in the child that adapters run in.

A ModelOpt checkpoint is found by the `quantization_config` of the transformer in a pipeline's folder, so that
a transformer folder is put into a copy (of links) of its base model; `quantization_config="fp8"` quantizes while
loading. No latents are given: pictures are compared. Known from its quickstart and the pages ModelOpt and
Online of its quantization guide.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.peers import common
from quantmatrix.peers.protocol import DONE, Answer, Found, Task

if TYPE_CHECKING:
    from collections.abc import Mapping

ID = "vllm-omni"
MEDIA = "media.png"


def probe() -> Found:
    """The version of the package."""
    return common.find_package("vllm-omni")


def ways(task: Task) -> tuple[str, ...]:
    """A pipeline, a pipeline with the transformer in it, or quantizing while loading."""
    row = task.checkpoint
    if task.baseline or row.selector == "--model-path":
        return ("model",)
    if task.online:
        return ("quantization_config",) if task.online == "fp8" else ()
    return ("folder with the transformer",) if row.form in ("component-folder", "sharded") else ()


def command(task: Task) -> str:
    """The statement of Python."""
    pipeline = task.checkpoint.selector == "--model-path" and not task.baseline
    model = task.weights if pipeline else task.base
    if task.way == "folder with the transformer":
        return f"Omni(model=<{task.base} with {task.weights} as its transformer>)"
    config = ", quantization_config='fp8'" if task.way == "quantization_config" else ""
    return f"Omni(model={model!r}{config})"


def run(task: Task, folder: Path) -> Answer:
    """Load, generate and save the first picture; see `quantmatrix.peers.protocol`."""
    from vllm_omni.entrypoints.omni import Omni

    start = time.perf_counter()
    engine = Omni(**list_settings(task, folder))
    common.mark_loaded(folder)
    loaded = time.perf_counter()
    outputs = engine.generate(list_prompt(task))
    outputs[0].request_output.images[0].save(folder / MEDIA)
    done = time.perf_counter()
    return Answer(
        DONE,
        loaded=True,
        media=MEDIA,
        seconds={"load": round(loaded - start, 3), "generate": round(done - loaded, 3)},
        peak_bytes=common.read_peak(),
    )


def list_settings(task: Task, folder: Path) -> dict[str, Any]:
    """Arguments of the engine."""
    if task.way == "folder with the transformer":
        return {"model": str(assemble(task, folder / "model"))}
    pipeline = task.checkpoint.selector == "--model-path" and not task.baseline
    settings = {"model": task.weights if pipeline else task.base}
    return {
        **settings,
        **({"quantization_config": "fp8"} if task.way == "quantization_config" else {}),
    }


def list_prompt(task: Task) -> Mapping[str, Any]:
    """The prompt of a task, with the size of a stand-in's picture."""
    request = task.request
    sizes: dict[str, Any] = {}
    if task.tiny:
        from quantmatrix import models

        size = models.load(task.checkpoint.model).TINY_DEFAULTS
        sizes = {"height": size.height, "width": size.width, "num_inference_steps": size.steps}
    return {"prompt": request.prompt[0], "seed": request.seed[0], **sizes}


def assemble(task: Task, folder: Path) -> Path:
    """A pipeline's folder of links to the base model's parts, its first transformer being the checkpoint's."""
    base, weights = find_folder(task.base), find_folder(task.weights)
    [name, *_] = task.checkpoint.components
    folder.mkdir()
    for part in base.iterdir():
        if part.name != name:
            (folder / part.name).symlink_to(part.resolve())
    (folder / name).symlink_to(weights.resolve())
    return folder


def find_folder(reference: str) -> Path:
    """A folder here, or the snapshot of a hub id, downloaded where it is not there yet."""
    if Path(reference).is_dir():
        return Path(reference)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(reference))


def explain(answer: Answer) -> str:
    """The class of the exception and the first line of its text."""
    return common.pick_message(answer)
