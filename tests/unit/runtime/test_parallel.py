"""Two processes share one generation: the latents of one process, one file, clear errors."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import context_parallel
import pytest
import torch

from quantmatrix import api, exit_codes
from quantmatrix.cli import main
from quantmatrix.errors import QuantmatrixError, RefusedError, UsageError
from quantmatrix.request import Request
from quantmatrix.runtime import parallel
from quantmatrix.runtime.generate import generate
from quantmatrix.runtime.pipeline import build_pipeline
from quantmatrix.runtime.plan import context_parallel as sharing
from quantmatrix.runtime.plan import decide
from quantmatrix.runtime.plan.types import Plan

FLUX = (
    *("--model-path", "black-forest-labs/FLUX.1-dev"),
    *("--transformer-path", "BBuf/flux1-dev-modelopt-nvfp4-sglang-transformer"),
)
WAN = (
    *("--model-path", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
    *("--transformer-path", "BBuf/wan22-t2v-a14b-modelopt-fp8-sglang-transformer"),
)
Z_IMAGE = (
    *("--model-path", "Tongyi-MAI/Z-Image-Turbo"),
    *("--transformer-path", "quantmatrix/z-image-modelopt-fp8"),
)
LTX = (
    *("--model-path", "Lightricks/LTX-Video", "--transformer-path", "quantmatrix/ltx-video-fp8"),
    *("--height", "32", "--width", "32"),
)
ROUNDING = 2.0**-7
"""Two units of BF16's eight bits, relative to the norm of the latents."""


def test_two_processes_give_the_latents_of_one(tmp_path: Path) -> None:
    one = context_parallel.run_alone(WAN)
    two = context_parallel.fork_together(tmp_path / "seen.pt", WAN)
    context_parallel.check_shared(one, two, ROUNDING)
    sharded = context_parallel.fork_together(tmp_path / "sharded.pt", (*WAN, "--shard-weights"))
    assert all(torch.equal(*pair) for pair in zip(two["latents"], sharded["latents"], strict=True))


def test_cross_attention_with_a_mask_is_shared(tmp_path: Path) -> None:
    """Each process takes a scale of its own rows, so codes round otherwise: half a step of E4M3, at most."""
    one = context_parallel.run_alone(LTX)
    two = context_parallel.fork_together(tmp_path / "seen.pt", LTX)
    context_parallel.check_shared(one, two, 2.0**-4)


@pytest.mark.parametrize(
    ("model", "checkpoint", "first"),
    [
        ("black-forest-labs/FLUX.2-dev", "quantmatrix/flux-2-fp8-tensor-dynamic", "x_embedder"),
        ("Qwen/Qwen-Image", "quantmatrix/qwen-image-fp8-tensor-dynamic", "img_in"),
    ],
)
def test_sharing_moves_latents_no_further_than_a_rounding_does(
    model: str, checkpoint: str, first: str, tmp_path: Path
) -> None:
    """Codes of 8 bits make a rounding of BF16 larger, as they do what sharing changes: here a scale of a
    whole input, which each process takes of its own rows."""
    words = ("--model-path", model, "--transformer-path", checkpoint, "--backend", "reference")
    one = context_parallel.run_alone(words)["latents"]
    two = context_parallel.fork_together(tmp_path / "seen.pt", words)["latents"]
    request = context_parallel.read([*words])
    plan = api.require_plan(request)
    pipe = build_pipeline(plan)
    generator = torch.Generator().manual_seed(1)

    def round_once(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=generator)
        return (output.float() * (1 + 2.0**-9 * noise)).to(output.dtype)

    pipe.transformer.get_submodule(first).register_forward_hook(round_once)
    rounded = generate(request, plan=plan, pipeline=pipe).latents
    moved, shared = (
        float((other[-1].float() - one[-1].float()).norm() / one[-1].float().norm())
        for other in (rounded, two)
    )
    assert 0 < shared <= 1.5 * moved


