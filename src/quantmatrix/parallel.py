"""Parallel: one generation on several devices of a machine (`--nproc-per-node 4`).

torchrun starts one process per device. Each holds the whole quantized transformer and works on its
share of the tokens; diffusers' context parallelism (Ulysses) exchanges heads for tokens around every
attention. The layers see fewer rows and compute each row as before, so the latents are those of one
process, within the rounding of the compute dtype. Only the first process writes and prints.

diffusers 0.42.1 divides by the number of accelerators, which is 0 on a CPU; `count_processor` gives
it 1 there, and everything else works over gloo.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import distributed

from quantmatrix import hardware
from quantmatrix.errors import RefusedError, UsageError
from quantmatrix.library_logs import quiet
from quantmatrix.pipeline import build_pipeline
from quantmatrix.planning import Plan, Refusal, plan
from quantmatrix.request import Request

RULE = "context-parallel-plan"
TRANSPORTS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
"""How processes talk, by torch's name of their device."""


def is_worker() -> bool:
    """Whether torchrun has started this process."""
    return bool(distributed.is_torchelastic_launched())


def launch(request: Request, count: int, words: Sequence[str]) -> int:
    """Run a quantmatrix command in `count` processes, after what can be checked; its exit code."""
    check(find_plan(request), count)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", str(count), "-m", "quantmatrix", *words]
    return subprocess.run(command, check=False).returncode


def find_plan(request: Request) -> Plan:
    """The plan of a request; RefusedError when there is none."""
    made = plan(request)
    if isinstance(made, Refusal):
        raise RefusedError(made.rule, made.message)
    return made


def check(made: Plan, count: int) -> None:
    """Raise UsageError or RefusedError for a plan that `count` processes cannot share."""
    flag = f"--nproc-per-node {count}"
    kind = made.machine.device.partition(":")[0]
    if count < 1:
        raise UsageError(f"{flag}: expected 1 or more")
    if ":" in made.machine.device:
        raise UsageError(f"{flag} takes the first devices: give --device {kind} without a number")
    if kind != "cpu" and hardware.count_devices(kind) < count:
        raise UsageError(f"{flag}: {hardware.count_devices(kind)} {kind} devices here")
    if made.layerwise_offload or made.cpu_offload:
        raise UsageError(f"{flag} needs the transformer on its device: leave out the offload")
    if made.request.cuda_graph:
        raise UsageError(f"{flag}: processes that wait for each other cannot replay --cuda-graph")
    for name, component in made.components.items():
        require_plan(made.model, name, component.class_name)
        heads = component.config.get("num_attention_heads")
        if heads is None or heads % count:
            raise UsageError(f"{flag}: {name} has {heads} attention heads, which it must divide")


def require_plan(model: str, component: str, class_name: str) -> None:
    """RefusedError for a transformer that diffusers cannot split."""
    import diffusers

    if getattr(getattr(diffusers, class_name), "_cp_plan", None) is None:
        raise RefusedError(
            RULE,
            f"{model}: {component} is a {class_name}, for which diffusers {diffusers.__version__} "
            "has no context-parallel plan: leave out --nproc-per-node",
        )


@contextmanager
def join(request: Request) -> Iterator[tuple[int, Plan, Any]]:
    """(rank, plan, pipeline) of this process among those that torchrun started."""
    found = find_plan(request)
    kind = found.machine.device.partition(":")[0]
    distributed.init_process_group(TRANSPORTS[kind])
    try:
        rank, count = distributed.get_rank(), distributed.get_world_size()
        check(found, count)
        if kind != "cpu":
            getattr(torch, kind).set_device(rank)
            found = find_plan(replace(request, device=f"{kind}:{rank}"))
        pipeline = build_pipeline(found)
        if count > 1:
            split(pipeline, found, count)
        yield rank, found, pipeline
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def split(pipeline: Any, made: Plan, count: int) -> None:
    """Let each transformer of a pipeline work on this process's share of the tokens."""
    from diffusers import ContextParallelConfig

    on_cpu = made.machine.device == "cpu"
    for name in made.components:
        config = ContextParallelConfig(ulysses_degree=count, ulysses_anything=True)
        with quiet(), count_processor() if on_cpu else nullcontext():
            getattr(pipeline, name).enable_parallelism(config=config)


def count_processor() -> Any:
    """A context in which torch counts the processor as one accelerator."""
    return mock.patch.object(torch.accelerator, "device_count", return_value=1)
