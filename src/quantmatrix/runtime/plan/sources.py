"""Sources: which files each transformer component of a request comes from.

Precedence, best first: the weights override of the component, the component override, the base
model. The weights override replaces weights only, the component override replaces configuration
and weights. Nothing here looks at tensors, only at their headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from quantmatrix import families, models
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.declaration import parse_block
from quantmatrix.checkpoints.foreign import (
    SVDQUANT_PAIR,
    check_halves,
    explain_original,
    plain_class,
)
from quantmatrix.checkpoints.opening import (
    PipelineFolder,
    is_whole,
    open_compat,
    open_component,
    open_pipeline,
    open_weights,
    read_class,
    read_component_config,
)
from quantmatrix.errors import CheckpointError, UsageError
from quantmatrix.models import generic
from quantmatrix.quoting import quote, quote_json
from quantmatrix.request import Hub, Request
from quantmatrix.runtime.plan import experts, other_parts
from quantmatrix.runtime.plan.config_limits import check_config

COMPATIBLE_BASES = {"FLUX.2-dev-NVFP4": "black-forest-labs/FLUX.2-dev"}
"""Repositories that hold only weights and may stand in `--model-path`, with their real base."""

UNCOMPARED = ("quantization_config", "axes_lens", "rope_max_seq_len", "dtype", "torch_dtype")
"""Keys of a model's configuration that change none of its numbers; two are lengths of tables."""


@dataclass(frozen=True)
class Source:
    """Where one transformer component comes from."""

    checkpoint: Checkpoint
    class_name: str
    config: Mapping[str, Any]
    config_from: str
    primary: bool
    base: str = ""
    """The base model."""
    siblings: Mapping[str, str] = field(default_factory=dict)
    """Folder of each transformer component in the base model, by name."""


@dataclass(frozen=True)
class Sources:
    """Where everything comes from."""

    base: str
    model: str
    pipeline_class: str | None
    components: Mapping[str, Source]
    pipeline: PipelineFolder
    warnings: list[str] = field(default_factory=list)


def find_sources(request: Request) -> Sources:
    """Resolve a request to checkpoints, one source for each transformer component.

    Raises UsageError for flags that contradict each other or the base model, and CheckpointError
    for a checkpoint that cannot be opened or is of another model.
    """
    if request.tiny and request.hub == Hub():
        raise UsageError(
            f"--tiny: the stand-in of {request.model_path} was not opened; plan the request with "
            "quantmatrix.plan, or give it the hub of quantmatrix.tiny.hub.open_tiny_hub"
        )
    families.check_flags(request)
    base, weights = find_base(request)
    pipeline = open_pipeline(base, request.hub)
    model, warnings = find_model(request, pipeline)
    names = component_names(model, pipeline)
    check_overrides(request, pipeline, names)
    folders = {name: subfolder_of(name, pipeline) for name in names}
    components = {
        name: replace(
            find_source(name, request, pipeline, weights.get(name), primary=name == names[0]),
            base=base,
            siblings=folders,
        )
        for name in names
    }
    for name in names[1:]:
        if names[0] in weights and name not in weights:
            warnings.append(
                f"{name} keeps the base checkpoint; the override is for {names[0]} only"
            )
        if request.quantization:
            warnings.append(
                f"--quantization {request.quantization} is for {names[0]} only: {name} is loaded "
                "as it is stored"
            )
    for name, source in components.items():
        given = name in weights or name in request.component_paths
        files = source.checkpoint.files if given else ()
        if note := experts.warn_of_expert(name, files, names):
            warnings.append(note)
        warnings += [
            f"{file} holds a LoRA, which is not part of the weights: it is left out, and not applied"
            for file in source.checkpoint.left_out
        ]
    warnings += other_parts.list_warnings(pipeline, {*names, *request.component_paths})
    warnings += check_fit(request, model, components[names[0]].checkpoint)
    return Sources(base, model, pipeline.class_name, components, pipeline, warnings)


