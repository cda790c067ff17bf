"""diffusers, as shipped: `from_pretrained` and `from_single_file` with its own quantizers.

| a checkpoint that is        | is loaded by |
| --------------------------- | ------------ |
| a pipeline (`--model-path`) | `from_pretrained` of the pipeline |
| a folder                    | `from_pretrained` of the transformer, by the quantization config that it has |
| a safetensors file          | `from_single_file`, then with `BFLQuantizationConfig` |
| a GGUF file                 | `from_single_file` with `GGUFQuantizationConfig` |
| none (`--quantization fp8`) | `from_pretrained` of the base with `TorchAoConfig` |

Known from the docstrings of diffusers 0.42.1 (`quantizers/quantization_config.py`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmatrix.peers import common
from quantmatrix.peers.protocol import DONE, Answer, Found, Missing, Task

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantmatrix.models import Model

ID = "diffusers"
GGUF, FP8 = ".gguf", "fp8"
CONFIGS = {
    "from_pretrained": "",
    "from_single_file": "",
    "BFLQuantizationConfig": "BFLQuantizationConfig(compute_dtype=torch.bfloat16)",
    "GGUFQuantizationConfig": "GGUFQuantizationConfig(compute_dtype=torch.bfloat16)",
    "TorchAoConfig": "TorchAoConfig(Float8WeightOnlyConfig())",
}
"""Ways of loading, and the quantization config that each hands over."""
PARTS = {"GGUFQuantizationConfig": "gguf", "TorchAoConfig": "torchao"}
"""Packages that a way needs besides."""


def probe() -> Found:
    """The version of diffusers that is installed."""
    return common.find_package("diffusers")


def ways(task: Task) -> tuple[str, ...]:
    """See the module's table."""
    row = task.checkpoint
    if task.baseline or row.selector == "--model-path":
        return ("from_pretrained",)
    if task.online:
        return ("TorchAoConfig",) if task.online == FP8 else ()
    if task.weights.endswith(GGUF):
        return ("GGUFQuantizationConfig",)
    if task.weights.endswith(".safetensors"):
        return ("from_single_file", "BFLQuantizationConfig")
    return ("from_pretrained",)


def run(task: Task, folder: Path) -> Answer:
    """Load by `task.way` and generate; Missing for a package that the way needs besides."""
    if (part := PARTS.get(task.way)) and common.find_package(part).why:
        raise Missing(f"{task.way} of diffusers needs the package {part}, which is not installed")
    return run_with(task, folder, load_pipeline)


def run_with(task: Task, folder: Path, load: Callable[[Task, Model], Any]) -> Answer:
    """The same with another way of making diffusers' pipeline, for runtimes that build on it.

    Raises Missing where the pipeline's processor needs what is not installed.
    """
    from quantmatrix import models

    model = models.load(task.checkpoint.model)
    if why := explain_processor(task.base):
        raise Missing(why)
    start = time.perf_counter()
    pipeline = load(task, model).to(task.device)
    parts = [getattr(pipeline, name) for name in task.checkpoint.components]
    common.mark_loaded(folder)
    loaded = time.perf_counter()
    latents, media = generate(pipeline, task, model, folder)
    return Answer(
        DONE,
        loaded=True,
        media=media,
        latents=common.save_latents(latents, folder),
        weights=common.count_bytes(parts),
        seconds={
            "load": round(loaded - start, 3),
            "generate": round(time.perf_counter() - loaded, 3),
        },
        peak_bytes=common.read_peak(task.device),
    )


