"""Planning: everything about a run decided once, from headers and JSON, before any tensor is read.

For each transformer component the plan says where its configuration and its weights come from,
which family they are of and why, how every linear layer is stored (its scheme), where in the file
it lies (its pieces) and which kernel will compute it on the machine at hand, or on any machine of
the tables. What cannot run ends in a `Refusal` that names its rule; what is wrong with the input
raises. Nothing is decided later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from quantmatrix import (
    export_faults,
    families,
    kernels,
    layout_choice,
    models,
    pipeline_parts,
    sharing,
)
from quantmatrix.checkpoint import Checkpoint
from quantmatrix.choosing import choose
from quantmatrix.dialects import choose_dialect
from quantmatrix.empty_model import measure_model
from quantmatrix.errors import CheckpointError, RefusedError, UsageError
from quantmatrix.families.fp8_declaration import FUSED
from quantmatrix.hardware import Machine
from quantmatrix.models import Dialect, Target
from quantmatrix.placement import (
    Part,
    PlainTensor,
    Site,
    count_plain_linears,
    ignored_names,
    place,
    sort_layers,
)
from quantmatrix.request import Request
from quantmatrix.scheme import Scheme
from quantmatrix.sources import Source, Sources, find_sources, use_tiny
from quantmatrix.unknown_quantization import explain_unknown
from quantmatrix.witness_base import Base, find_base, list_unproved

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
FP4_BACKEND = "SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND"


PATCH, FRAMES = 16, 4
"""Pixels of a side, and frames after the first, that one patch of latents stands for."""
TEXT_ROWS = 512
"""Tokens of text that the models take at most."""


@dataclass(frozen=True)
class Piece:
    """One layer on disk that serves a module, and the kernel that will compute it."""

    layer: str
    target: Target
    scheme: Scheme
    out_features: int
    in_features: int
    backend: str
    numerics: str
    bytes: int


@dataclass(frozen=True)
class ComponentPlan:
    """How one transformer component will be built."""

    name: str
    class_name: str
    config: Mapping[str, Any]
    config_from: str
    checkpoint: Checkpoint
    family: str | None
    why: str
    online: bool
    """Quantized while loading, from full-precision weights."""
    dialect: Dialect
    layers: Mapping[str, tuple[Piece, ...]]
    """Quantized modules, by diffusers name."""
    plain: tuple[PlainTensor, ...]
    """Tensors that are stored plainly, and where they go."""
    ignored: Mapping[str, str]
    """Tensors that are left aside, each with the family's reason."""
    total_layers: int
    bytes: int
    """Bytes of weights that stay in memory."""
    model: str = ""
    layout: str = ""
    """What the layout of the codes rests on, where it could be another."""
    base: Base = field(default_factory=Base)
    """Weights of the base model that decoded layers are compared with."""

    @property
    def backends(self) -> dict[str, int]:
        """Layers per backend."""
        return dict(Counter(piece.backend for piece in self.pieces()))

    @property
    def precision(self) -> str | None:
        """The checkpoint's own words for its schemes, most frequent first."""
        words = Counter(piece.scheme.name for piece in self.pieces())
        return " + ".join(word for word, _ in words.most_common()) or None

    @property
    def rank(self) -> int | None:
        """Largest low-rank branch, if there is one."""
        return max((piece.scheme.rank for piece in self.pieces()), default=0) or None

    def pieces(self) -> Iterator[Piece]:
        """Every piece of every quantized module."""
        for pieces in self.layers.values():
            yield from pieces

    def to_json(self) -> dict[str, Any]:
        """The component as plain data."""
        return {
            "class": self.class_name,
            "family": self.family,
            "why": self.why,
            "online": self.online,
            "files": list(self.checkpoint.files),
            "reference": self.checkpoint.reference,
            "config_from": self.config_from,
            "dialect": self.dialect.name,
            "precision": self.precision,
            "rank": self.rank,
            "quantized_layers": len(self.layers),
            "total_layers": self.total_layers,
            "backends": self.backends,
            "numerics": dict(Counter(piece.numerics for piece in self.pieces())),
            "layout": self.layout or None,
            "base_weights": self.base.reference or None,
            "bytes": self.bytes,
        }