def test_only_the_first_process_writes_and_prints(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell of the suites starts the same as programs; its record has what the first one printed."""
    monkeypatch.setattr(parallel, "launch", context_parallel.launch_forked)
    words = ["generate", *FLUX, "--tiny", "--device", "cpu", "--prompt", "a fox", "--json"]
    more = ["--nproc-per-node", "2", "--output-path", str(tmp_path)]
    assert main.main([*words, *more]) == 0
    out = capfd.readouterr().out
    [run] = json.loads(out)["runs"]
    assert [str(path) for path in tmp_path.iterdir()] == [run["output"]]
    assert run["quantized_layers"]["transformer"] > 0


def test_model_without_a_plan_is_refused_by_name(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["generate", *Z_IMAGE, "--tiny", "--device", "cpu", "--nproc-per-node", "2"]
    assert main.main(words) == exit_codes.EXIT_REFUSED
    err = capfd.readouterr().err
    assert "ZImageTransformer2DModel" in err
    assert "has no context-parallel plan" in err


def test_what_cannot_be_shared_is_said_before_anything_starts() -> None:
    request = Request.from_words([*FLUX, "--tiny", "--device", "cpu"])
    plan = api.require_plan(request)

    def share(count: int, **changes: Any) -> Plan:
        asked = replace(request, nproc_per_node=count, **changes.pop("request", {}))
        return sharing.share(replace(plan, request=asked, **changes))

    assert (share(1), share(2).processes) == (replace(plan, request=request), 2)
    gpus = replace(plan.machine, device="cuda", count=3)
    for count, changes, message in (
        (0, {}, "expected 1 or more"),
        (2, {"layerwise_offload": True}, "leave out the offload"),
        (1, {"request": {"shard_weights": True}}, "needs several devices"),
        (2, {"request": {"shard_weights": True, "compile": True}}, "leave out --compile"),
        (4, {"machine": gpus}, "has 3 cuda devices"),
        (2, {"machine": replace(gpus, device="cuda:1")}, "without a number"),
    ):
        with pytest.raises(UsageError, match=message):
            share(count, **changes)
    assert share(2, machine=gpus).processes == 2
    for heads, count, tiny, processes, said in (
        (24, 7, False, 7, r"gathered \(ring\), which sends more than --nproc-per-node 6"),
        (
            2,
            4,
            False,
            4,
            r"gathered \(Ulysses 2 x ring 2\), which sends more than --nproc-per-node 2",
        ),
        (1, 2, False, 2, r"gathered \(ring\), which sends more$"),
        (2, 4, True, 2, "--nproc-per-node 4: 2 processes share the heads of the tiny stand-in"),
        (2, 3, True, 3, r"gathered \(ring\), which sends more than --nproc-per-node 2"),
        (0, 2, True, 2, r"gathered \(ring\), which sends more$"),
    ):
        found = share(count, request={"tiny": tiny}, components=give_heads(plan, heads))
        [warning] = found.warnings[len(plan.warnings) :]
        assert (found.processes, bool(re.search(said, warning))) == (processes, True), warning
    assert share(2, machine=gpus, request={"cuda_graph": True}).processes == 2
    with pytest.raises(RefusedError, match="z-image: transformer is a ZImage"):
        sharing.require_plan("z-image", "transformer", "ZImageTransformer2DModel")


def give_heads(plan: Plan, heads: int) -> dict[str, Any]:
    """The components of a plan with another number of attention heads."""
    found = plan.components["transformer"]
    return {"transformer": replace(found, config={**found.config, "num_attention_heads": heads})}


def test_a_plan_says_how_heads_are_shared_that_do_not_divide() -> None:
    request = Request.from_words([*FLUX, "--tiny", "--device", "cpu", "--nproc-per-node", "4"])
    plan = api.require_plan(replace(request, nproc_per_node=1))
    uneven = replace(plan, request=request, components=give_heads(plan, 30))
    shared = sharing.share(uneven)
    assert shared.processes == 4
    assert shared.warnings == (
        *plan.warnings,
        "transformer: its 30 attention heads are shared as 8, 8, 8, 6: a step takes as long as the 8 "
        "of the first process",
    )
    assert sharing.share(replace(uneven, components=give_heads(plan, 32))).warnings == plan.warnings


@pytest.mark.parametrize(
    ("count", "sharded", "warned"),
    [
        (
            1,
            False,
            "the transformer weights need 2.0 GiB, CPU has 1.0 GiB: try --dit-layerwise-offload",
        ),
        (4, False, "offload, or --nproc-per-node 4 --shard-weights"),
        (4, True, ""),
    ],
)
def test_a_plan_that_does_not_fit_one_device_proposes_to_share_the_weights(
    count: int, sharded: bool, warned: str
) -> None:
    plan = api.require_plan(Request.from_words([*FLUX, "--tiny", "--device", "cpu"]))
    big = {"transformer": replace(plan.components["transformer"], bytes=2**31)}
    machine = replace(plan.machine, name="CPU", count=count, memory_bytes=2**30)
    request = replace(plan.request, nproc_per_node=count, shard_weights=sharded)
    said: list[str] = []
    decide.check_memory(big, request, machine, said)
    assert [warned in text for text in said] == [True] * bool(warned)
    machine = replace(machine, memory_bytes=2**29 - 1)
    decide.check_memory(big, request, machine, said := [])
    assert len(said) == 1
    assert ("1/4 of the transformer weights needs 0.5 GiB" in said[0]) is sharded


def test_a_stand_in_with_few_heads_says_that_it_takes_fewer_processes() -> None:
    plan = api.require_plan(
        Request.from_words([*FLUX, "--tiny", "--nproc-per-node", "4"], hardware="rtx-5090-x4")
    )
    assert plan.processes == plan.to_json()["processes"] == 2
    assert "--nproc-per-node 4: 2 processes share the heads of the tiny stand-in" in plan.warnings


def test_plan_refuses_what_cannot_be_shared(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--tiny", "--nproc-per-node", "4", "--hardware"]
    assert main.main([*words, "rtx-5090-x4", *FLUX]) == 0
    assert " GiB in each of 2 processes" in capsys.readouterr().out
    assert main.main([*words, "rtx-5090", *FLUX]) == exit_codes.EXIT_USAGE
    assert "NVIDIA GeForce RTX 5090 has 1 cuda devices" in capsys.readouterr().err
    assert main.main([*words, "rtx-5090-x4", *Z_IMAGE]) == exit_codes.EXIT_REFUSED
    assert f"refused [{sharing.RULE}]: z-image: transformer is" in capsys.readouterr().out


def test_a_run_together_is_a_run_and_a_failure_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*FLUX, "--tiny", "--device", "cpu", "--height", "32", "--width", "32"]
    request = Request.from_words([*words, "--num-inference-steps", "1", "--nproc-per-node", "2"])
    plan = api.require_plan(request)
    with pytest.raises(UsageError, match=r"2 processes, this is one of none: see .*together"):
        api.generate(request)
    monkeypatch.setattr(parallel, "subprocess", SimpleNamespace(run=context_parallel.answer))
    run = parallel.generate_together(plan.request, plan)
    assert run.plan is plan
    assert (len(run.latents), run.media[0].size, run.calls) == (1, (32, 32), {"transformer": 1})
    alone = api.generate(replace(request, nproc_per_node=1))
    context_parallel.check_latents(alone.latents, run.latents, ROUNDING)
    monkeypatch.setattr(parallel, "name_launcher", lambda processes: [sys.executable])
    with pytest.raises(QuantmatrixError, match=r"2 processes gave no run: \w*Error: .*RANK"):
        parallel.generate_together(plan.request, plan)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_answers_a_request(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(model_path="x", tiny=True, seed=3)

    @contextmanager
    def join(asked: Request) -> Iterator[tuple[int, str, str]]:
        assert asked == request
        yield rank, "a plan", "a pipeline"

    def generate(asked: Request, *, plan: str, pipeline: str) -> SimpleNamespace:
        return SimpleNamespace(about=(asked.seed, plan, pipeline), plan=plan)

    monkeypatch.setattr(parallel, "join", join)
    monkeypatch.setattr(parallel, "generate", generate)
    (tmp_path / "request").write_bytes(pickle.dumps(request))
    parallel.answer_request(tmp_path)
    answers = {path.name: pickle.loads(path.read_bytes()) for path in tmp_path.iterdir()}
    run = {"about": (request.seed, "a plan", "a pipeline"), "plan": None}
    assert answers == {"request": request} | ({"run": run} if rank == 0 else {})


def test_a_process_that_fails_leaves_its_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def join(asked: Request) -> None:
        raise UsageError("three were started")

    monkeypatch.setattr(parallel, "join", join)
    (tmp_path / "request").write_bytes(pickle.dumps(Request(model_path="x")))
    with pytest.raises(UsageError):
        parallel.answer_request(tmp_path)
    assert (tmp_path / parallel.PROBLEM).read_text() == "UsageError: three were started"


def test_an_interruption_ends_the_processes_that_share_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text(
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        "    pathlib.Path('ended').touch()\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "pathlib.Path('started').touch()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parallel, "name_launcher", lambda count: [sys.executable, str(sleeper)])
    wait = subprocess.Popen.wait

    def interrupt(run: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        parallel.launch(SimpleNamespace(processes=2), [])
    assert (tmp_path / "ended").exists()
