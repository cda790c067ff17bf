"""Parallel: one generation on several devices of a machine (`--nproc-per-node 4`).

torchrun starts one process per device. Each holds the whole quantized transformer and works on its
share of the tokens (`token_shares` says which); diffusers' context parallelism exchanges heads for
tokens around every attention (Ulysses), and gathers keys and values where heads are too few (ring). The
layers see fewer rows and compute each row as before, so the latents are those of one process, within
the rounding of the compute dtype and what codes make of it. A dynamic scale of a whole input
(`tensor-dynamic`) is that of its process's rows, which moves latents as far as a rounding does. Only the
first process writes and prints.

diffusers 0.42.1 divides by the number of accelerators, which is 0 on a CPU; `count_processor` gives
it 1 there, and everything else works over gloo.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed

from quantmatrix import models
from quantmatrix.errors import QuantmatrixError, UsageError
from quantmatrix.files import write_whole
from quantmatrix.hardware import probe
from quantmatrix.quoting import quote
from quantmatrix.request import Request
from quantmatrix.runtime.acceleration import free_graphs
from quantmatrix.runtime.generate import generate
from quantmatrix.runtime.library_logs import quiet
from quantmatrix.runtime.peer_memory import TIMEOUT
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan import decide
from quantmatrix.runtime.plan.context_parallel import choose_degrees, count_heads
from quantmatrix.runtime.plan.types import Plan, require
from quantmatrix.runtime.run import Run
from quantmatrix.runtime.sharded_weights import shard
from quantmatrix.runtime.token_shares import follow_tokens

SHOWN = 2000
"""Characters of what failed processes said that are shown."""
PROBLEM = "problem"
"""File in which one of them says what went wrong."""
TRANSPORTS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
"""How processes talk, by torch's name of their device."""


def is_worker() -> bool:
    """Whether torchrun has started this process."""
    return bool(distributed.is_torchelastic_launched())


def launch(plan: Plan, argv: Sequence[str]) -> int:
    """Run a quantmatrix command in the processes of its plan; its exit code."""
    command = [*name_launcher(plan.processes), "-m", "quantmatrix", *argv]
    with subprocess.Popen(command) as launcher:
        try:
            return launcher.wait()
        except BaseException:  # a signal to this process is one to all of them
            launcher.terminate()
            launcher.wait()
            raise


def generate_together(request: Request, plan: Plan) -> Run:
    """The run of a request's first prompt and seed in the processes of its plan.

    The processes plan the request again, so it comes with the hub of its stand-ins. Raises
    QuantmatrixError with what they said when they fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "request"), Path(folder, "run")
        asked.write_bytes(pickle.dumps(request))
        command = [*name_launcher(plan.processes), "-m", "quantmatrix.runtime.parallel", folder]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode or not answer.is_file():
            problem = Path(folder, PROBLEM)
            said = (
                problem.read_text(encoding="utf-8")
                if problem.is_file()
                else done.stderr.strip()[-SHOWN:]
            )
            raise QuantmatrixError(f"{plan.processes} processes gave no run: {said}")
        return Run(**{**pickle.loads(answer.read_bytes()), "plan": plan})


def answer_request(folder: Path) -> None:
    """What each process of `generate_together` does: the run of the first, or what went wrong."""
    request: Request = pickle.loads((folder / "request").read_bytes())
    try:
        with join(request) as (rank, plan, pipeline):
            run = generate(request, plan=plan, pipeline=pipeline)
            if rank == 0:
                write_whole(folder / "run", pickle.dumps({**vars(run), "plan": None}))
    except Exception as error:
        (folder / PROBLEM).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        raise


def name_launcher(processes: int) -> list[str]:
    """Command that starts a module or file in several processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, "--nproc-per-node", str(processes)]


def find_plan(request: Request) -> Plan:
    """The plan of a request for this machine; RefusedError when it is a refusal."""
    return require(decide.plan(request, probe.probe(request.device)))


@contextmanager
def join(request: Request) -> Iterator[tuple[int, Plan, Any]]:
    """(rank, plan, pipeline) of this process among those that torchrun started.

    The request comes with the hub of its stand-ins; see `quantmatrix.api.resolve`. Raises
    UsageError where another number of processes was started than the plan has, QuantmatrixError where
    a device fails or waits in vain for another process.
    """
    found = find_plan(request)
    kind = found.machine.device.partition(":")[0]
    distributed.init_process_group(TRANSPORTS[kind])
    try:
        rank, count = distributed.get_rank(), distributed.get_world_size()
        if count != found.processes:
            raise UsageError(f"{count} processes were started, the plan has {found.processes}")
        if kind != "cpu":
            getattr(torch, kind).set_device(rank)
            alone = replace(request, device=f"{kind}:{rank}", nproc_per_node=1, shard_weights=False)
            found = replace(find_plan(alone), processes=count)
        pipeline = build_pipeline(found)
        if count > 1:
            split(pipeline, found, count)
        if request.shard_weights:
            for name in found.components:
                shard(getattr(pipeline, name), models.load(found.model).BLOCKS)
        yield rank, found, pipeline
        distributed.barrier()
    except torch.AcceleratorError as error:
        raise QuantmatrixError(
            f"process {distributed.get_rank()} of {distributed.get_world_size()}: its device failed, or "
            f"waited {TIMEOUT // 1000} s for another process: {quote(str(error).splitlines()[0])}"
        ) from error
    finally:
        free_graphs()
        distributed.destroy_process_group()


def split(pipeline: Any, plan: Plan, count: int) -> None:
    """Let each transformer of a pipeline work on this process's share of the tokens."""
    for name, component in plan.components.items():
        degrees = choose_degrees(count_heads(component), count)
        part(getattr(pipeline, name), *degrees, on_cpu=plan.machine.device == "cpu")


def part(transformer: Any, ulysses: int, ring: int, *, on_cpu: bool) -> None:
    """Let a transformer work on this process's share of the tokens, with degrees of Ulysses and ring."""
    from diffusers import ContextParallelConfig

    config = ContextParallelConfig(
        ulysses_degree=ulysses, ring_degree=ring, ulysses_anything=ring == 1
    )
    with quiet(), count_processor() if on_cpu else nullcontext():
        transformer.enable_parallelism(config=config)
    follow_tokens(transformer, config, ulysses * ring)


def count_processor() -> Any:
    """A context in which torch counts the processor as one accelerator."""
    return mock.patch.object(torch.accelerator, "device_count", return_value=1)


if __name__ == "__main__":
    answer_request(Path(sys.argv[1]))