@dataclass(frozen=True)
class Plan:
    """A run that can be made."""

    request: Request
    model: str
    machine: Machine
    base: str
    """Where every component without an override comes from."""
    pipeline_class: str | None
    components: Mapping[str, ComponentPlan]
    layerwise_offload: bool
    cpu_offload: bool
    processes: int = 1
    """Processes that share each generation, on a device each."""
    warnings: tuple[str, ...] = ()
    ok: bool = field(default=True, init=False)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, the form that `plan --json` prints and evidence keeps."""
        return {
            "ok": True,
            "refusal": None,
            "model": self.model,
            "base": self.base,
            "machine": {
                "name": self.machine.name,
                "vendor": self.machine.vendor,
                "arch": self.machine.arch,
            },
            "dtype": self.request.dtype,
            "offload": {"layerwise": self.layerwise_offload, "cpu": self.cpu_offload},
            "processes": self.processes,
            "bytes": sum(c.bytes for c in self.components.values()),
            "warnings": list(self.warnings),
            "components": {name: c.to_json() for name, c in self.components.items()},
        }


@dataclass(frozen=True)
class Refusal:
    """A run that cannot be made here: the rule that forbids it, and what would work instead."""

    rule: str
    message: str
    ok: bool = field(default=False, init=False)

    def to_json(self) -> dict[str, Any]:
        """The refusal as plain data."""
        return {
            "ok": False,
            "refusal": {"rule": self.rule, "message": self.message},
            "components": {},
        }


def plan(request: Request | None = None, /, **fields: Any) -> Plan | Refusal:
    """Decide how a request will run, or why it cannot. Keyword arguments are Request's fields.

    Raises CheckpointError and UsageError for what is wrong with the input, whichever part of the
    pipeline it is in.
    """
    request = use_tiny(request if request is not None else Request(**fields))
    found = find_sources(request)
    made = decide(request, found)
    pipeline_parts.check_rest(
        found.pipeline, found.components, request.component_paths, request.hub
    )
    return made


def plan_transformers(request: Request) -> Plan | Refusal:
    """The plan for the transformers alone: the rest of the pipeline need not be there."""
    request = use_tiny(request)
    return decide(request, find_sources(request))


def decide(request: Request, found: Sources) -> Plan | Refusal:
    """How a request with these sources will run, or why it cannot."""
    machine = find_machine(request)
    warnings = list(found.warnings)
    components: dict[str, ComponentPlan] = {}
    for name, source in found.components.items():
        try:
            components[name] = plan_component(name, source, found.model, request, machine, warnings)
        except kernels.NoKernel as error:
            return Refusal(error.rule, f"{source.checkpoint.reference}: {error.message}")
    primary = next(iter(components.values()))
    check_memory(components, machine, warnings)
    if request.backend is not None and not any(part.layers for part in components.values()):
        warnings.append(f"--backend {request.backend} is not used: no layer is quantized")
    layerwise, cpu = decide_offload(request, primary.family, warnings)
    made = Plan(
        request=request,
        model=found.model,
        machine=machine,
        base=found.base,
        pipeline_class=found.pipeline_class,
        components=components,
        layerwise_offload=layerwise,
        cpu_offload=cpu,
        warnings=tuple(warnings),
    )
    try:
        return sharing.share(made)
    except RefusedError as error:
        return Refusal(error.rule, str(error))


def find_machine(request: Request) -> Machine:
    """The machine of `--hardware`, or the one we stand on."""
    from quantmatrix import hardware, matrix

    if request.hardware is None:
        return hardware.probe(request.device)
    rows = matrix.read().hardware
    if request.hardware not in rows:
        raise UsageError(f"--hardware {request.hardware}: no such row; known: {', '.join(rows)}")
    return hardware.from_row(rows[request.hardware])


def plan_component(
    name: str,
    source: Source,
    model: str,
    request: Request,
    machine: Machine,
    warnings: list[str],
) -> ComponentPlan:
    """Plan one transformer component; raises NoKernel when a layer has none."""

    def plan_reading(other: Checkpoint) -> ComponentPlan:
        tried = replace(source, checkpoint=other)
        return plan_component(name, tried, model, replace(request, witness="auto"), machine, [])

    settled, layout = layout_choice.settle(source, request, plan_reading, warnings)
    checkpoint = settled.checkpoint
    family, why, schemes, online = find_schemes(settled, model, request)
    base = Base() if online or family is None else find_base(name, settled, model, request)
    warnings += list_unproved(base, layout)
    warnings += list_doubts(checkpoint, family, schemes)
    dialect = choose_dialect(checkpoint, model, family, schemes)
    parts, plain = sort_layers(checkpoint, schemes, dialect, family, online=online)
    total = len(parts) + count_plain_linears(checkpoint, plain, dialect)
    if not total:
        raise CheckpointError(
            f"{checkpoint.reference}: no linear layer in it, found the tensors "
            f"{', '.join(sorted(checkpoint.tensors)[:4]) or 'none'}; expected the weights of "
            f"{name}, a {source.class_name}"
        )
    shapes = measure_model(source.class_name, source.config, source.config_from)
    site = Site(checkpoint, dialect, shapes, source.class_name, source.config_from, online)
    placed = place(site, parts, plain)
    layers = choose_kernels(parts, model, request, machine, warnings)
    kept = sum(checkpoint.tensors[n].nbytes for n in plain)
    return ComponentPlan(
        name=name,
        class_name=source.class_name,
        config=source.config,
        config_from=source.config_from,
        checkpoint=checkpoint,
        family=family,
        why=why,
        online=online,
        dialect=dialect,
        layers=layers,
        plain=placed,
        ignored=ignored_names(checkpoint, family),
        total_layers=total,
        model=model,
        layout=layout,
        base=base,
        bytes=kept + sum(piece.bytes for pieces in layers.values() for piece in pieces),
    )


def list_doubts(
    checkpoint: Checkpoint, family: str | None, schemes: Mapping[str, Scheme]
) -> list[str]:
    """Warnings about a checkpoint that is taken: what its files leave open, or hold besides."""
    found = []
    if family and (note := families.find_caveat(family, checkpoint)):
        found.append(note)
    if checkpoint.aside:
        parts = ", ".join(f"{count} of {part}*" for part, count in checkpoint.aside.items())
        found.append(
            f"{checkpoint.reference} is a whole checkpoint: of its tensors those of the transformer "
            f"({checkpoint.prefix}*) are used, {parts} are left aside; the base model's own "
            "components take their place"
        )
    return found + export_faults.list_doubts(checkpoint, schemes)


def choose_kernels(
    parts: Mapping[str, Sequence[Part]],
    model: str,
    request: Request,
    machine: Machine,
    warnings: list[str],
) -> dict[str, tuple[Piece, ...]]:
    """The pieces of each quantized module in the order of their columns, each with its kernel."""
    item = ITEM_BYTES[request.dtype]
    wanted, rows = wanted_backend(request, warnings), count_rows(model, request)
    layers: dict[str, tuple[Piece, ...]] = {}
    for module, own in parts.items():
        chosen = []
        for part in sorted(own, key=lambda part: part.target.columns):
            scheme, out, into = part.scheme, part.out_features, part.in_features
            kernel = choose_kernel(scheme, machine, (out, into), rows, request, wanted, warnings)
            size = kernel.footprint(scheme, out, into, item)
            numerics = name_numerics(kernel, scheme)
            chosen.append(
                Piece(part.layer, part.target, scheme, out, into, kernel.backend, numerics, size)
            )
        layers[module] = tuple(chosen)
    return layers


def wanted_backend(request: Request, warnings: list[str]) -> str | None:
    """The NVFP4 backend that the environment variable of the guide asks for, by our name.

    A value that it does not have is a warning, and the order of the architecture decides.
    """
    value = request.fp4_gemm_backend
    if not value:
        return None
    from quantmatrix.kernels.linear_nvfp4 import backend_alias

    try:
        return backend_alias(value)
    except KeyError as error:
        note = f"{FP4_BACKEND}={value} is not used: {error.args[0]}"
        if note not in warnings:
            warnings.append(note)
        return None


def choose_kernel(
    scheme: Scheme,
    machine: Machine,
    shape: tuple[int, int],
    rows: int,
    request: Request,
    wanted: str | None,
    warnings: list[str],
) -> kernels.Kernel:
    """The kernel of a layer: `--backend` alone, else what was wished for NVFP4, else the order.

    `rows` is the most rows that an input will have. A wish that this machine or shape cannot meet is a
    warning, and the order decides; so is a kernel that is passed over for the number of rows alone,
    or because the machine computes it wrongly.
    """
    if request.backend is None and wanted and scheme.op == "linear.nvfp4":
        try:
            return kernels.choose(scheme.op, machine, scheme, shape, wanted, rows)
        except kernels.NoKernel as error:
            note = f"{FP4_BACKEND}={request.fp4_gemm_backend} is not used: {error.message}"
            if not any(text.startswith(f"{FP4_BACKEND}=") for text in warnings):
                warnings.append(note)
    chosen = choose(scheme.op, machine, scheme, shape, request.backend, rows, warnings)
    first = choose(scheme.op, machine, scheme, shape, request.backend)
    if first is not chosen:
        why = first.needs.why_not(machine, scheme, shape, rows)
        note = f"{scheme.op}: {first.backend} {why}; {chosen.backend} is used"
        if note not in warnings:
            warnings.append(note)
    return chosen


def count_rows(model: str, request: Request) -> int:
    """Most rows of a linear layer's input: latent patches of the request's size, and text."""
    module = models.load(model)
    defaults = module.TINY_DEFAULTS if request.tiny else module.DEFAULTS
    height, width = request.height or defaults.height, request.width or defaults.width
    frames = request.num_frames or defaults.frames or 1
    patches = (height // PATCH) * (width // PATCH) * (1 + (frames - 1) // FRAMES)
    return patches + TEXT_ROWS


def name_numerics(kernel: kernels.Kernel, scheme: Scheme) -> str:
    """The kernel's class of arithmetic; integer kernels serve 4-bit codes as they serve 8-bit ones."""
    if scheme.op == "linear.int8" and scheme.weight == "int4":
        return {"W8A8": "W4A4", "W8A16": "W4A16"}.get(kernel.numerics, kernel.numerics)
    return kernel.numerics