def find_base(request: Request) -> tuple[str, dict[str, str]]:
    """(base model, weights overrides), the compatibility use of `--model-path` resolved.

    There `--model-path` stands for the base and, unless a flag names another transformer, for its
    weights. A folder of that name that is a whole model, with a transformer of its own, is one.
    Raises UsageError without a model path.
    """
    if not request.model_path:
        raise UsageError("--model-path is missing: name the base model, a folder or a hub id")
    weights = dict(request.weights_paths)
    for marker, base in COMPATIBLE_BASES.items():
        if marker in request.model_path and not is_whole(request.model_path, request.hub):
            if "transformer" not in request.component_paths:
                weights.setdefault("transformer", f"compat:{request.model_path}")
            return base, weights
    return request.model_path, weights


def find_model(request: Request, pipeline: PipelineFolder) -> tuple[str, list[str]]:
    """(model id, warnings): by `--model-id`, else by the class the base model names.

    Raises UsageError where the two contradict each other, CheckpointError where neither is known.
    """
    warnings: list[str] = []
    if request.model_id:
        named, stated = (
            models.by_short_name(request.model_id),
            models.by_class(pipeline.class_name or ""),
        )
        if named and stated and named != stated:
            raise UsageError(
                f"--model-id {request.model_id}, but {pipeline.reference} is a {pipeline.class_name}: "
                f"expected {models.load(stated).NAME}, or a mirror of {models.load(named).NAME}"
            )
        if named:
            return named, warnings
        known = ", ".join(models.load(name).NAME for name in models.IDS)
        warnings.append(
            f"--model-id {request.model_id} is no known model ({known}); "
            "the model is taken from the base checkpoint instead"
        )
    found = models.by_class(pipeline.class_name or "")
    if found is None:
        found = find_generic(pipeline)
        warnings.append(generic.describe_use(found))
    return found, warnings


def find_generic(pipeline: PipelineFolder) -> str:
    """The id of a model whose pipeline no module describes, by the class of its transformer.

    Raises CheckpointError for a pipeline without a transformer that diffusers has.
    """
    class_name = pipeline.class_name or ""
    classes = [name for library, name in pipeline.components.values() if library == "diffusers"]
    for transformer in classes if pipeline.components else [class_name]:
        if found := models.by_transformer(class_name, transformer or ""):
            return found
    import diffusers

    known = ", ".join(models.load(name).PIPELINE for name in models.IDS)
    raise CheckpointError(
        f"{pipeline.reference}: {pipeline.class_name} is none of the base models ({known}), and no "
        f"other pipeline with a transformer that diffusers {diffusers.__version__} has; pass "
        "--model-id if this is a mirror of one of them"
        f"{explain_original([class_name])}"
    )


def component_names(model: str, pipeline: PipelineFolder) -> list[str]:
    """Transformer components that the base has, primary first; a bare folder is `transformer`.

    Raises CheckpointError for a pipeline without one.
    """
    if not pipeline.components:
        return ["transformer"]
    wanted = models.load(model).COMPONENTS
    names = [name for name in wanted if name in pipeline.components]
    if not names:
        raise CheckpointError(
            f"{pipeline.reference}: model_index.json names no {' or '.join(wanted)}, only "
            f"{', '.join(pipeline.components)}: expected the transformer of a "
            f"{models.load(model).NAME}; download the model again"
        )
    return names


def check_overrides(request: Request, pipeline: PipelineFolder, names: list[str]) -> None:
    """An override must name a component that the base model has, and weights a model of text or latents.

    Raises UsageError for any other.
    """
    known = set(pipeline.components) | set(names)
    weighted = {*names, *(n for n in pipeline.components if n.startswith("text_encoder"))}
    for suffix, overrides in (
        ("path", request.component_paths),
        ("weights-path", request.weights_paths),
    ):
        for name in overrides:
            if name not in known:
                raise UsageError(
                    f"--{name.replace('_', '-')}-{suffix}: {pipeline.reference} has no component "
                    f"{name}; it has {', '.join(sorted(known))}"
                )
    unknown = [name for name in request.weights_paths if name not in weighted]
    if unknown:
        raise UsageError(
            f"--{unknown[0].replace('_', '-')}-weights-path: only transformers and text encoders "
            f"take a weights override ({', '.join(sorted(weighted))})"
        )