def load_pipeline(task: Task, model: Model) -> Any:
    """The pipeline with the checkpoint in it."""
    import diffusers
    import torch

    pipeline, transformer = (getattr(diffusers, n) for n in (model.PIPELINE, model.TRANSFORMER))
    dtype: dict[str, Any] = {"torch_dtype": torch.bfloat16}
    if task.baseline:
        return pipeline.from_pretrained(task.base, **dtype)
    if task.checkpoint.selector == "--model-path":
        return pipeline.from_pretrained(task.weights, **dtype)
    config = make_config(task.way)
    quantized = {"quantization_config": config} if config is not None else {}
    if task.online:
        loaded = transformer.from_pretrained(
            task.base, subfolder="transformer", **quantized, **dtype
        )
    elif task.way == "from_pretrained":
        loaded = transformer.from_pretrained(task.weights, **dtype)
    else:
        where = {"config": task.base, "subfolder": "transformer"}
        file = name_file(task.weights)
        loaded = transformer.from_single_file(file, **where, **quantized, **dtype)
    [name, *_] = task.checkpoint.components
    return pipeline.from_pretrained(task.base, **{name: loaded}, **dtype)


def explain_processor(base: str) -> str:
    """What a base model's processor needs that is not installed, or ''; of a folder here, no repository."""
    from quantmatrix.checkpoints.declaration import read_json
    from quantmatrix.runtime.light_processor import CLASSES

    index = Path(base) / "model_index.json"
    entries = read_json(index).values() if index.is_file() else ()
    found = [entry[-1] for entry in entries if isinstance(entry, list) and entry[-1] in CLASSES]
    if not found or not common.find_package("torchvision").why:
        return ""
    return f"{found[0]} of transformers needs the package torchvision, which is not installed"


def name_file(reference: str) -> str:
    """A file as `from_single_file` takes it: a path here, or the address of one in a repository."""
    if Path(reference).exists():
        return reference
    owner, name, *rest = reference.split("/")
    return f"https://huggingface.co/{owner}/{name}/blob/main/{'/'.join(rest)}"


def make_config(way: str) -> Any:
    """The quantization config of a way, or None."""
    import diffusers
    import torch

    if way == "TorchAoConfig":
        from torchao.quantization import Float8WeightOnlyConfig

        return diffusers.TorchAoConfig(Float8WeightOnlyConfig())
    kind = getattr(diffusers, way) if CONFIGS[way] else None
    return kind(compute_dtype=torch.bfloat16) if kind else None


def generate(pipeline: Any, task: Task, model: Model, folder: Path) -> tuple[list[Any], str]:
    """The latents of every step, and the name of the first picture."""
    import torch

    from quantmatrix.runtime.pictures import call_arguments
    from quantmatrix.runtime.steps import watched_steps

    request = task.request
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad(), watched_steps(pipeline) as steps:
        result = pipeline(
            prompt=request.prompt[0],
            generator=torch.Generator("cpu").manual_seed(request.seed[0]),
            **steps.arguments,
            output_type="pil",
            **call_arguments(model, request),
        )
    media = result.frames[0] if hasattr(result, "frames") else result.images
    media[0].save(folder / "media.png")
    return steps.latents, "media.png"


def command(task: Task) -> str:
    """The statement of Python that loads the transformer, or the pipeline, the same way."""
    from quantmatrix import models

    model = models.load(task.checkpoint.model)
    config = f", quantization_config={CONFIGS[task.way]}" if CONFIGS.get(task.way) else ""
    dtype = ", torch_dtype=torch.bfloat16"
    if task.baseline or task.checkpoint.selector == "--model-path":
        return f"{model.PIPELINE}.from_pretrained({task.weights or task.base!r}{dtype})"
    where = f"{task.base!r}, subfolder='transformer'"
    if task.online:
        return f"{model.TRANSFORMER}.from_pretrained({where}{config}{dtype})"
    if task.way == "from_pretrained":
        return f"{model.TRANSFORMER}.from_pretrained({task.weights!r}{dtype})"
    file = name_file(task.weights)
    return f"{model.TRANSFORMER}.from_single_file({file!r}, config={where}{config}{dtype})"


def explain(answer: Answer) -> str:
    """The class of the exception and the first line of its text."""
    return common.pick_message(answer)
