"""One generation alone and in two processes: started as a program, this file is one of the two.

On a CPU the two are forked from the process of the tests, which has imported everything: a program
spends ten seconds on imports. What holds a GPU cannot be forked.
"""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from quantmatrix import api
from quantmatrix.cli import main
from quantmatrix.request import Request
from quantmatrix.runtime import parallel
from quantmatrix.runtime.generate import generate
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan.types import Plan
from quantmatrix.runtime.quantized_linear import QuantizedLinear


def read(words: list[str]) -> Request:
    return Request.from_words(["--device", "cpu", *words, "--tiny", "--prompt", "a fox"])


def watch(request: Request, plan: Any, pipeline: Any) -> dict[str, Any]:
    """Latents, and how many rows the quantized layers have seen in how many calls."""
    rows = []
    for name in plan.components:
        for module in getattr(pipeline, name).modules():
            if isinstance(module, QuantizedLinear):
                module.register_forward_pre_hook(
                    lambda _, x: rows.append(x[0].numel() // x[0].shape[-1])
                )
    run = generate(request, plan=plan, pipeline=pipeline)
    return {"latents": run.latents, "rows": sum(rows), "calls": len(rows)}


def run_alone(words: Sequence[str]) -> dict[str, Any]:
    """What this process sees."""
    request = read(list(words))
    plan = api.require_plan(request)
    return watch(request, plan, build_pipeline(plan))


def run_together(target: Path, words: Sequence[str]) -> dict[str, Any]:
    """What rank 0 of two programs saw, kept in a file meanwhile."""
    done = subprocess.run(
        [*parallel.name_launcher(2), __file__, str(target), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(torch.load(target))


def fork_together(target: Path, words: Sequence[str]) -> dict[str, Any]:
    """The same of two processes that are forked."""
    assert fork(lambda: keep_seen(target, words), 2) == [0, 0]
    return dict(torch.load(target))


def keep_seen(target: Path, words: Sequence[str]) -> None:
    """What each of the two does."""
    asked, _ = api.resolve(read([*words, "--nproc-per-node", "2"]))
    with parallel.join(asked) as (rank, found, pipe):
        seen = watch(asked, found, pipe)
        if rank == 0:
            torch.save(seen, target)


def fork(act: Callable[[], None], processes: int) -> list[int]:
    """Exit codes of processes that do the same, with the variables that torchrun gives each.

    With 0 processes it is one, that nobody has given any.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(processes or 1):
        child = os.fork()
        if child == 0:
            if processes:
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(processes),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
            be_child(act)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def be_child(act: Callable[[], None]) -> None:
    """Do it, and end without what the process of the tests does at its end."""
    gc.freeze()  # the collector would touch, and so copy, all memory of the parent
    try:
        torch.set_num_threads(1)  # threads of the parent are not there
        act()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def answer(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """In place of `subprocess.run`: the processes of `parallel.generate_together`, forked."""
    *launcher, flag, module, folder = command
    assert (flag, module) == ("-m", "quantmatrix.runtime.parallel")
    assert launcher in (parallel.name_launcher(2), [sys.executable])
    codes = fork(lambda: parallel.answer_request(Path(folder)), 2 if len(launcher) > 1 else 0)
    return subprocess.CompletedProcess(command, max(codes), "", "")


def launch_forked(plan: Plan, argv: Sequence[str]) -> int:
    """In place of `parallel.launch`: the command's processes, forked."""

    def act() -> None:
        os.environ["TORCHELASTIC_RUN_ID"] = "forked"  # what `parallel.is_worker` asks for
        code = main.main(argv)
        sys.stdout.flush()
        assert code == 0

    return max(fork(act, plan.processes))


def check_shared(one: dict[str, Any], two: dict[str, Any], most: float) -> None:
    """Both called the same layers, two processes on fewer rows each, and the latents agree."""
    assert two["calls"] == one["calls"] > 0
    assert two["rows"] < 0.8 * one["rows"], "nothing was shared"
    assert len(one["latents"]) > 1
    check_latents(one["latents"], two["latents"], most)


def check_latents(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor], most: float) -> None:
    """The distance of each step's latents, relative to their norm, is at most that."""
    for alone, shared in zip(one, two, strict=True):
        distance = float((alone.float() - shared.float()).norm() / alone.float().norm())
        assert distance <= most, distance


if __name__ == "__main__":
    keep_seen(Path(sys.argv[1]), sys.argv[2:])