def find_source(
    name: str, request: Request, pipeline: PipelineFolder, weights: str | None, *, primary: bool
) -> Source:
    """Where one component comes from, its class checked against the base's.

    Raises CheckpointError for a file or configuration that is missing, damaged or of another model.
    """
    override = request.component_paths.get(name)
    if weights and weights.startswith("compat:"):
        checkpoint = open_compat(weights.removeprefix("compat:"), request.hub)
    elif weights:
        checkpoint = open_weights(weights, request.hub)
    elif override:
        checkpoint = open_component(override, request.hub, name=name)
    else:
        checkpoint = open_component(pipeline.reference, request.hub, subfolder_of(name, pipeline))
    if override and not weights:
        config, config_from = checkpoint.config, checkpoint.config_file
        if config is None or config_from is None:
            raise CheckpointError(
                f"{override}: no config.json beside {', '.join(checkpoint.files)}; a component "
                f"folder has one. For weights alone use --{name.replace('_', '-')}-weights-path"
            )
    elif override:
        config, config_from = read_component_config(override, request.hub, name=name)
    else:
        config, config_from = read_component_config(
            pipeline.reference, request.hub, subfolder_of(name, pipeline)
        )
    check_halves(checkpoint)
    families.check(checkpoint)
    class_name = read_class(config, config_from) or ""
    config = {**config, "_class_name": class_name}
    check_class(name, class_name, config_from, pipeline, checkpoint)
    check_config(config, config_from, checkpoint)
    check_stated_config(class_name, config, config_from, checkpoint)
    return Source(checkpoint, class_name, config, config_from, primary)


def subfolder_of(name: str, pipeline: PipelineFolder) -> str:
    """Folder of a component inside the base; a bare component folder is its own."""
    return name if pipeline.components else ""


def check_class(
    name: str, class_name: str, config_from: str, pipeline: PipelineFolder, checkpoint: Checkpoint
) -> None:
    """The base model and the override's config must name one class.

    Raises CheckpointError where they do not.
    """
    expected = pipeline.components[name][1] if name in pipeline.components else class_name
    if class_name != expected:
        raise CheckpointError(
            f"{config_from}: this is a {class_name or 'component without _class_name'}, "
            f"{name} of {pipeline.reference} is a {expected}: wrong model for the checkpoint"
            f"{explain_original([class_name])}"
        )


def check_stated_config(
    class_name: str, config: Mapping[str, Any], config_from: str, checkpoint: Checkpoint
) -> None:
    """Weights that bring a configuration of the model must agree with the one that is used.

    It stands in the header, or beside an SVDQuant folder of two files. Numbers of heads or of
    positions shape no tensor, so that nothing else would tell of them. What one of the two leaves
    out, or leaves empty, is not compared, nor what changes no number. Raises CheckpointError where
    they disagree.
    """
    stated: Mapping[str, Any] = parse_block(checkpoint.metadata.get("config", ""))
    source = f"{checkpoint.files[0]}: the header's config"
    if not stated and sorted(PurePath(file).name for file in checkpoint.files) == SVDQUANT_PAIR:
        stated, source = checkpoint.config or {}, f"{checkpoint.config_file}: this config"
    named = plain_class(stated.get("_class_name"))
    if named and named != class_name:
        raise CheckpointError(
            f"{source} says these are weights of {quote(named)}, {config_from} says {class_name}: wrong "
            "model for the checkpoint"
        )
    for key, value in stated.items():
        here = config.get(key)
        same = value is None or here is None or value == here
        if same or key.startswith("_") or key in UNCOMPARED:
            continue
        raise CheckpointError(
            f"{source} says {key} {quote_json(value, 120)}, {config_from} says "
            f"{quote_json(here, 120)}: these are weights of another model, or of another size; "
            "name the base model that they were made from"
        )


def check_fit(request: Request, model: str, checkpoint: Checkpoint) -> list[str]:
    """Flags of a family and the file name against what the primary's file holds; returns warnings."""
    module = models.load(model)
    defaults = module.TINY_DEFAULTS if request.tiny else module.DEFAULTS
    steps = request.num_inference_steps or defaults.steps
    return families.check_fit(replace(request, num_inference_steps=steps), checkpoint)
