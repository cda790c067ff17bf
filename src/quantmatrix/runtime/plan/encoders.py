"""Text encoders that are quantized: which of a pipeline are, and how each will be built.

| where a text encoder comes from | read here |
| ------------------------------- | --------- |
| `--text-encoder-path FILE`, `--text-encoder-weights-path X` | always: weights alone, the base's configuration |
| `--text-encoder-path FOLDER`, a folder with a config.json | where something in it is quantized |
| the base model's own folder | where something in it is quantized |

Everything else is loaded by transformers itself, as ever. A text encoder goes the way of a
transformer: family, schemes, placement by names and shapes, kernels, witness, census. Two things
differ: names are those of transformers (`encoder_names`), and a plain cast may hold embeddings as
codes, which are read as numbers. `--backend` counts where the layers' op has that backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantmatrix import families, kernels
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.declaration import find_config_block, read_json
from quantmatrix.checkpoints.folders import open_folder
from quantmatrix.checkpoints.opening import enter_component, open_component, open_weights
from quantmatrix.errors import CheckpointError
from quantmatrix.families.unknown_quantization import explain_unknown
from quantmatrix.quoting import quote
from quantmatrix.runtime.empty_model import find_model_class, measure_model
from quantmatrix.runtime.plan import kernel_choice, layout_choice
from quantmatrix.runtime.plan.config_limits import check_config
from quantmatrix.runtime.plan.encoder_names import EncoderNames, learn_names
from quantmatrix.runtime.plan.placement import Part, Site, ignored_names, place, sort_layers
from quantmatrix.runtime.plan.schemes import find_schemes, list_doubts
from quantmatrix.runtime.plan.sources import Source, Sources
from quantmatrix.runtime.plan.types import ComponentPlan, Piece
from quantmatrix.runtime.witness.base import Base, find_base, list_unproved

if TYPE_CHECKING:
    from quantmatrix.checkpoints.opening import PipelineFolder
    from quantmatrix.hardware.machine import Machine
    from quantmatrix.request import Request
    from quantmatrix.scheme import Scheme

ROTATIONS = ("rope_theta", "rope_parameters", "rope_scaling")
"""Keys of a language model's configuration that are no size of anything: Mistral's `rope_theta` is 1e9."""


def list_encoders(pipeline: PipelineFolder) -> list[str]:
    """Names of the text encoders of a pipeline."""
    return [
        name
        for name, (library, _) in pipeline.components.items()
        if name.startswith("text_encoder") and library == "transformers"
    ]


def find_encoders(request: Request, found: Sources) -> dict[str, Source]:
    """The text encoders that are read here, by name, and where each comes from.

    Raises CheckpointError for one in a form that no family reads, or of another class.
    """
    sources = {}
    for name in list_encoders(found.pipeline):
        checkpoint = open_encoder(name, request, found.pipeline)
        if checkpoint is None:
            continue
        config, file = read_config(name, request, found.pipeline, checkpoint)
        class_name = str(found.pipeline.components[name][1])
        check_kind(class_name, config, file)
        check_config(drop_rotations(config), file, checkpoint)
        sources[name] = Source(
            checkpoint, class_name, config, file, primary=False, base=found.base,
            siblings={name: name},
        )  # fmt: skip
    return sources


def drop_rotations(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what tells angles of positions, at any depth."""
    return {
        key: drop_rotations(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in ROTATIONS
    }


def open_encoder(name: str, request: Request, pipeline: PipelineFolder) -> Checkpoint | None:
    """The checkpoint of a text encoder that is read here; None: transformers loads it.

    Raises CheckpointError for one in a form that no family reads.
    """
    if weights := request.weights_paths.get(name):
        checkpoint = open_weights(weights, request.hub)
    elif path := request.component_paths.get(name):
        if not is_coded(*open_folder(path, request.hub), name):
            return None
        checkpoint = open_component(path, request.hub, name=name)
    elif is_coded(pipeline.folder, "", name, subfolder=name):
        checkpoint = open_component(pipeline.reference, request.hub, name)
    else:
        return None
    if unknown := explain_unknown(checkpoint):
        flag = f"--{name.replace('_', '-')}-path"
        raise CheckpointError(f"{unknown} ({name} of the pipeline; {flag} names another)")
    families.check(checkpoint)
    return checkpoint


def is_coded(folder: Any, file: str, name: str, subfolder: str = "") -> bool:
    """Whether the folder of a text encoder declares a quantization, or holds codes.

    Headers are read where the files lie on this machine. What is wrong with a folder otherwise is
    left to those who load it.
    """
    if file:
        return False
    folder = enter_component(folder, subfolder, name)
    if folder.has("hf_quant_config.json"):
        return True
    if folder.has("config.json") and folder.is_local("config.json"):
        config = read_json(folder.path("config.json"))
        if find_config_block(config, f"{folder}/config.json")[0]:
            return True
    for weights in folder.top:
        if weights.endswith(".safetensors") and folder.is_local(weights):
            with suppress(CheckpointError):
                tensors = folder.header(weights)[0]
                if any(is_code(n, header.dtype) for n, header in tensors.items()):
                    return True
    return False


def is_code(name: str, dtype: str) -> bool:
    """Whether a tensor is codes of a layer, by its name or dtype."""
    return name.endswith((".qweight", ".comfy_quant")) or (
        name.endswith("weight") and dtype not in ("BF16", "F16", "F32", "F64")
    )


def read_config(
    name: str, request: Request, pipeline: PipelineFolder, checkpoint: Checkpoint
) -> tuple[Mapping[str, Any], str]:
    """(configuration of a text encoder, its file): beside the weights of a folder, else the base's.

    Raises CheckpointError where there is none.
    """
    if name in request.weights_paths or name not in request.component_paths:
        folder = pipeline.folder.enter(name)
    else:
        folder = enter_component(
            open_folder(request.component_paths[name], request.hub)[0], "", name
        )
    if not folder.has("config.json"):
        raise CheckpointError(
            f"{folder}: no config.json: expected that of {name}, whose weights are "
            f"{', '.join(checkpoint.files)}"
        )
    path = folder.path("config.json")
    config = read_json(path)
    return {key: value for key, value in config.items() if key != "quantization_config"}, str(path)


def check_kind(class_name: str, config: Mapping[str, Any], file: str) -> None:
    """CheckpointError where a configuration is of another kind of model than the class is."""
    wanted = getattr(getattr(find_model_class(class_name), "config_class", None), "model_type", "")
    stated = config.get("model_type")
    if not wanted or stated != wanted:
        raise CheckpointError(
            f"{file}: model_type is {quote(str(stated))}, a {class_name} is a {wanted}: expected "
            "the configuration of the text encoder that the base model names"
        )


def plan_encoders(
    request: Request, machine: Machine, found: Sources, warnings: list[str]
) -> dict[str, ComponentPlan]:
    """How each text encoder that is read here will be built; notes are added to `warnings`.

    Raises CheckpointError as `find_encoders` does, and for weights that do not fit the model;
    NoKernel where the machine has none for a layer.
    """
    sources = find_encoders(request, found)
    return {
        name: plan_encoder(name, source, found.model, request, machine, warnings)
        for name, source in sources.items()
    }


def plan_encoder(
    name: str,
    source: Source,
    model: str,
    request: Request,
    machine: Machine,
    warnings: list[str],
) -> ComponentPlan:
    """How one text encoder will be built, as `decide.plan_component` says it of a transformer."""

    def plan_reading(other: Checkpoint) -> ComponentPlan:
        tried = replace(request, witness="auto")
        return plan_encoder(name, replace(source, checkpoint=other), model, tried, machine, [])

    own = replace(request, nibble_order=None, nvfp4_layout=None)
    settled, layout = layout_choice.settle(source, own, plan_reading, warnings)
    checkpoint = settled.checkpoint
    family, why, schemes, _ = find_schemes(settled, model, request)
    base = find_named_base(name, settled, model, request) if schemes else Base()
    warnings += list_unproved(base, layout)
    warnings += list_doubts(checkpoint, family, schemes)
    shapes = measure_model(source.class_name, source.config, source.config_from)
    names = learn_names(checkpoint, source.class_name, source.config, source.config_from)
    schemes = drop_embeddings(schemes, family, names, shapes.linears)
    parts, plain = sort_layers(checkpoint, schemes, names, family)
    numbers = families.load(family).plain_codes(schemes.values()) if family else ()
    site = Site(
        checkpoint, names, shapes, source.class_name, source.config_from, family, False, numbers
    )
    placed = place(site, parts, plain)
    layers = choose_kernels(parts, model, request, machine, warnings)
    kept = sum(checkpoint.tensors[tensor.name].nbytes for tensor in placed)
    return ComponentPlan(
        name=name,
        class_name=source.class_name,
        config=source.config,
        config_from=source.config_from,
        checkpoint=checkpoint,
        family=family,
        why=why,
        online=False,
        dialect=names,
        layers=layers,
        plain=placed,
        numbers=numbers,
        ignored=ignored_names(checkpoint, family, names),
        total_layers=len(shapes.linears),
        model=model,
        layout=layout,
        base=base,
        bytes=kept + sum(piece.bytes for pieces in layers.values() for piece in pieces),
    )


def drop_embeddings(
    schemes: Mapping[str, Scheme],
    family: str | None,
    names: EncoderNames,
    linears: Iterable[str],
) -> dict[str, Scheme]:
    """Schemes without those of matrices that are no linear layer, where codes are the numbers."""
    if family is None or not families.load(family).plain_codes(schemes.values()):
        return dict(schemes)
    return {
        layer: scheme
        for layer, scheme in schemes.items()
        if any(target.module in linears for target in names.layer_targets(layer))
    }


def choose_kernels(
    parts: Mapping[str, list[Part]],
    model: str,
    request: Request,
    machine: Machine,
    warnings: list[str],
) -> dict[str, tuple[Piece, ...]]:
    """The pieces of each quantized module; `--backend` is left aside where an op does not have it."""
    ops = {part.scheme.op for own in parts.values() for part in own}
    lacking = [op for op in ops if request.backend not in (None, *kernels.backends_of(op))]
    if lacking:
        warnings.append(
            f"--backend {request.backend} is for transformers: {', '.join(sorted(lacking))} of a "
            "text encoder does not have it"
        )
        request = replace(request, backend=None)
    return kernel_choice.choose_kernels(parts, model, request, machine, warnings)


def find_named_base(name: str, source: Source, model: str, request: Request) -> Base:
    """The base model's own text encoder, its tensors by the names of the model's parameters."""
    found = find_base(name, source, model, request)
    weights = {}
    for key, checkpoint in found.weights.items():
        names = learn_names(checkpoint, source.class_name, source.config, source.config_from)
        tensors = {}
        for tensor, header in checkpoint.tensors.items():
            for target in names.tensor_targets(tensor) or ():
                tensors[target.module] = replace(
                    header, name=target.module, stored_name=header.on_disk
                )
        weights[key] = replace(checkpoint, tensors=tensors)
    return replace(found, weights=weights)