def find_schemes(
    source: Source, model: str, request: Request
) -> tuple[str | None, str, dict[str, Scheme], bool]:
    """(family, why, scheme of each quantized layer on disk, whether it is made while loading)."""
    checkpoint = source.checkpoint
    if unknown := explain_unknown(checkpoint):
        raise CheckpointError(unknown)
    detected = families.detect(checkpoint)
    if detected:
        if request.quantization and source.primary:
            raise UsageError(
                f"--quantization {request.quantization} asks to quantize, but "
                f"{checkpoint.reference} is quantized already ({detected[1]}): leave the flag out"
            )
        family, why = detected
        export_faults.check_export(checkpoint)
        schemes = families.load(family).schemes(checkpoint)
        if not schemes:
            raise CheckpointError(
                f"{checkpoint.reference}: declared as {family} ({why}), but no layer in "
                f"{', '.join(checkpoint.files)} is quantized"
            )
        return family, why, schemes, False
    if request.quantization and source.primary:
        schemes = online_schemes(checkpoint, model, request)
        return request.quantization, f"--quantization {request.quantization}", schemes, True
    return None, "nothing in it is quantized", {}, False


def online_schemes(checkpoint: Checkpoint, model: str, request: Request) -> dict[str, Scheme]:
    """Schemes of `--quantization fp8`: every linear layer of the blocks that is not ignored."""
    if request.quantization != "fp8":
        raise UsageError(
            f"--quantization {request.quantization}: only fp8 can be made while loading"
        )
    scheme = families.load("fp8").SCHEMES["tensor-dynamic"]
    blocks, dialect = models.load(model).BLOCKS, models.dialect_of(model, checkpoint.tensors)
    ignored = request.quantization_ignored_layers
    hits: Counter[str] = Counter()
    schemes: dict[str, Scheme] = {}
    for name, header in checkpoint.tensors.items():
        layer, _, leaf = name.rpartition(".")
        modules = [target.module for target in dialect.layer_targets(layer)]
        matching = [p for p in ignored if is_part_of_path(p, (layer, *modules))]
        hits.update(matching)
        inside = any(module.split(".")[0] in blocks for module in modules)
        if leaf == "weight" and len(header.shape) == 2 and inside and not matching:
            schemes[layer] = scheme
    unmatched = [pattern for pattern in ignored if not hits[pattern]]
    if unmatched:
        raise UsageError(
            f"--quantization-ignored-layers {' '.join(unmatched)}: matches no linear layer "
            f"of {checkpoint.reference}, nor any other; one is named like "
            f"{next(iter(schemes), 'to_q')}: expected such a name, dotted parts of it, or a "
            "pattern with *"
        )
    if not schemes:
        raise UsageError(
            f"--quantization fp8: no linear layer of {checkpoint.reference} is left to quantize: "
            f"expected some in {', '.join(blocks)} that --quantization-ignored-layers leaves over"
        )
    return schemes


