"""Pipeline: a plan becomes a diffusers pipeline with our transformers in it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from quantmatrix.checkpoints.declaration import read_json
from quantmatrix.checkpoints.opening import fetch_pipeline, open_pipeline
from quantmatrix.errors import CheckpointError, RefusedError, UsageError
from quantmatrix.runtime import acceleration, lora
from quantmatrix.runtime.library_logs import quiet
from quantmatrix.runtime.light_processor import load_processors
from quantmatrix.runtime.load import load_component, show_progress
from quantmatrix.runtime.offloading import stream_blocks
from quantmatrix.runtime.plan import other_parts
from quantmatrix.runtime.plan.types import Plan

LONGEST_REASON = 300
"""Characters of a library's error that are repeated."""


def build_pipeline(plan: Plan, *, progress: bool = False) -> Any:
    """Load every component of a plan and put the pipeline together on the plan's machine.

    Raises UsageError for a bare component and for flags that the device does not take, and
    CheckpointError (UnreachableError, WitnessError among them) for files that are damaged, missing
    or not what the plan says.
    """
    import diffusers

    if plan.pipeline_class is None or not plan.pipeline_class.endswith("Pipeline"):
        raise UsageError(
            f"{plan.base} is a single component, not a pipeline: use load_transformer, "
            "or name a model folder that has a model_index.json"
        )
    request = plan.request
    device = plan.machine.device
    make_current(device)
    offloaded = plan.layerwise_offload or plan.cpu_offload
    planned = {**plan.components, **plan.encoders}
    folder = fetch_pipeline(plan.base, request.hub, without=tuple(planned))
    other_parts.check_folder(
        Path(folder), plan.pipeline_class, {*planned, *request.component_paths}
    )
    other_parts.check_rest(
        open_pipeline(folder, request.hub), planned, request.component_paths, request.hub
    )
    parts: dict[str, Any] = {}
    for name, component in planned.items():
        with show_progress(component, progress) as report:
            parts[name] = load_component(component, request, device=device, progress=report)
    index = read_json(Path(folder) / "model_index.json")
    parts.update(load_other_overrides(plan, index))
    with quiet(), readable_errors(f"{folder}: a processor", folder, folder):
        parts = {**load_processors(index, Path(folder)), **parts}
    with (
        quiet(),
        without_components(folder, tuple(parts)) as rest,
        readable_errors(f"{folder}: a part of the pipeline", rest, folder),
    ):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            rest, dtype=getattr(torch, request.dtype), local_files_only=True, **parts
        )
    check_parts(pipeline, parts)
    transformers = {name: parts[name] for name in plan.components}
    lora.load_requested(transformers, plan.pipeline_class, request)
    lora.give_methods(pipeline, list(transformers), request.hub)
    if device != "cpu":
        place(pipeline, plan, device, offloaded)
    elif plan.layerwise_offload:
        enable_layerwise(pipeline, plan, device)
    accelerate(pipeline, plan)
    pipeline.set_progress_bar_config(disable=not progress)
    return pipeline


@contextmanager
def readable_errors(what: str, view: str, folder: str) -> Iterator[None]:
    """Whatever a library raises about files as a CheckpointError that names the user's own folder.

    A lack of memory is no fault of theirs.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, CheckpointError, RefusedError, UsageError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).replace(view, folder).splitlines()]
        why = " ".join(filter(None, lines))[:LONGEST_REASON]
        if "trust_remote_code" in str(error):
            why = "it asks for code that comes with the model, which is never run"
        raise CheckpointError(
            f"{what} cannot be loaded ({type(error).__name__}: {why}). Compare it with the model's "
            "own repository, or download it again"
        ) from error


@contextmanager
def without_components(folder: str, names: tuple[str, ...]) -> Iterator[str]:
    """A view of a pipeline folder whose index leaves components empty.

    diffusers loads a component that a pipeline declares as optional (both Wan experts) from the
    folder even when one is passed, and the passed one is dropped silently.
    """
    source = Path(folder)
    index = read_json(source / "model_index.json")
    with tempfile.TemporaryDirectory() as temporary:
        view = Path(temporary) / "pipeline"
        view.mkdir()
        for name in names:
            index[name] = [None, None]
        (view / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        for path in source.iterdir():
            if path.name not in ("model_index.json", *names):
                (view / path.name).symlink_to(path.resolve(), target_is_directory=path.is_dir())
        yield str(view)


def check_parts(pipeline: Any, parts: Mapping[str, Any]) -> None:
    """Every component that was built must be the one that stands in the pipeline.

    Raises CheckpointError where diffusers took another.
    """
    for name, part in parts.items():
        if getattr(pipeline, name) is not part:
            raise CheckpointError(
                f"{type(pipeline).__name__} did not take the {name} that was built for it: "
                "it would have run with the base model's own weights"
            )


def load_other_overrides(plan: Plan, index: Mapping[str, Any]) -> dict[str, Any]:
    """Components other than transformers that a `--<component>-path` replaces.

    Each is of the class that the base model's index names for it.
    """
    import diffusers
    import transformers

    loaded: dict[str, Any] = {}
    for name, reference in plan.request.component_paths.items():
        if name in plan.components or name in plan.encoders:
            continue
        folder = fetch_pipeline(reference, plan.request.hub)
        other_parts.check_part(Path(folder), name)
        library = transformers if name.startswith(("text_encoder", "tokenizer")) else diffusers
        auto = library.AutoTokenizer if name.startswith("tokenizer") else library.AutoModel
        chosen = other_parts.find_class(index, name) or auto
        with readable_errors(f"{reference}: {name}", folder, reference):
            loaded[name] = chosen.from_pretrained(folder, dtype=getattr(torch, plan.request.dtype))
    return loaded


def place(pipeline: Any, made: Plan, device: str, offloaded: bool) -> None:
    """Move the pipeline to its device; offloaded transformers go back to the host first."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and not (offloaded and name in made.components):
            part.to(device)
    if made.layerwise_offload:
        enable_layerwise(pipeline, made, device)
    elif made.cpu_offload:
        for name in made.components:
            getattr(pipeline, name).to("cpu")
        pipeline.enable_model_cpu_offload(device=device)


def make_current(device: str) -> None:
    """Let a numbered accelerator be the current one.

    Triton starts kernels on the current device, wherever the tensors lie.
    """
    kind, _, number = device.partition(":")
    if number and kind != "cpu":
        torch.get_device_module(kind).set_device(int(number))


def accelerate(pipeline: Any, plan: Plan) -> None:
    """Compile or capture the transformers, as the request asks.

    Raises UsageError for `--cuda-graph` on any other device than CUDA.
    """
    request, device = plan.request, plan.machine.device
    if request.cuda_graph and not device.startswith("cuda"):
        raise UsageError(f"--cuda-graph needs an NVIDIA GPU, the device is {device}: leave it out")
    for name in plan.components:
        if request.compile:
            acceleration.compile_blocks(getattr(pipeline, name))
        if request.cuda_graph:
            acceleration.graph_forward(getattr(pipeline, name))


def enable_layerwise(pipeline: Any, made: Plan, device: str) -> None:
    """Stream transformer blocks from host memory, one at a time, with prefetch on a GPU.

    The transformers were loaded and prepared on the device; moving keeps the strides of the
    transposed FP8 weights.
    """
    for name in made.components:
        stream_blocks(getattr(pipeline, name), device)
