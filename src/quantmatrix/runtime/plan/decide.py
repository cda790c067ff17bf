"""Planning: everything about a run decided once, from headers and JSON, before any tensor is read.

A request comes with the hub that its references lie in and with the machine that it is for: no table
is read here, and no stand-in is made (`quantmatrix.api` does both).

For each transformer component the plan says where its configuration and its weights come from,
which family they are of and why, how every linear layer is stored (its scheme), where in the file
it lies (its pieces) and which kernel will compute it on the machine at hand, or on any machine of
the tables. What cannot run ends in a `Refusal` that names its rule; what is wrong with the input
raises. Nothing is decided later.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from quantmatrix import families, kernels
from quantmatrix.checkpoints.checkpoint import Checkpoint
from quantmatrix.checkpoints.folders import open_once
from quantmatrix.errors import CheckpointError, RefusedError
from quantmatrix.runtime.empty_model import measure_model
from quantmatrix.runtime.pictures import list_pictures
from quantmatrix.runtime.plan import context_parallel, encoders, layout_choice, other_parts
from quantmatrix.runtime.plan.adapters import list_adapters
from quantmatrix.runtime.plan.dialects import choose_dialect
from quantmatrix.runtime.plan.kernel_choice import choose_kernels
from quantmatrix.runtime.plan.placement import (
    Site,
    count_plain_linears,
    ignored_names,
    list_names,
    place,
    sort_layers,
)
from quantmatrix.runtime.plan.schemes import find_schemes, list_doubts
from quantmatrix.runtime.plan.sources import Source, Sources, find_sources
from quantmatrix.runtime.plan.types import ComponentPlan, Plan, Refusal
from quantmatrix.runtime.witness.base import Base, find_base, list_unproved

if TYPE_CHECKING:
    from quantmatrix.hardware.machine import Machine
    from quantmatrix.request import Request

logger = logging.getLogger(__name__)


def plan(request: Request, machine: Machine) -> Plan | Refusal:
    """Decide how a request will run on a machine, or why it cannot.

    Raises CheckpointError and UsageError for what is wrong with the input, whichever part of the
    pipeline it is in.
    """
    with open_once():
        found = find_sources(request)
        decided = add_encoders(decide(request, machine, found), found)
        own = decided.encoders if isinstance(decided, Plan) else {}
        other_parts.check_rest(
            found.pipeline, {*found.components, *own}, request.component_paths, request.hub
        )
    return decided


def add_encoders(decided: Plan | Refusal, found: Sources) -> Plan | Refusal:
    """A plan with the text encoders that are quantized, or a refusal for want of a kernel for one.

    Raises CheckpointError for one that cannot be used.
    """
    if isinstance(decided, Refusal):
        return decided
    warnings = list(decided.warnings)
    try:
        own = encoders.plan_encoders(decided.request, decided.machine, found, warnings)
    except kernels.NoKernel as error:
        return Refusal(error.rule, f"a text encoder of {decided.base}: {error.message}")
    return replace(decided, encoders=own, warnings=tuple(warnings)) if own else decided


def plan_transformers(request: Request, machine: Machine) -> Plan | Refusal:
    """The plan for the transformers alone: the rest of the pipeline need not be there.

    Raises CheckpointError and UsageError as `plan` does.
    """
    with open_once():
        return decide(request, machine, find_sources(request))


def decide(request: Request, machine: Machine, found: Sources) -> Plan | Refusal:
    """How a request with these sources will run on a machine, or why it cannot.

    Raises CheckpointError for a component that is not what it claims to be, and UsageError for
    flags that do not fit it.
    """
    warnings = list(found.warnings)
    components: dict[str, ComponentPlan] = {}
    for name, source in found.components.items():
        try:
            components[name] = plan_component(name, source, found.model, request, machine, warnings)
        except kernels.NoKernel as error:
            return Refusal(error.rule, f"{source.checkpoint.reference}: {error.message}")
        logger.debug(
            "planned %s of %s: %s is family %s (%s), %d quantized linear layers",
            name, found.model, source.checkpoint.reference, components[name].family,
            components[name].why, len(components[name].layers),
        )  # fmt: skip
    primary = next(iter(components.values()))
    check_memory(components, request, machine, warnings)
    list_adapters(request)  # one that is not there is an error before the loading
    if request.backend is not None and not any(part.layers for part in components.values()):
        warnings.append(f"--backend {request.backend} is not used: no layer is quantized")
    layerwise, cpu = decide_offload(request, primary.family, warnings)
    planned = Plan(
        request=request,
        model=found.model,
        machine=machine,
        base=found.base,
        pipeline_class=found.pipeline_class,
        components=components,
        layerwise_offload=layerwise,
        cpu_offload=cpu,
        warnings=tuple(warnings),
        pictures=list_pictures(request, found.pipeline_class or ""),
    )
    try:
        return context_parallel.share(planned)
    except RefusedError as error:
        return Refusal(error.rule, str(error))


def plan_component(
    name: str,
    source: Source,
    model: str,
    request: Request,
    machine: Machine,
    warnings: list[str],
) -> ComponentPlan:
    """Plan one transformer component; what the user should know of it is added to `warnings`.

    Raises NoKernel when a layer has none, CheckpointError (WitnessError where readings must be
    distinguished) for a checkpoint that cannot be used, and UsageError for flags that do not fit
    it.
    """

    def plan_reading(other: Checkpoint) -> ComponentPlan:
        tried = replace(source, checkpoint=other)
        return plan_component(name, tried, model, replace(request, witness="auto"), machine, [])

    settled, layout = layout_choice.settle(source, request, plan_reading, warnings)
    checkpoint = settled.checkpoint
    family, why, schemes, online = find_schemes(settled, model, request)
    base = Base() if online or family is None else find_base(name, settled, model, request)
    warnings += list_unproved(base, layout)
    warnings += list_doubts(checkpoint, None if online else family, schemes)
    shapes = measure_model(source.class_name, source.config, source.config_from)
    names = list_names(checkpoint, schemes, family, online=online)
    dialect = choose_dialect(settled, model, family, schemes, names)
    parts, plain = sort_layers(checkpoint, schemes, dialect, family, online=online)
    total = len(parts) + count_plain_linears(checkpoint, plain, dialect)
    if not total:
        raise CheckpointError(
            f"{checkpoint.reference}: no linear layer in it, found the tensors "
            f"{', '.join(sorted(checkpoint.tensors)[:4]) or 'none'}; expected the weights of "
            f"{name}, a {source.class_name}"
        )
    numbers = families.load(family).plain_codes(schemes.values()) if family else ()
    site = Site(
        checkpoint, dialect, shapes, source.class_name, source.config_from, family, online, numbers
    )
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
        numbers=numbers,
        ignored=ignored_names(checkpoint, family, dialect),
        total_layers=total,
        model=model,
        layout=layout,
        base=base,
        bytes=kept + sum(piece.bytes for pieces in layers.values() for piece in pieces),
    )


def decide_offload(request: Request, family: str | None, warnings: list[str]) -> tuple[bool, bool]:
    """(layerwise, whole component): the guide's rules for the two offload flags."""
    layerwise = bool(request.dit_layerwise_offload)
    whole = bool(request.dit_cpu_offload)
    if whole and family and not families.load(family).CPU_OFFLOAD:
        warnings.append(
            f"--dit-cpu-offload stays disabled for {family} checkpoints; "
            "--dit-layerwise-offload is supported"
        )
        whole = False
    if whole and layerwise:
        warnings.append("--dit-layerwise-offload wins over --dit-cpu-offload")
        whole = False
    return layerwise, whole


def check_memory(
    components: Mapping[str, ComponentPlan],
    request: Request,
    machine: Machine,
    warnings: list[str],
) -> None:
    """Warn when the weights alone, or a device's share of them, do not fit."""
    shares = request.nproc_per_node if request.shard_weights else 1
    need = sum(component.bytes for component in components.values()) / shares
    if machine.memory_bytes and need > machine.memory_bytes:
        several = machine.count > 1 and shares == 1
        shard = f", or --nproc-per-node {machine.count} --shard-weights" if several else ""
        whose = (
            f"1/{shares} of the transformer weights needs"
            if shares > 1
            else ("the transformer weights need")
        )
        warnings.append(
            f"{whose} {need / 2**30:.1f} GiB, {machine.name} has "
            f"{machine.memory_bytes / 2**30:.1f} GiB: try --dit-layerwise-offload{shard}"
        )
