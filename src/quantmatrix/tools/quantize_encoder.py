"""Quantize encoder: a text encoder of a full-precision model, as `--text-encoder-path` takes it.

`quantmatrix quantize --component text_encoder_2` writes a folder with its config.json, or one
`.safetensors` file. Layers inside of blocks are quantized, as far as their widths fit; embeddings, heads
and what the encoding of a prompt does not call (a tower for pictures) stay. Calibration is that encoding,
in runs of one step.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantmatrix import families, models
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.declaration import read_json
from quantmatrix.checkpoints.opening import (
    fetch,
    fetch_pipeline,
    open_component,
    read_components,
)
from quantmatrix.checkpoints.reader import TensorReader
from quantmatrix.errors import UsageError
from quantmatrix.families.protocol import Calibration, Declaration
from quantmatrix.files import check_writable, whole
from quantmatrix.hardware import probe
from quantmatrix.request import Request
from quantmatrix.runtime.library_logs import quiet
from quantmatrix.runtime.pictures import call_arguments
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan import decide
from quantmatrix.runtime.plan.encoder_names import EncoderNames, learn_names
from quantmatrix.runtime.plan.types import Plan, require
from quantmatrix.scheme import Scheme, explain_width
from quantmatrix.tools.packing import Tensors
from quantmatrix.tools.quantize import (
    PROMPTS,
    Show,
    check_target,
    compile_patterns,
    find_scheme,
    list_files,
    move,
)
from quantmatrix.tools.recipe import quantize_layers, save, watch_inputs, write_json

WEIGHTS = "model.safetensors"
INSIDE = re.compile(r"\.\d+\.")
"""In the name of a module that belongs to a block."""


@dataclass(frozen=True)
class Encoder:
    """A text encoder in full precision, and how its tensors are called."""

    folder: Path
    checkpoint: Checkpoint
    names: EncoderNames


def quantize_encoder(
    request: Request,
    component: str,
    *,
    family: str,
    output: str | Path,
    scheme: str | None = None,
    kept: Sequence[str] | None = None,
    prompts: Sequence[str] = PROMPTS,
    overwrite: bool = False,
    show: Show = lambda _, things: things,
) -> dict[str, Any]:
    """Quantize one text encoder of a request's model and write it; returns what was written.

    Arguments as of `quantize.quantize`; `kept` are regular expressions over the module names of
    transformers. Raises UsageError before any work for arguments that do not fit.
    """
    start, target = time.monotonic(), Path(output)
    if family not in families.ENCODERS:
        raise UsageError(
            f"--family {family}: it is for transformers; text encoders are written in "
            f"{', '.join(families.ENCODERS)}"
        )
    _, chosen = find_scheme(family, scheme, None, None)
    check_writable(target)
    keeps = compile_patterns("--keep", kept or ())
    plan = require(decide.plan(request, probe.probe(request.device)))
    encoder = open_encoder(plan, component)
    check_target(plan, target, overwrite)
    ranges = calibrate(plan, component, prompts, show)
    tensors = read_tensors(encoder.checkpoint, request.dtype)
    layers = choose_layers(tensors, encoder.names, ranges, chosen, keeps)
    if not layers:
        raise UsageError(
            f"{plan.base}: {component} has no layer that {chosen.name} can store: "
            f"{len(ranges)} linear layers were called, and each is kept or of another width"
        )
    module = families.load(family)
    written, declaration = quantize_layers(
        module, encoder.names, tensors, layers, ranges, lambda things: show("quantizing", things)
    )
    try:
        with whole(target, overwrite=overwrite) as temporary:
            write(written, declaration, temporary, encoder.folder, single=is_file(target))
    except OSError as error:
        raise UsageError(
            f"cannot write {target}: {error.strerror or error}; nothing was left behind"
        ) from error
    weights = [n for n, t in tensors.items() if n.endswith(".weight") and t.ndim == 2]
    return {
        "output": str(target),
        "model": plan.model,
        "family": family,
        "scheme": chosen.name,
        "components": {
            component: {"quantized": len(layers), "kept": len(weights) - len(layers)}
        },
        "prompts": len(prompts),
        "bytes": sum(path.stat().st_size for path in list_files(target)),
        "seconds": round(time.monotonic() - start, 3),
    }  # fmt: skip


def is_file(target: Path) -> bool:
    """Whether an output is one file and no folder, by the end of its name."""
    return target.suffix == ".safetensors"


def open_encoder(plan: Plan, component: str) -> Encoder:
    """The component's own files in the base model.

    Raises UsageError where it is no text encoder of transformers, is quantized already, or is named
    by a flag.
    """
    base = Path(fetch_pipeline(plan.base, plan.request.hub, without=tuple(plan.components)))
    file = base / "model_index.json"
    index = read_components(read_json(file), str(file))
    known = [n for n, (library, _) in index.items() if n.startswith("text_encoder") and library]
    if component not in known:
        raise UsageError(
            f"--component {component}: {plan.base} has the text encoders {', '.join(known)}; "
            "without the flag its transformers are quantized"
        )
    flag = f"--{component.replace('_', '-')}-path"
    if component in (*plan.request.component_paths, *plan.request.weights_paths):
        raise UsageError(f"{flag}: the base model's own {component} is quantized; leave it out")
    if component in plan.encoders:
        raise UsageError(
            f"{plan.base}: {component} is quantized already ({plan.encoders[component].why}): name "
            "the model that it was made from"
        )
    folder = base / component
    checkpoint = open_component(str(folder), plan.request.hub)
    config = read_json(folder / "config.json")
    names = learn_names(checkpoint, str(index[component][1]), config, str(folder / "config.json"))
    return Encoder(folder, fetch(checkpoint, plan.request.hub), names)


def calibrate(
    plan: Plan, component: str, prompts: Sequence[str], show: Show
) -> dict[str, Calibration]:
    """Input range of every linear layer of a text encoder that a prompt calls.

    Raises UsageError without prompts.
    """
    if not prompts:
        raise UsageError("calibration needs at least one prompt")
    pipeline = build_pipeline(plan)
    found = watch_inputs(getattr(pipeline, component))
    short = replace(plan.request, num_inference_steps=1)
    arguments = call_arguments(models.load(plan.model), short)
    with torch.inference_mode(), quiet():
        for number, prompt in enumerate(show("calibrating", list(prompts))):
            seed = torch.Generator("cpu").manual_seed(number)
            pipeline(prompt=prompt, generator=seed, output_type="latent", **arguments)
    return {layer: move(seen) for layer, seen in found.items()}


def read_tensors(checkpoint: Checkpoint, dtype: str) -> Tensors:
    """Tensors by their names on disk, those of floating point in `dtype`; weights are [out, in]."""
    wanted = getattr(torch, dtype)
    with TensorReader(checkpoint, "cpu") as reader:
        plain = {name: reader.read(name) for name in checkpoint.tensors}
    return {n: t.to(wanted) if t.is_floating_point() else t for n, t in plain.items()}


def choose_layers(
    tensors: Tensors,
    names: EncoderNames,
    ranges: Mapping[str, Calibration],
    scheme: Scheme,
    keeps: Sequence[re.Pattern[str]],
) -> dict[str, Scheme]:
    """The layers on disk that are quantized; weights are [out, in], of any float dtype."""
    found = {}
    for name in sorted(tensors):
        layer = name.removesuffix(".weight")
        if layer == name or tensors[name].ndim != 2:
            continue
        module = names.layer_targets(layer)[0].module
        inside = module in ranges and INSIDE.search(module)
        fits = not explain_width(scheme, tensors[name].shape[1])
        if inside and fits and not any(pattern.fullmatch(module) for pattern in keeps):
            found[layer] = scheme
    return found


def write(
    tensors: Tensors, declaration: Declaration, path: Path, base: Path, *, single: bool
) -> None:
    """Write a file that declares what it is in its header, or a folder whose config.json does.

    Tensors are written as they are: any shape and dtype. `base` holds the config.json.
    """
    metadata = {"format": "pt", **declaration.metadata}
    if single:
        if declaration.config is not None:
            metadata["quantization_config"] = json.dumps(declaration.config, sort_keys=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(tensors, sorted(tensors), path, metadata)
        return
    path.mkdir(parents=True, exist_ok=True)
    config = {**read_json(base / "config.json"), "quantization_config": declaration.config}
    write_json(path / "config.json", config)
    save(tensors, sorted(tensors), path / WEIGHTS, metadata)
