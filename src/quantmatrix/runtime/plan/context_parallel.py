"""Sharing: whether several devices can work on one generation, decided from the plan alone.

diffusers' context parallelism gives each process a share of the tokens, and around every attention
exchanges heads for tokens (Ulysses). So it needs a model that diffusers knows how to split, and the whole
transformer on each device. Where the number of processes does not divide the heads, the last has fewer,
and the plan says how many each has. Where that would leave the last none, heads are exchanged in smaller
groups, and each process gathers the keys and values of all groups (ring), which sends more: a ring of P
processes alone P/2 times as much. A tiny stand-in has fewer heads than its model;
its plan says so and takes as many processes as divide them, so that it goes the way of its model.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from quantmatrix.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from quantmatrix.runtime.plan.types import ComponentPlan, Plan

RULE = "context-parallel-plan"


def share(plan: Plan) -> Plan:
    """The plan with its number of processes; UsageError or RefusedError when they cannot share it."""
    count = plan.request.nproc_per_node
    if plan.request.shard_weights:
        check_sharding(plan, count)
    if count == 1:
        return plan
    flag = f"--nproc-per-node {count}"
    check_devices(plan, count, flag)
    if plan.layerwise_offload or plan.cpu_offload:
        raise UsageError(f"{flag} needs the transformer on its device: leave out the offload")
    for name, component in plan.components.items():
        require_plan(plan.model, name, component.class_name)
    heads = {name: count_heads(part) for name, part in plan.components.items()}
    gathering = any(choose_degrees(found, count)[1] > 1 for found in heads.values())
    fewer = math.gcd(count, *heads.values())
    if plan.request.tiny and gathering and all(heads.values()) and fewer > 1:
        return fit_stand_in(plan, fewer, flag)
    return replace(plan, processes=count, warnings=(*plan.warnings, *say_uneven(heads, count)))


def count_heads(component: ComponentPlan) -> int:
    """Attention heads of a transformer; 0 where its configuration does not say."""
    return int(component.config.get("num_attention_heads", 0))


def choose_degrees(heads: int, processes: int) -> tuple[int, int]:
    """Degrees of Ulysses and ring, whose product is the number of processes.

    As many as possible exchange heads, since a ring sends more: the largest part of the processes in
    which each has a head.
    """
    parts = (few for few in range(processes, 1, -1) if processes % few == 0)
    ulysses = next((few for few in parts if split_heads(heads, few)[-1] > 0), 1)
    return ulysses, processes // ulysses


def name_degrees(ulysses: int, ring: int) -> str:
    """Degrees in words."""
    if ring == 1:
        return "Ulysses"
    return f"Ulysses {ulysses} x ring {ring}" if ulysses > 1 else "ring"


def split_heads(heads: int, processes: int) -> list[int]:
    """Heads of each process, as diffusers parts them: as many for each but the last, which has the rest.

    The last number is 0 or less where there are too few heads for so many processes.
    """
    most = -(-heads // processes)
    return [most] * (processes - 1) + [heads - most * (processes - 1)]


def say_uneven(heads: Mapping[str, int], count: int) -> Iterator[str]:
    """How the heads of each component are shared where the processes do not get equally many."""
    for name, found in heads.items():
        ulysses, ring = choose_degrees(found, count)
        if ring > 1:
            yield (
                f"{name}: its {found} attention heads leave none for the last of {count} processes, so keys "
                f"and values of all tokens are gathered ({name_degrees(ulysses, ring)}), which sends more"
                f"{advise_count(found, count)}"
            )
        if found % ulysses:
            shares = split_heads(found, ulysses)
            yield (
                f"{name}: its {found} attention heads are shared as {', '.join(map(str, shares))}: "
                f"a step takes as long as the {shares[0]} of the first process"
            )


def advise_count(heads: int, count: int) -> str:
    """The next smaller number of processes that have a head each, as words; empty without one."""
    fits = [few for few in range(2, count) if split_heads(heads, few)[-1] > 0]
    return f" than --nproc-per-node {fits[-1]}, which exchanges heads alone" if fits else ""


def check_sharding(plan: Plan, count: int) -> None:
    """UsageError for `--shard-weights` with one process, or with compiled blocks."""
    if count == 1:
        raise UsageError("--shard-weights needs several devices: give --nproc-per-node 2 or more")
    if plan.request.compile:
        raise UsageError(
            "--shard-weights gathers each block's weights before it runs, which compiled blocks "
            "cannot wait for: leave out --compile (--cuda-graph goes with it)"
        )


def check_devices(plan: Plan, count: int, flag: str) -> None:
    """UsageError for a number of processes that the machine of a plan has no devices for."""
    machine = plan.machine
    kind, colon, _ = machine.device.partition(":")
    if count < 1:
        raise UsageError(f"{flag}: expected 1 or more")
    if colon:
        raise UsageError(f"{flag} takes the first devices: give --device {kind} without a number")
    if kind != "cpu" and machine.count < count:
        raise UsageError(f"{flag}: {machine.name} has {machine.count} {kind} devices")


def fit_stand_in(plan: Plan, processes: int, flag: str) -> Plan:
    """The plan of a tiny stand-in, with as many processes as its heads allow."""
    note = f"{flag}: {processes} processes share the heads of the tiny stand-in"
    return replace(plan, processes=processes, warnings=(*plan.warnings, note))


def require_plan(model: str, component: str, class_name: str) -> None:
    """RefusedError for a transformer that diffusers cannot split."""
    import diffusers

    if getattr(getattr(diffusers, class_name), "_cp_plan", None) is None:
        raise RefusedError(
            RULE,
            f"{model}: {component} is a {class_name}, for which diffusers {diffusers.__version__} "
            "has no context-parallel plan: leave out --nproc-per-node",
        )