def is_part_of_path(pattern: str, paths: Iterable[str]) -> bool:
    """Whether a name from --quantization-ignored-layers is a path, or dotted parts of one.

    A level above a layer is a part of its path (`transformer_blocks.0`), as are those in the middle
    (`attn.to_k`); `*` stands for any characters, as in a shell. The last part may be the name under
    which runtimes fuse projections (`to_qkv`).
    """
    above, dot, last = pattern.rstrip(".").rpartition(".")
    parts = [f"*.{above}{dot}{name}.*" for name in FUSED.get(last, (last,))]
    return any(fnmatchcase(f".{path}.", part) for path in paths for part in parts)


def decide_offload(request: Request, family: str | None, warnings: list[str]) -> tuple[bool, bool]:
    """(layerwise, whole component): the guide's rules for the two offload flags."""
    layerwise = bool(request.dit_layerwise_offload)
    whole = bool(request.dit_cpu_offload)
    if whole and family == "modelopt-fp8":
        warnings.append(
            "--dit-cpu-offload stays disabled for modelopt-fp8 checkpoints; "
            "--dit-layerwise-offload is supported"
        )
        whole = False
    if whole and layerwise:
        warnings.append("--dit-layerwise-offload wins over --dit-cpu-offload")
        whole = False
    return layerwise, whole


def check_memory(
    components: Mapping[str, ComponentPlan], machine: Machine, warnings: list[str]
) -> None:
    """Warn when the weights alone do not fit."""
    need = sum(component.bytes for component in components.values())
    if machine.memory_bytes and need > machine.memory_bytes:
        warnings.append(
            f"the transformer weights need {need / 2**30:.1f} GiB, {machine.name} has "
            f"{machine.memory_bytes / 2**30:.1f} GiB: try --dit-layerwise-offload"
        )
